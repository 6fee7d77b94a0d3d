"""Who reads a norm's output."""

from __future__ import annotations

import gc

import torch

from hf_adanorm.folding.consumers import watch_consumers
from hf_adanorm.folding.shadows import Trace
from tests.zoo.fold_blocks import WIDTH, Block


def test_watching_reports_columns_in_the_order_of_the_input() -> None:
    block = Block(lambda self, y: self.linear(y.flip(-1))).eval()
    watched = watch_consumers(block, {"norm": ((WIDTH,), False)}, {"x": torch.randn(2, 5, WIDTH)})
    (use,) = watched.uses["norm"]
    assert use.columns == tuple(reversed(range(WIDTH)))  # type: ignore[union-attr]


def test_watching_leaves_no_shadow_to_the_garbage_collector() -> None:
    block = Block(lambda self, y: self.linear(y)).eval()
    gc.collect()
    gc.disable()
    try:
        watched = watch_consumers(
            block, {"norm": ((WIDTH,), False)}, {"x": torch.randn(2, 5, WIDTH)}, follow_sums=True
        )
        assert watched.outputs is not None  # whose shadows are the ones that would stay
        assert not [thing for thing in gc.get_objects() if type(thing) is Trace]
    finally:
        gc.enable()
