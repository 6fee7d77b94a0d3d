"""Translate a file with a saved model, through the stock API, without the training code.

    python recipes/translate.py --model outputs/run/best --input source.txt --output translations.txt

The input has one sentence per line; a name that ends in .gz means gzip. Beam size, length penalty and language tokens
are those saved with the model. The translation recipe runs this script in a fresh process to test its models.
"""

from __future__ import annotations

import argparse

from common.endings import DataError, clear_use
from common.options import saved_model_parser


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = saved_model_parser(__doc__)
    parser.add_argument("--input", required=True, help="text file, one sentence per line")
    parser.add_argument("--output", required=True, help="text file to write")
    parser.add_argument("--source_lang_code", help="source language of a multilingual tokenizer")
    parser.add_argument("--source_prefix", default="", help="put before every sentence, as in training")
    return parser.parse_args()


if __name__ == "__main__":  # help, and mistakes in the options, before torch is imported
    parse_arguments()

import gzip
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from common.progress import with_time_left
from common.saved import device_and_autocast, load_saved


@torch.inference_mode()
def translate_texts(
    model_dir: str,
    texts: list[str],
    batch_size: int,
    precision: str,
    source_lang_code: str | None = None,
    source_prefix: str = "",
    trust: bool = False,
) -> list[str]:
    """Return the translation of every text, in batches of similar length."""
    texts = [source_prefix + text for text in texts]
    device, autocast = device_and_autocast(precision)
    model = load_saved(AutoModelForSeq2SeqLM, model_dir, trust_remote_code=trust).to(device)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if source_lang_code is not None:
        if not hasattr(type(tokenizer), "src_lang"):  # transformers 5.0 reloads NLLB's without its languages
            kind = type(tokenizer).__name__
            raise DataError(
                f"--source_lang_code {source_lang_code}: the {kind} of {model_dir} takes no source language"
            )
        tokenizer.src_lang = source_lang_code
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    translations = [""] * len(texts)
    for start in with_time_left(range(0, len(order), batch_size), "translation"):
        indices = order[start : start + batch_size]
        batch = tokenizer([texts[index] for index in indices], truncation=True, padding=True, return_tensors="pt")
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        with autocast:
            output = model.generate(**inputs)
        for index, text in zip(indices, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            translations[index] = " ".join(text.split())
    return translations


def read_lines(name: str) -> list[str]:
    """Return the sentences of the input file. Raises DataError if it is missing, empty or not UTF-8."""
    if not Path(name).is_file():
        raise DataError(f"--input {name}: no such file")
    with (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8-sig", newline="\n") as file:
        try:
            texts = [line.removesuffix("\r") for line in file.read().removesuffix("\n").split("\n")]
        except UnicodeDecodeError as error:
            raise DataError(f"--input {name} is not UTF-8: {error}") from error
    if not any(texts):
        raise DataError(f"--input {name} is empty")
    return texts


def main() -> None:
    arguments = parse_arguments()
    with clear_use(arguments):
        texts = read_lines(arguments.input)
        names = ("batch_size", "mixed_precision", "source_lang_code", "source_prefix", "trust_remote_code")
        translations = translate_texts(arguments.model, texts, *(getattr(arguments, name) for name in names))
        Path(arguments.output).write_text("\n".join(translations) + "\n", encoding="utf-8")
    if not arguments.quiet:
        print(f"wrote {len(translations):,} translations to {arguments.output}")


if __name__ == "__main__":
    main()
