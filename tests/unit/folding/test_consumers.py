"""Who reads a norm's output."""

from __future__ import annotations

import torch

from hf_adanorm.folding.consumers import watch_consumers
from tests.zoo.fold_blocks import WIDTH, Block


def test_watching_reports_columns_in_the_order_of_the_input() -> None:
    block = Block(lambda self, y: self.linear(y.flip(-1))).eval()
    watched = watch_consumers(block, {"norm": ((WIDTH,), False)}, {"x": torch.randn(2, 5, WIDTH)})
    (use,) = watched.uses["norm"]
    assert use.columns == tuple(reversed(range(WIDTH)))  # type: ignore[union-attr]
