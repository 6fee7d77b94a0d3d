"""Which norms `include`, `exclude`, `layers` and `targets` mean."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BartConfig, BartModel, BertConfig, BertModel, PreTrainedModel, Qwen3Model

from hf_adanorm import inspect_model, patch_model
from hf_adanorm.selection import match_layers, match_names


def bert(layers: int = 3) -> BertModel:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
    with torch.device("meta"):
        return BertModel(BertConfig(num_hidden_layers=layers, **sizes))


def bart(encoder_layers: int, decoder_layers: int) -> BartModel:
    sizes = {"d_model": 8, "vocab_size": 9, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    with torch.device("meta"):
        return BartModel(BartConfig(encoder_layers=encoder_layers, decoder_layers=decoder_layers, **sizes, **heads))


def swapped(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if getattr(module, "is_adanorm_module", False)}


def chosen(model: nn.Module, **options: Any) -> set[str]:
    """Return the norms that a patch swaps, after a check that the report of the same options predicts them."""
    foretold = {row.name for row in inspect_model(model, **options).rows if row.chosen}
    found = swapped(patch_model(model, **options))
    assert foretold == found
    return found


ALL = {"embeddings.LayerNorm"} | {
    f"encoder.layer.{i}.{part}.LayerNorm" for i in range(3) for part in ("attention.output", "output")
}


@pytest.mark.parametrize(
    ("pattern", "means"),
    [
        (None, ALL),
        ("output.LayerNorm", ALL - {"embeddings.LayerNorm"}),  # an ending
        ("embeddings.LayerNorm", {"embeddings.LayerNorm"}),  # a whole name
        ("*.output.LayerNorm", ALL - {"embeddings.LayerNorm"}),
        ("layer.*.output.LayerNorm", {f"encoder.layer.{i}.output.LayerNorm" for i in range(3)}),  # a line of a report
        ("encoder.*", ALL - {"embeddings.LayerNorm"}),  # everything below
        ("enc*.layer.0.*", {n for n in ALL if ".0." in n}),
        ("*", ALL),
        (r"re:encoder\.layer\.[02]\.output\.LayerNorm", {f"encoder.layer.{i}.output.LayerNorm" for i in (0, 2)}),
    ],
)
def test_a_pattern_means_the_same_alone_and_in_a_list(pattern: str | None, means: set[str]) -> None:
    assert chosen(bert(), include=pattern) == means
    if pattern is None:
        return
    assert chosen(bert(), include=[pattern]) == means
    rest = {row.name for row in inspect_model(bert(), exclude=pattern).rows if row.chosen}
    assert rest == ALL - means


def test_the_pattern_of_a_layer_does_not_match_layers_whose_number_begins_with_it() -> None:
    names = {row.name for row in inspect_model(bert(12), include="encoder.layer.1.*").rows if row.chosen}
    assert names == {"encoder.layer.1.attention.output.LayerNorm", "encoder.layer.1.output.LayerNorm"}


@pytest.mark.parametrize("pattern", ["attention", "Norm", r"encoder\.layer\.0\..*", r"re:encoder\.layer"])
def test_a_pattern_that_matches_part_of_a_name_only_raises(pattern: str) -> None:
    with pytest.raises(ValueError, match="matches the ending of no norm's name"):
        patch_model(bert(), include=pattern)


def test_exclude_wins_over_include() -> None:
    got = chosen(bert(), include="encoder.*", exclude=["attention.output.LayerNorm"])
    assert got == {f"encoder.layer.{i}.output.LayerNorm" for i in range(3)}


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("patterns", [["output.LayerNorm", "atention.output.LayerNorm"], "encoder.layers.*"])
def test_pattern_that_matches_nothing_raises_though_others_match(option: str, patterns: Any) -> None:
    model = bert()
    with pytest.raises(ValueError, match=rf"{option}.*Closest: ") as error:
        patch_model(model, **{option: patterns})
    closest = re.findall(r"'([^']*)'", str(error.value).rpartition("Closest: ")[2])
    assert closest[0] == ("attention.output.LayerNorm" if isinstance(patterns, list) else closest[0])
    assert all(any(name.endswith(found) for name in ALL) for found in closest)
    assert not swapped(model)


@pytest.mark.parametrize(
    ("patterns", "error"),
    [
        ("re:(", ValueError),
        (["re:("], ValueError),
        ([], ValueError),
        ([""], ValueError),
        (3, TypeError),
        ([1], TypeError),
    ],
)
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_bad_patterns_raise_and_name_the_option(option: str, patterns: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=option):
        patch_model(bert(), **{option: patterns})


def test_everything_excluded_raises() -> None:
    with pytest.raises(ValueError, match=r"no norm to swap.*embeddings\.LayerNorm: exclude"):
        patch_model(bert(), exclude="*")


@pytest.mark.parametrize(
    ("layer", "means"), [(-1, {"encoder.layers.1", "decoder.layers.2"}), (2, {"decoder.layers.2"})]
)
def test_layers_count_within_every_stack(layer: int, means: set[str]) -> None:
    assert {".".join(name.split(".")[:3]) for name in chosen(bart(2, 3), layers=[layer])} == means


@pytest.mark.parametrize("layer", [3, -4])
def test_layer_that_no_stack_has_raises(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layer {layer}.*3"):
        patch_model(bert(), layers=[0, layer])


@pytest.mark.parametrize(
    ("layers", "error"), [([], ValueError), ("0", TypeError), ([0.0], TypeError), ([True], TypeError)]
)
def test_bad_layers_raise(layers: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="layers"):
        patch_model(bert(), layers=layers)


def test_layers_without_a_stack_raises() -> None:
    with pytest.raises(ValueError, match="stack of layers"):
        patch_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), layers=[0])


@pytest.mark.parametrize("stack", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks)])
def test_stack_at_the_root_of_the_model(stack: Any) -> None:
    model = stack([nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3)])
    assert chosen(model, layers=[-1]) == {"2.0"}


def tiny(model_class: Any, **fields: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return model_class(model_class.config_class(**{**sizes, "num_key_value_heads": 2, "vocab_size": 19, **fields}))


def test_auto_skips_query_and_key_norms_with_a_reason() -> None:
    rows = {row.name: row for row in inspect_model(tiny(Qwen3Model, head_dim=8)).rows}
    row = rows["layers.0.self_attn.q_norm"]
    assert (row.chosen, row.cause) == (False, "branch")
    assert row.reason == "it acts per head, on 8 of 16 channels"
    assert {name for name, row in rows.items() if row.chosen} == {
        "norm",
        *(f"layers.{i}.{part}_layernorm" for i in range(2) for part in ("input", "post_attention")),
    }


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 5), ({"targets": "all"}, 9), ({"targets": "rmsnorm"}, 9), ({"include": "q_norm"}, 2), ({"layers": 0}, 2)],
)
def test_how_query_norms_are_reached(options: dict[str, Any], count: int) -> None:
    model = tiny(Qwen3Model, head_dim=8)
    assert len(chosen(model, **options)) == count
    assert not any(m.centered for m in model.modules() if getattr(m, "is_adanorm_module", False))


def test_include_that_targets_leave_out_names_targets() -> None:
    with pytest.raises(ValueError, match="an RMSNorm, which targets='rmsnorm' swaps"):
        patch_model(tiny(Qwen3Model), include=["input_layernorm"], targets="layernorm")


NAMES = st.lists(st.sampled_from(["a", "b", "norm", "0", "1"]), min_size=1, max_size=4).map(".".join)


@given(st.lists(NAMES, min_size=1, max_size=8, unique=True), st.data())
def test_endings_match_exactly_at_dots(names: list[str], data: st.DataObject) -> None:
    ending = data.draw(st.sampled_from([".".join(n.split(".")[-k:]) for n in names for k in (1, 2)]))
    found = match_names("include", [ending], names)
    parts = ending.split(".")
    assert found == {name for name in names if name.split(".")[-len(parts) :] == parts}
    assert found


@given(st.integers(1, 5), st.lists(st.integers(-6, 6), min_size=1, max_size=4))
def test_layers_are_those_of_python_indexing(size: int, layers: list[int]) -> None:
    model = nn.ModuleList([nn.Sequential(nn.LayerNorm(2)) for _ in range(size)])
    names = [f"{i}.0" for i in range(size)]
    if all(-size <= layer < size for layer in layers):
        assert match_layers(model, tuple(layers), names) == {names[layer] for layer in layers}
    else:
        with pytest.raises(ValueError, match="layers"):
            match_layers(model, tuple(layers), names)
