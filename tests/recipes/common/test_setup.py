import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from common.options import OptimizationOptions, OptionError, PatchOptions
from common.setup import apply_patch, learning_rate_at, make_optimizer


def tiny_bert():
    return BertModel(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    )


def rates(total, **options):
    return [learning_rate_at(step, total, OptimizationOptions(**options)) for step in range(total)]


def test_linear_schedule_rises_over_the_warm_up_and_falls_to_the_minimum():
    found = rates(10, learning_rate=1.0, warmup_steps=4, min_lr=0.1, lr_schedule="linear")
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert found[-1] == pytest.approx(1.0 - 0.9 * 5 / 6)


def test_inverse_sqrt_schedule_is_the_papers():
    warmup = {"warmup_steps": 8000, "warmup_init_lr": 1e-7}
    options = OptimizationOptions(learning_rate=1.5e-3, lr_schedule="inverse_sqrt", **warmup)
    assert learning_rate_at(0, 90000, options) == pytest.approx(1e-7 + (1.5e-3 - 1e-7) / 8000)
    assert learning_rate_at(7999, 90000, options) == pytest.approx(1.5e-3)
    assert learning_rate_at(31999, 90000, options) == pytest.approx(1.5e-3 / 2)


@given(st.sampled_from(["linear", "cosine", "constant", "inverse_sqrt"]), st.integers(1, 300), st.floats(0, 1))
def test_every_schedule_stays_between_zero_and_its_peak(schedule, total, ratio):
    found = rates(total, learning_rate=0.5, warmup_ratio=ratio, lr_schedule=schedule)
    assert all(0 <= rate <= 0.5 + 1e-12 for rate in found)
    peak = max(range(total), key=found.__getitem__)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_biases_and_gains_are_not_decayed():
    model = tiny_bert()
    optimizer = make_optimizer(model, OptimizationOptions(weight_decay=0.1))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"norm": "adanorm"}, 5),
        ({"norm": "layernorm"}, 5),
        ({"norm": "none", "layers": [-1]}, 2),
        ({"norm": "detachnorm", "norm_settings": {"detach_mean": False}, "exclude": ["embeddings.LayerNorm"]}, 4),
    ],
)
def test_patch_options_reach_the_model(options, count):
    model = tiny_bert()
    assert apply_patch(model, PatchOptions(**options)) == count
    swapped = [module for module in model.modules() if getattr(module, "is_adanorm_module", False)]
    assert len(swapped) == (0 if options["norm"] == "layernorm" else count)


def test_the_control_refuses_a_patched_model():
    model = tiny_bert()
    apply_patch(model, PatchOptions(norm="adanorm"))
    with pytest.raises(OptionError, match="already patched"):
        apply_patch(model, PatchOptions(norm="layernorm"))
