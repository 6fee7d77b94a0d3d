"""What everything else asks of a swapped norm."""

from __future__ import annotations

import pytest
import torch

from hf_adanorm import AdaNorm, DetachNorm, LayerNormSimple, NoNorm
from hf_adanorm.modeling_adanorm import DyT


def test_a_fresh_norm_has_the_same_arguments_except_for_the_changes() -> None:
    norm = AdaNorm(8, 1e-3, C=2.0, k=0.2, channels_first=True)
    new = norm.fresh(k=0.3)
    assert new.settings() == {"C": 2.0, "k": 0.3}
    assert (new.eps, new.channels_first, new.normalized_shape) == (1e-3, True, (8,))
    with pytest.raises(ValueError, match="k must be"):
        norm.fresh(k=-1.0)


def test_settings_travel_in_the_state_dict() -> None:
    norm, other = AdaNorm(8, C=2.0, k=0.123456789), AdaNorm(8)
    other.load_state_dict(norm.bfloat16().state_dict())
    assert other.settings() == {"C": 2.0, "k": 0.123456789}
    flags = DetachNorm(8)
    flags.load_state_dict(DetachNorm(8, detach_mean=False).state_dict())
    assert flags.settings() == {"detach_mean": False, "detach_variance": True}


@pytest.mark.parametrize("other", [LayerNormSimple(8), DetachNorm(8), DetachNorm(8, detach_mean=False), DyT(8)])
def test_the_state_of_another_norm_leaves_the_settings(other: torch.nn.Module) -> None:
    norm = AdaNorm(8, k=0.2)
    norm.set_extra_state(other.get_extra_state())
    assert norm.settings() == {"C": 1.0, "k": 0.2}
    before = dict(other.settings())
    other.set_extra_state(norm.get_extra_state())
    assert other.settings() == before


def test_the_factor_of_the_backward_pass_is_that_of_autograd() -> None:
    norm, x = AdaNorm(6, C=1.5, k=0.2), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.layer_norm(x, (6,)).detach().requires_grad_()
    phi = 1.5 * (1 - 0.2 * y.detach())
    expected = torch.autograd.grad((phi * y).sum(), y)[0]
    torch.testing.assert_close(norm.backward_factor(y.detach().clone()), expected)
    assert LayerNormSimple(6).backward_factor(y) is None
    assert NoNorm(6).backward_factor(y) is None
    assert torch.tensor(DyT(6).backward_factor(y)).isnan()
