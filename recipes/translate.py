"""Translate a file with a saved model, through the stock API and nothing of the training code.

    python recipes/translate.py --model outputs/run/best --input source.txt --output translations.txt

One sentence a line; gzip is read by its ending. Beam size, length penalty and language tokens are those saved with the
model. The translation recipe runs this in a fresh process, so that its test scores are those of the model as others
load it.
"""

import argparse
import gzip
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import hf_adanorm  # noqa: F401  (from here on stock from_pretrained knows patched models)
from common.endings import DataError, clear_use
from common.options import positive
from common.progress import with_time_left
from common.saved import load_saved


@torch.inference_mode()
def translate_texts(
    model_dir: str,
    texts: list[str],
    batch_size: int,
    precision: str,
    source_lang_code: str | None = None,
    source_prefix: str = "",
) -> list[str]:
    """The translation of every text; batches of similar length."""
    texts = [source_prefix + text for text in texts]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if source_lang_code is not None:
        if not hasattr(type(tokenizer), "src_lang"):  # transformers 5.0 reloads NLLB's as one that knows no languages
            kind = type(tokenizer).__name__
            raise DataError(
                f"--source_lang_code {source_lang_code}: the {kind} of {model_dir} takes no source language"
            )
        tokenizer.src_lang = source_lang_code
    model = load_saved(AutoModelForSeq2SeqLM, model_dir).to(device).eval()
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    translations = [""] * len(texts)
    for start in with_time_left(range(0, len(order), batch_size), "translation"):
        indices = order[start : start + batch_size]
        batch = tokenizer([texts[index] for index in indices], truncation=True, padding=True, return_tensors="pt")
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            output = model.generate(**inputs)
        for index, text in zip(indices, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            translations[index] = " ".join(text.split())
    return translations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of the saved model")
    parser.add_argument("--input", required=True, help="text file, one sentence a line")
    parser.add_argument("--output", required=True, help="text file to write")
    parser.add_argument("--source_lang_code", help="source language of a multilingual tokeniser")
    parser.add_argument("--source_prefix", default="", help="put before every sentence, as in the training")
    parser.add_argument("--batch_size", type=positive, default=32)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    arguments = parser.parse_args()
    with clear_use(arguments):
        if not Path(arguments.input).is_file():
            raise DataError(f"--input {arguments.input}: no such file")
        opener = gzip.open if arguments.input.endswith(".gz") else open
        with opener(arguments.input, "rt", encoding="utf-8-sig", newline="\n") as file:
            try:
                texts = [line.removesuffix("\r") for line in file.read().removesuffix("\n").split("\n")]
            except UnicodeDecodeError as error:
                raise DataError(f"--input {arguments.input} is not UTF-8: {error}") from error
        if not any(texts):
            raise DataError(f"{arguments.input} is empty")
        names = ("batch_size", "mixed_precision", "source_lang_code", "source_prefix")
        translations = translate_texts(arguments.model, texts, *(getattr(arguments, name) for name in names))
        Path(arguments.output).write_text("\n".join(translations) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
