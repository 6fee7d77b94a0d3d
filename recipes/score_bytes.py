"""Measure the bits per character of a text file under a saved byte-level model, through the stock API.

    python recipes/score_bytes.py --model outputs/enwik/best --data test.txt

`--output` writes the bits and the number of characters (bytes) of every window as JSON, in the order of the file; for
a model with a memory (XLNet's `mem_len`), of every segment. The language modeling recipe runs this script in a fresh
process to test its models.
"""

from __future__ import annotations

import argparse

from common.endings import DataError, clear_use
from common.options import positive, saved_model_parser


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = saved_model_parser(__doc__)
    parser.add_argument("--data", required=True, help="text file: plain, .gz, .bz2, or .zip of one file")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--sequence_length", type=positive, help="by default that of the training")
    parser.add_argument("--stride", type=positive, help="bytes scored in each window; by default 256, or all")
    parser.set_defaults(batch_size=16)
    return parser.parse_args()


if __name__ == "__main__":  # help, and mistakes in the options, before torch is imported
    parse_arguments()

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from common.progress import with_time_left
from common.saved import device_and_autocast, load_saved
from tasks.bytes import Windows, check_reads_bytes, collate_windows, has_memory, read_bytes, stream_bits, window_bits


@torch.inference_mode()
def score_file(arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """Return the bits and the characters of every window of `arguments.data`."""
    device, autocast = device_and_autocast(arguments.mixed_precision)
    model = load_saved(AutoModelForCausalLM, arguments.model, trust_remote_code=arguments.trust_remote_code)
    model.to(device)
    length = arguments.sequence_length or get_tokenizer_config(arguments.model).get("model_max_length", 512)
    check_reads_bytes(model, length)
    data = read_bytes(arguments.data, "data")
    if len(data) < 2:
        raise DataError(
            f"--data {arguments.data}: {len(data)} bytes; a byte is predicted from those before it: give at least two"
        )
    if has_memory(model.config):
        with autocast:
            indices, outputs = stream_bits(model, data, length, arguments.batch_size)
        outputs = [output for _, output in sorted(zip(indices, outputs, strict=True))]
        return {"bits": [output[0] for output in outputs], "characters": [output[1] for output in outputs]}
    windows = Windows(data, length, min(256, length) if arguments.stride is None else arguments.stride)
    bits: list[float] = []
    for start in with_time_left(range(0, len(windows), arguments.batch_size), "scoring"):
        rows = [windows[index] for index in range(start, min(start + arguments.batch_size, len(windows)))]
        batch = {name: tensor.to(device) for name, tensor in collate_windows(rows).items()}
        with autocast:
            bits += window_bits(model, batch).tolist()
    return {"bits": bits, "characters": [windows[index][1] for index in range(len(windows))]}


def main() -> None:
    arguments = parse_arguments()
    with clear_use(arguments):
        scores = score_file(arguments)
        if arguments.output:
            Path(arguments.output).write_text(json.dumps(scores), encoding="utf-8")
    if not arguments.quiet:
        print(f"{sum(scores['bits']) / sum(scores['characters']):.4f} bits per character")


if __name__ == "__main__":
    main()
