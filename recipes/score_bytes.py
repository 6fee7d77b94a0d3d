"""Bits per character of a text file under a saved byte-level model, through the stock API.

    python recipes/score_bytes.py --model outputs/enwik/best --data test.txt --output bits.json

The language modelling recipe runs this in a fresh process, so that its test score is that of the model as others load
it. The output holds the bits and the number of characters (bytes) of every window, in the order of the file; for a
model with a memory (XLNet's `mem_len`), of every segment.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import hf_adanorm  # noqa: F401  (from here on stock from_pretrained knows patched models)
from common.progress import with_time_left
from tasks.bytes import Windows, has_memory


def collate_windows(rows: Sequence[tuple[np.ndarray, int]]) -> dict[str, torch.Tensor]:
    """Inputs (batch, length), targets (batch, length), and which targets are scored (batch, length)."""
    data = torch.from_numpy(np.stack([row[0] for row in rows]).astype(np.int64))  # (batch, length + 1)
    scored = torch.zeros(len(rows), data.shape[1] - 1, dtype=torch.bool)
    for row, (_, count) in zip(scored, rows, strict=True):
        row[-count:] = True
    return {"input_ids": data[:, :-1], "targets": data[:, 1:], "scored": scored}


def window_bits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The bits that each window's scored bytes cost, (batch,)."""
    # Without an attention mask: nothing is padded.
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits.float()  # (batch, length, bytes)
    nats = F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none")  # (batch, length)
    return (nats * batch["scored"]).sum(1) / math.log(2)


@torch.no_grad()
def stream_bits(
    model: torch.nn.Module,
    data: np.ndarray,
    length: int,
    num_streams: int,
    *,
    rank: int = 0,
    num_processes: int = 1,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[list[int], list[tuple[float, int]]]:
    """Segments by number, and for each the bits that it costs a model with a memory and how many bytes it has; every
    byte but the first is scored once.

    The text is cut into `num_streams` contiguous streams that are read segment by segment, all at a time; their memory
    is empty at first and carried on. A process reads every `num_processes`-th stream, in as many steps as the others,
    and calls `before_each` of them.
    """
    device = next(model.parameters()).device
    num_segments = -(-(len(data) - 1) // length)
    streams = np.array_split(np.arange(num_segments), min(num_streams, num_segments))
    own = streams[rank::num_processes]
    indices, outputs, memory = [], [], None
    for position in with_time_left(range(len(streams[0])), "scoring", shown=rank == 0):
        before_each()
        segments = [int(stream[position]) for stream in own if position < len(stream)]  # the longest streams are first
        rows = [data[segment * length : (segment + 1) * length + 1] for segment in segments or [0]]
        padded = np.zeros((len(rows), length + 1), dtype=np.int64)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = row
        batch = torch.from_numpy(padded).to(device)
        memory = memory and [layer[:, : len(rows)] for layer in memory]
        output = model(input_ids=batch[:, :-1], mems=memory, use_mems=True)
        memory = list(output.mems)
        nats = F.cross_entropy(output.logits.float().transpose(1, 2), batch[:, 1:], reduction="none")  # (rows, length)
        for segment, row, its_nats in zip(segments, rows, nats, strict=False):
            indices.append(segment)
            outputs.append((its_nats[: len(row) - 1].sum().item() / math.log(2), len(row) - 1))
    return indices, outputs


@torch.inference_mode()
def score_file(arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """Bits and characters of every window of `arguments.data`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arguments.mixed_precision, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device).eval()
    data = np.frombuffer(Path(arguments.data).read_bytes(), dtype=np.uint8)
    autocast = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)
    if has_memory(model.config):
        with autocast:
            indices, outputs = stream_bits(model, data, arguments.sequence_length, arguments.batch_size)
        outputs = [output for _, output in sorted(zip(indices, outputs, strict=True))]
        return {"bits": [output[0] for output in outputs], "characters": [output[1] for output in outputs]}
    windows = Windows(data, arguments.sequence_length, arguments.stride)
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
    parser.add_argument("--data", required=True, help="text file")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--sequence_length", type=int, default=512)
    parser.add_argument("--stride", type=int, default=256, help="bytes scored in each window")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    arguments = parser.parse_args()
    scores = score_file(arguments)
    Path(arguments.output).write_text(json.dumps(scores), encoding="utf-8")
    print(f"{sum(scores['bits']) / sum(scores['characters']):.4f} bits per character")


if __name__ == "__main__":
    main()
