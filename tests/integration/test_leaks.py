"""Check that memory, objects, file descriptors and threads do not grow over many cycles."""

from __future__ import annotations

import gc
import logging
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from hf_adanorm import patch_model, unpatch_model, watch_norms

CYCLES = 160
CACHES = 10_000  # bytes that the interpreter keeps for itself


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    """pytest holds what is printed and logged: that would be measured as growth."""
    disable_progress_bar()
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    enable_progress_bar()


@pytest.fixture
def model() -> BertModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes))


class Growth(NamedTuple):
    """Growth during one half of the cycles."""

    bytes: int  # of Python's memory
    objects: int


def growth(cycle: Callable[[], object], cycles: int) -> Growth:
    """Run so many cycles after a warm-up, and return the smaller growth of their two halves.

    A leak grows in both halves. Caches fill up once, and so does the interpreter's table of interned strings (7 MB).
    File descriptors and threads must not grow at all.
    """
    for _ in range(cycles // 10):
        cycle()
    descriptors, threads = _num_descriptors(), threading.active_count()
    tracemalloc.start()
    try:
        for _ in range(cycles // 10):  # tracemalloc sees what is allocated from here on
            cycle()
        held = [_held()]
        for _ in range(2):
            for _ in range(cycles // 2):
                cycle()
            held.append(_held())
    finally:
        tracemalloc.stop()
    assert _num_descriptors() <= descriptors  # what tests before have left may go meanwhile
    assert threading.active_count() <= threads
    return Growth(*(min(middle - first, last - middle) for first, middle, last in zip(*held, strict=True)))


def refuse_growth(cycle: Callable[[], object]) -> None:
    grown = growth(cycle, CYCLES)
    assert grown.bytes < CACHES + 50 * CYCLES
    assert grown.objects < CYCLES // 8


def _held() -> Growth:
    gc.collect()
    return Growth(tracemalloc.get_traced_memory()[0], len(gc.get_objects()))


def _num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0


def test_patching_and_unpatching(model: BertModel) -> None:
    def cycle() -> None:
        patch_model(model, "adanorm")
        unpatch_model(model)

    refuse_growth(cycle)


def test_saving(model: BertModel, tmp_path: Path) -> None:
    patch_model(model, "adanorm")
    refuse_growth(lambda: model.save_pretrained(tmp_path))


def test_loading_leaves_no_more_behind_than_loading_a_stock_model(model: BertModel, tmp_path: Path) -> None:
    stock, patched, cycles = tmp_path / "stock", tmp_path / "patched", 24
    model.save_pretrained(stock)
    patch_model(model, "adanorm").save_pretrained(patched)
    control = growth(lambda: AutoModel.from_pretrained(stock), cycles)  # transformers itself leaves some kilobytes
    grown = growth(lambda: AutoModel.from_pretrained(patched), cycles)
    assert grown.bytes < 1.2 * control.bytes + 50 * cycles
    assert grown.objects < 1.2 * control.objects + cycles // 8


def test_steps_of_training(model: BertModel) -> None:
    patch_model(model, "adanorm")
    ids = torch.arange(8)[None]

    def cycle() -> None:
        model(input_ids=ids).last_hidden_state.square().sum().backward()
        model.zero_grad()

    refuse_growth(cycle)


def test_watching_and_stopping_to(model: BertModel) -> None:
    patch_model(model, "adanorm")

    def cycle() -> None:
        with watch_norms(model, every=1):
            model(input_ids=torch.arange(8)[None]).last_hidden_state.sum().backward()

    refuse_growth(cycle)
