"""Bits per character of a text file under a saved byte-level model, through the stock API.

    python recipes/score_bytes.py --model outputs/enwik/best --data test.txt --output bits.json

The language modelling recipe runs this in a fresh process, so that its test score is that of the model as others load
it. The output holds the bits and the number of characters (bytes) of every window, in the order of the file; for a
model with a memory (XLNet's `mem_len`), of every segment.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import get_tokenizer_config

import hf_adanorm  # noqa: F401  (from here on stock from_pretrained knows patched models)
from common.endings import DataError, clear_use
from common.options import positive
from common.progress import with_time_left
from common.saved import load_saved
from tasks.bytes import (
    Windows,
    check_reads_bytes,
    collate_windows,
    has_memory,
    read_bytes,
    stream_bits,
    window_bits,
)


@torch.inference_mode()
def score_file(arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """Bits and characters of every window of `arguments.data`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arguments.mixed_precision, torch.float32)
    model = load_saved(AutoModelForCausalLM, arguments.model).to(device).eval()
    length = arguments.sequence_length or get_tokenizer_config(arguments.model).get("model_max_length", 512)
    check_reads_bytes(model, length)
    data = read_bytes(arguments.data, "data")
    if len(data) < 2:
        raise DataError(f"--data {arguments.data}: {len(data)} bytes; a byte is scored by those before it: give two")
    autocast = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the saved model")
    parser.add_argument("--data", required=True, help="text file: plain, .gz, .bz2, or .zip of one file")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--sequence_length", type=positive, help="by default that of the training")
    parser.add_argument("--stride", type=positive, help="bytes scored in each window; by default 256, or all")
    parser.add_argument("--batch_size", type=positive, default=16, help="windows, or streams, at a time")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    arguments = parser.parse_args()
    with clear_use(arguments):
        scores = score_file(arguments)
        Path(arguments.output).write_text(json.dumps(scores), encoding="utf-8")
    print(f"{sum(scores['bits']) / sum(scores['characters']):.4f} bits per character")


if __name__ == "__main__":
    main()
