"""Whatever stands in a config.json as our spec: the model loads as it was saved, or loading raises a clear error."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from hf_adanorm import patch_model
from hf_adanorm.spec import AdaNormSpec, NormGroup

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=30)
scalars |= st.sampled_from(["adanorm", "encoder", "x" * 100_000, "__class__", "../../etc", "\x00", 10**400])
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)
name = st.sampled_from(["encoder.layer.*.output.LayerNorm", "embeddings.LayerNorm", "^h", "ln_f", "a.0.b"])
names = st.lists(name, min_size=1, max_size=3, unique=True).map(tuple)
layouts: dict[str, st.SearchStrategy[Any]] = {
    "modules": names,
    "eps": st.none() | st.floats(0, 1),
    "centered": st.none() | st.booleans(),
    "normalized_shape": st.none() | st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    "output_dtype": st.sampled_from([None, "weight", "promote"]),
}
adanorm = st.fixed_dictionaries({"C": st.floats(1e-3, 100), "k": st.floats(0, 10)})
groups = st.builds(NormGroup, norm=st.just("adanorm"), settings=adanorm, **layouts)
groups |= st.builds(NormGroup, norm=st.sampled_from(["layernorm-simple", "none"]), **layouts)
specs = st.builds(
    AdaNormSpec,
    groups=st.lists(groups, max_size=3).map(tuple),
    biases=st.just(()) | names,
    eps=st.dictionaries(name, st.floats(0, 1), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def spoil(data: Any, draw: Any) -> Any:
    """Return a copy with something replaced, removed or added at a random place."""
    data = copy.deepcopy(data)
    *parents, last = draw(st.sampled_from(places(data)))
    holder = data
    for key in parents:
        holder = holder[key]
    how = draw(st.sampled_from(["replace", "remove", "add"]))
    if how == "replace":
        holder[last] = draw(trees)
    elif how == "remove":
        del holder[last]
    elif isinstance(holder, dict):
        holder[draw(st.text(max_size=10))] = draw(trees)
    else:
        holder.append(draw(trees))
    return data


def assert_clear(error: Exception) -> None:
    assert 15 < len(str(error)) < 2000
    assert not isinstance(error, (KeyError, IndexError, AttributeError, RecursionError, UnicodeError))
    assert "\x00" not in str(error)


@settings(max_examples=600, derandomize=True)
@given(specs)
def test_a_spec_comes_back_from_json(spec: AdaNormSpec) -> None:
    data = json.loads(json.dumps(spec.to_dict()))
    assert AdaNormSpec.from_dict(data) == spec
    assert AdaNormSpec.from_dict(data).to_dict() == data
    assert set(spec.names()) == {name for group in spec.groups for name in group.modules} | {*spec.biases, *spec.eps}


@settings(max_examples=700, derandomize=True)
@given(specs, st.data())
def test_a_spoilt_spec_is_refused_or_means_what_it_says(spec: AdaNormSpec, data: st.DataObject) -> None:
    spoilt = spoil(spec.to_dict(), data.draw)
    try:
        read = AdaNormSpec.from_dict(spoilt)
    except (ValueError, TypeError) as error:
        assert_clear(error)
    else:
        assert AdaNormSpec.from_dict(read.to_dict()) == read


@settings(max_examples=300, derandomize=True)
@given(trees)
def test_any_json_is_refused_in_one_line(tree: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        AdaNormSpec.from_dict(tree)
    assert_clear(raised.value)


def test_stock_loading_gives_the_saved_model_or_a_clear_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertModel(BertConfig(**sizes, vocab_size=8, max_position_embeddings=8))
    patch_model(model, "adanorm", k=0.2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    ids, loaded = torch.arange(8)[None], []

    @settings(max_examples=250, derandomize=True)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        changed = {**config, "adanorm": spoil({"adanorm": config["adanorm"]}, data.draw).get("adanorm")}
        (tmp_path / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        try:
            again = BertModel.from_pretrained(tmp_path).eval()
        except (ValueError, TypeError, RuntimeError, OSError):
            return
        norms = [m for m in again.modules() if getattr(m, "is_adanorm_module", False)]
        assert len(norms) == 3  # a spec that leaves one out cannot load the weights
        if all(m.norm_name == "adanorm" and (m.C, m.k) == (1.0, 0.2) for m in norms):
            with torch.no_grad():
                torch.testing.assert_close(again(ids)[0], model.eval()(ids)[0])
            loaded.append(changed)

    check()
    assert loaded
