"""Predict the classes, or the trees, of a file with a saved model, by the stock API and nothing of the training code.

    python recipes/predict.py --model outputs/run/best --data test.csv --output predictions.json
    python recipes/predict.py --task image --columns image --model outputs/mnist/best --data ... --output ...
    python recipes/predict.py --task parsing --model outputs/parser/best --data raw.conllu --output parsed.conllu

The recipes run this in a fresh process, so that their test scores are those of the model as others load it. The output
is a JSON list of class ids in the order of the file; for parsing, the CoNLL-U file with heads and relations.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import hf_adanorm  # noqa: F401  (from here on stock from_pretrained knows patched models)
from common.endings import clear_use
from common.options import positive
from common.progress import with_time_left
from common.saved import load_saved
from tasks import image_cnn, transition_parser  # noqa: F401  (registers them with the Auto classes)
from tasks.arc_standard import ParserVocabulary, parse_sentences
from tasks.conllu import check_tags, read_conllu, write_conllu
from tasks.data import check_column, check_text_column, load_file
from tasks.images import as_images, open_image


@torch.inference_mode()
def predict_texts(model_dir: str, rows: list[tuple[str, ...]], batch_size: int, precision: str) -> list[int]:
    """The class of every text, or pair of texts; batches of similar length."""
    device, dtype = _device_and_dtype(precision)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = load_saved(AutoModelForSequenceClassification, model_dir).to(device).eval()
    order = sorted(range(len(rows)), key=lambda index: -sum(map(len, rows[index])))
    predictions = [0] * len(rows)
    for start in with_time_left(range(0, len(order), batch_size), "prediction"):
        indices = order[start : start + batch_size]
        columns = [list(column) for column in zip(*(rows[index] for index in indices), strict=True)]
        inputs = tokenizer(*columns, truncation=True, padding=True, return_tensors="pt").to(device)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            classes = model(**inputs).logits.argmax(-1)
        for index, number in zip(indices, classes.tolist(), strict=True):
            predictions[index] = number
    return predictions


@torch.inference_mode()
def predict_images(model_dir: str, images: Dataset, batch_size: int, precision: str) -> list[int]:
    """The class of every image of a data set with a single column of encoded images."""
    device, dtype = _device_and_dtype(precision)
    processor = AutoImageProcessor.from_pretrained(model_dir)
    model = load_saved(AutoModelForImageClassification, model_dir).to(device).eval()
    [column] = images.column_names
    predictions: list[int] = []
    for start in with_time_left(range(0, len(images), batch_size), "prediction"):
        values = images[start : start + batch_size][column]
        batch = [open_image(value, f"row {row}") for row, value in enumerate(values, start=start)]
        inputs = processor(images=batch, return_tensors="pt").to(device)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            predictions += model(**inputs).logits.argmax(-1).tolist()
    return predictions


@torch.inference_mode()
def parse_file(model_dir: str, file: str, batch_size: int, precision: str) -> str:
    """The sentences of a CoNLL-U or CoNLL-X file with heads and relations, whatever those columns held before."""
    device, dtype = _device_and_dtype(precision)
    vocabulary = ParserVocabulary.from_pretrained(model_dir)
    model = load_saved(AutoModelForSequenceClassification, model_dir).to(device).eval()
    sentences = read_conllu(file, tag_column=model.config.tag_column, trees=False)
    if "_" not in vocabulary.tags:
        check_tags(sentences, file, model.config.tag_column)
    encoded = [vocabulary.encode(sentence) for sentence in sentences]
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        heads, relations = parse_sentences(model, encoded, single_root=model.config.single_root, batch_size=batch_size)
    return write_conllu(sentences, heads, map(vocabulary.names, relations))


def predict(arguments: argparse.Namespace) -> str:
    """What goes into the output. Raises DataError for data that does not fit."""
    settings = (arguments.batch_size, arguments.mixed_precision)
    if arguments.task == "parsing":
        return parse_file(arguments.model, arguments.data, *settings)
    data = load_file(arguments.data, text_columns=arguments.columns, option_name="data")
    for column in arguments.columns:
        if arguments.task == "image":
            check_column(data, "given", column, "columns")
        else:
            check_text_column({"given": data}, column, "columns")
    if arguments.task == "image":
        images = as_images(data.select_columns(arguments.columns), arguments.columns[0], arguments.data)
        return json.dumps(predict_images(arguments.model, images, *settings))
    rows = list(zip(*(data[column][:] for column in arguments.columns), strict=True))
    return json.dumps(predict_texts(arguments.model, rows, *settings))


def _device_and_dtype(precision: str) -> tuple[str, torch.dtype]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the saved model")
    parser.add_argument("--data", required=True, help=".csv, .tsv, .jsonl or .parquet; for parsing, CoNLL-U")
    parser.add_argument("--task", choices=["text", "image", "parsing"], default="text")
    parser.add_argument("--columns", nargs="+", default=["text"], help="text column, or the two of a pair")
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--batch_size", type=positive, default=32)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    arguments = parser.parse_args()
    with clear_use(arguments):
        Path(arguments.output).write_text(predict(arguments), encoding="utf-8")


if __name__ == "__main__":
    main()
