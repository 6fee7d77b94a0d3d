"""Nothing grows: memory, objects, file descriptors and threads stay where they were over a thousand cycles."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from hf_adanorm import patch_model, unpatch_model, watch_norms

CYCLES = 1000


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


def growth(cycle: Callable[[], object], cycles: int) -> int:
    """Bytes of Python's memory that half so many cycles leave behind, after a warm-up of a fifth as many.

    Of the first and the second half, the one that left less: a leak grows in both, while a table of the interpreter
    (that of the interned strings, 7 MB) is made larger once and then holds for long.

    The number of objects must not grow with the cycles, that of file descriptors and threads not at all.
    """
    for _ in range(cycles // 10):
        cycle()
    gc.collect()
    objects, descriptors, threads = len(gc.get_objects()), _num_descriptors(), threading.active_count()
    tracemalloc.start()
    try:
        for _ in range(cycles // 10):  # tracemalloc sees what is allocated from here on
            cycle()
        gc.collect()
        held = [tracemalloc.get_traced_memory()[0]]
        for _ in range(2):
            for _ in range(cycles // 2):
                cycle()
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert len(gc.get_objects()) - objects < cycles // 4
    assert _num_descriptors() == descriptors
    assert threading.active_count() == threads
    return min(held[1] - held[0], held[2] - held[1])


def _num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0


@pytest.mark.parametrize("affine", ["drop", "fade"])
def test_patching_and_unpatching(model: BertModel, affine: str) -> None:
    def cycle() -> None:
        patch_model(model, "adanorm", affine=affine)
        unpatch_model(model)

    assert growth(cycle, CYCLES) < 25 * CYCLES


def test_saving(model: BertModel, tmp_path: Path) -> None:
    patch_model(model, "adanorm")
    assert growth(lambda: model.save_pretrained(tmp_path), CYCLES) < 25 * CYCLES


def test_loading_leaves_no_more_behind_than_loading_a_stock_model(model: BertModel, tmp_path: Path) -> None:
    stock, patched, cycles = tmp_path / "stock", tmp_path / "patched", 100
    model.save_pretrained(stock)
    patch_model(model, "adanorm").save_pretrained(patched)
    control = growth(lambda: AutoModel.from_pretrained(stock), cycles)  # transformers itself leaves some kilobytes
    assert growth(lambda: AutoModel.from_pretrained(patched), cycles) < 1.2 * control + 50 * cycles


def test_steps_of_training(model: BertModel) -> None:
    patch_model(model, "adanorm")
    ids = torch.arange(8)[None]

    def cycle() -> None:
        model(input_ids=ids).last_hidden_state.square().sum().backward()
        model.zero_grad()

    assert growth(cycle, 400) < 75 * 400


def test_watching_and_stopping_to(model: BertModel) -> None:
    patch_model(model, "adanorm")

    def cycle() -> None:
        with watch_norms(model, every=1):
            model(input_ids=torch.arange(8)[None]).last_hidden_state.sum().backward()

    assert growth(cycle, 200) < 75 * 200


def test_importing_starts_no_thread_and_opens_no_connection() -> None:
    code = """
import sys, threading
from transformers import PreTrainedModel
events, threads = [], threading.active_count()
sys.addaudithook(lambda name, args: events.append(name))
import hf_adanorm
hf_adanorm.patch_model
assert threading.active_count() == threads
print([name for name in events if name.startswith(("socket.", "subprocess.", "os.fork", "os.exec"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
