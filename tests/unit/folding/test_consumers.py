"""Who reads a norm's output."""

from __future__ import annotations

import gc
from typing import Any

import torch

from hf_adanorm.detection import iter_norms
from hf_adanorm.folding.consumers import watch_consumers
from hf_adanorm.folding.shadows import Trace
from hf_adanorm.folding.uses import Watched
from tests.zoo.fold_blocks import WIDTH, Block


def watch(block: Any) -> Watched:
    infos = {name: info for name, _, info in iter_norms(block)}
    return watch_consumers(block.eval(), infos, {"x": torch.randn(2, 5, WIDTH)}, keep_outputs=["norm"])


def test_watching_reports_columns_in_the_order_of_the_input() -> None:
    (use,) = watch(Block(lambda self, y: self.linear(y.flip(-1)))).uses["norm"]
    assert use.columns == tuple(reversed(range(WIDTH)))  # type: ignore[union-attr]


def test_watching_keeps_outputs_and_leaves_no_shadow_to_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        watched = watch(Block(lambda self, y: self.linear(y)))
        assert [tuple(rows.shape) for rows in watched.norm_outputs["norm"]] == [(10, WIDTH)]
        assert watched.outputs.keys() == {"output"}
        assert not [thing for thing in gc.get_objects() if type(thing) is Trace]
    finally:
        gc.enable()
