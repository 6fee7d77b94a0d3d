"""Whatever `patch_model` is given, it does what was asked or says what is wrong and changes nothing."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedModel, ViTConfig, ViTModel

from hf_adanorm import Fold, patch_model, unpatch_model
from tests.zoo.pictures import picture, same

CASES = 400
outcomes: Counter[str] = Counter()


@functools.cache
def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "bert":
        config = BertConfig(**sizes, intermediate_size=16, vocab_size=20, max_position_embeddings=8)
        model: PreTrainedModel = BertModel(config)
    elif kind == "vit":
        model = ViTModel(ViTConfig(**sizes, intermediate_size=16, image_size=8, patch_size=4))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def run(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        if model.config.model_type == "vit":
            return model(pixel_values=torch.linspace(-1, 1, 192).view(1, 3, 8, 8)).last_hidden_state
        return model(input_ids=torch.arange(8)[None])[0]


positive = st.floats(1e-3, 10)
GOOD = {
    "C": positive,
    "k": st.floats(0, 2),
    "eps": st.none() | st.floats(1e-12, 0.1),
    "layers": st.none() | st.lists(st.sampled_from([0, 1, -1, -2]), min_size=1, max_size=2) | st.sampled_from([0, -1]),
    "centered": st.sampled_from([None, True]),
    "targets": st.sampled_from(["auto", "layernorm", "all"]),
    "detach_mean": st.booleans(),
    "exclude": st.sampled_from([None, r"re:.*\.1\..*"]),
}
nan, infinite = float("nan"), float("inf")
BAD = {
    "norm": ["LayerNorm", "", "ada norm", None, 3, ["adanorm"], "adanrom", "x" * 10_000],
    "C": [0, -1.0, nan, infinite, "1", [1], None.__class__],
    "k": [-0.1, nan, infinite, "x", {"no.such.norm": 0.1}, [0.1], {"embeddings.LayerNorm": -1.0}],
    "eps": [-1e-5, nan, infinite, "1e-5", [1]],
    "include": ["(", "no such norm", ["nowhere"], 5, [3]],
    "exclude": ["[", ".*", 7, [None]],
    "layers": [[99], "1", 1.5, [None], [0.5], -77],
    "targets": ["LayerNorm", "", None, 1],
    "affine": ["folded", "", None, 1],
}


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any], str | None]:
    """(model, arguments, name of the argument that was spoilt)."""
    kind = draw(st.sampled_from(["bert", "gpt2", "vit"]))
    arguments: dict[str, Any] = {"norm": draw(st.sampled_from(["adanorm", "layernorm-simple", "detachnorm", "none"]))}
    own = {"adanorm": {"C", "k"}, "detachnorm": {"detach_mean"}}
    others = {"C", "k", "detach_mean"} - own.get(arguments["norm"], set())
    for name in draw(st.lists(st.sampled_from(sorted(GOOD.keys() - others)), unique=True, max_size=4)):
        arguments[name] = draw(GOOD[name])
    spoilt = draw(st.none() | st.sampled_from(sorted(BAD)))
    if spoilt in ("C", "k"):
        arguments["norm"] = "adanorm"
        arguments.pop("detach_mean", None)
    if spoilt:
        arguments[spoilt] = draw(st.sampled_from(BAD[spoilt]))
    return kind, arguments, spoilt


def expected_norms(model: PreTrainedModel, arguments: dict[str, Any]) -> list[str]:
    """Names of the norms that the arguments select, found without the package's own selection."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    layers = arguments.get("layers")
    if layers is not None:
        wanted = {layer % 2 for layer in ([layers] if isinstance(layers, int) else layers)}
        names = [name for name in names if any(f".{layer}." in name for layer in wanted)]
    if arguments.get("exclude"):
        names = [name for name in names if ".1." not in name]
    return names


@settings(max_examples=CASES, derandomize=True)
@given(calls())
def test_it_does_what_was_asked_or_changes_nothing(call: tuple[str, dict[str, Any], str | None]) -> None:
    kind, arguments, spoilt = call
    model = copy.deepcopy(build(kind))
    before, names = picture(model), [] if spoilt else expected_norms(model, arguments)
    arguments = dict(arguments)
    norm = arguments.pop("norm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if spoilt or not names:
            with pytest.raises((ValueError, TypeError)) as raised:
                patch_model(model, norm, **arguments)
            outcomes["refused"] += 1
            message = str(raised.value)
            assert len(message) > 15
            assert len(message) < 1000
            assert same(picture(model), before)
            return
        patch_model(model, norm, **arguments)
    swapped = {name: m for name, m in model.named_modules() if getattr(m, "is_adanorm_module", False)}
    assert list(swapped) == names
    for module in swapped.values():
        assert module.norm_name == norm
        assert arguments.get("eps") in (None, module.eps)
        if norm == "adanorm":
            assert (module.C, module.k) == (arguments.get("C", 1.0), arguments.get("k", 0.1))
    output = run(model)
    assert output.isfinite().all()
    unpatch_model(model)
    assert same(picture(model), before)
    outcomes["swapped and undone"] += 1


@settings(max_examples=100, derandomize=True)
@given(
    st.sampled_from(["bert", "gpt2", "vit"]),
    st.sampled_from(["layernorm-simple", "adanorm"]),
    st.sampled_from(["keep", "approximate", "raise"]),
    positive,
)
def test_a_fold_keeps_the_function_or_changes_nothing(kind: str, norm: str, unfoldable: str, C: float) -> None:
    model = copy.deepcopy(build(kind))
    before, output = picture(model), run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            patch_model(model, norm, affine=Fold(unfoldable=unfoldable), C=C)
        except ValueError:
            assert same(picture(model), before)
            outcomes["refused"] += 1
            return
    outcomes["folded"] += 1
    if unfoldable != "approximate":
        assert torch.allclose(run(model), output, atol=1e-5, rtol=1e-5)


def test_enough_of_the_cases_were_valid() -> None:
    done = outcomes["swapped and undone"] + outcomes["folded"]
    print(f"\npatch_model: {dict(outcomes)}")
    assert sum(outcomes.values()) >= CASES
    assert done >= 0.3 * sum(outcomes.values())
