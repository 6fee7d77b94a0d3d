"""Whatever stands in a config.json as our spec: the model loads as it was saved, or loading raises a clear error."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from hf_adanorm import patch_model
from hf_adanorm.spec import AdaNormSpec, NormGroup

outcomes: Counter[str] = Counter()

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=30)
scalars |= st.sampled_from(["adanorm", "encoder", "x" * 100_000, "__class__", "../../etc", "\x00", 10**400])
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)

names = st.lists(
    st.sampled_from(["encoder.layer.*.output.LayerNorm", "embeddings.LayerNorm", "^h", "ln_f", "a.0.b"]),
    min_size=1,
    max_size=3,
    unique=True,
)
groups = st.builds(
    lambda C, k, modules: NormGroup(norm="adanorm", settings={"C": C, "k": k}, modules=tuple(modules)),
    st.floats(1e-3, 100),
    st.floats(0, 10),
    names,
) | st.builds(
    lambda norm, modules: NormGroup(norm=norm, modules=tuple(modules)),
    st.sampled_from(["layernorm-simple", "none"]),
    names,
)
specs = st.builds(lambda found: AdaNormSpec(groups=tuple(found)), st.lists(groups, max_size=3))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def spoil(data: Any, draw: Any) -> Any:
    """A copy with something replaced, removed or added at a random place."""
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
    assert AdaNormSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    outcomes["read"] += 1


@settings(max_examples=700, derandomize=True)
@given(specs, st.data())
def test_a_spoilt_spec_is_refused_or_means_what_it_says(spec: AdaNormSpec, data: st.DataObject) -> None:
    spoilt = spoil(spec.to_dict(), data.draw)
    try:
        read = AdaNormSpec.from_dict(spoilt)
    except (ValueError, TypeError) as error:
        assert_clear(error)
        outcomes["refused"] += 1
    else:
        assert AdaNormSpec.from_dict(read.to_dict()) == read
        outcomes["read"] += 1


@settings(max_examples=300, derandomize=True)
@given(trees)
def test_any_json_is_refused_in_one_line(tree: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        AdaNormSpec.from_dict(tree)
    assert_clear(raised.value)
    outcomes["refused"] += 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertModel(BertConfig(**sizes, vocab_size=8, max_position_embeddings=8))
    folder = tmp_path_factory.mktemp("checkpoint")
    patch_model(model, "adanorm", k=0.2).save_pretrained(folder)
    return folder


def test_stock_loading_gives_the_saved_model_or_a_clear_error(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    ids = torch.arange(8)[None]
    with torch.no_grad():
        saved = BertModel.from_pretrained(checkpoint).eval()(ids)[0]

    @settings(max_examples=250, derandomize=True)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        changed = {**config, "adanorm": spoil({"adanorm": config["adanorm"]}, data.draw).get("adanorm")}
        (checkpoint / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        try:
            model = BertModel.from_pretrained(checkpoint).eval()
        except (ValueError, TypeError, RuntimeError, OSError):
            outcomes["refused"] += 1
            return
        norms = [m for m in model.modules() if getattr(m, "is_adanorm_module", False)]
        assert len(norms) == 3  # a spec that leaves one out cannot load the weights
        if all((m.C, m.k) == (1.0, 0.2) for m in norms if m.norm_name == "adanorm") and all(
            m.norm_name == "adanorm" for m in norms
        ):
            with torch.no_grad():
                torch.testing.assert_close(model(ids)[0], saved)
        outcomes["loaded"] += 1

    try:
        check()
    finally:
        (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_enough_of_the_cases_were_valid() -> None:
    print(f"\nspecs: {dict(outcomes)}")
    assert sum(outcomes.values()) >= 1500
    assert outcomes["read"] + outcomes["loaded"] >= 0.3 * sum(outcomes.values())
