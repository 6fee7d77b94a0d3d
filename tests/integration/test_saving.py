"""Save and load patched models with stock `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, BertModel

import hf_adanorm
from hf_adanorm import AdaNormSpec, inspect_model, is_patched, patch_model, unpatch_model
from hf_adanorm.saving.spec import swapped_norms
from tests.zoo.processes import Scripts
from tests.zoo.round_trip import CASES, PAIRS, ROUNDING, SWAPS, auto_class, build, difference, inputs, norms, run

ROOT = Path(__file__).parents[2]


def patched(case: str, swap: str = "adanorm", **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return patch_model(build(case), **SWAPS[swap], **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a saved model for each of PAIRS, `CASE/SWAP`."""
    folder = tmp_path_factory.mktemp("saved")
    for case, swap in PAIRS:
        patched(case, swap).save_pretrained(folder / case / swap)
    return folder


def assert_comes_back(after: Any, before: Any, case: str) -> None:
    assert norms(after) == norms(before)
    assert norms(after)
    assert difference(run(after, inputs(case)), run(before, inputs(case))) <= ROUNDING


@functools.cache
def unsaved_run(case: str, swap: str | None = None) -> dict[str, Tensor]:
    """Return output and gradients of a model that was never saved."""
    return run(build(case) if swap is None else patched(case, swap), inputs(case))


@pytest.fixture(scope="module")
def child(saved: Path, tmp_path_factory: pytest.TempPathFactory, elsewhere: Scripts) -> dict[str, Any]:
    """Load every folder in a process in which hf_adanorm cannot be imported, and return the results."""
    out = tmp_path_factory.mktemp("child") / "out.pt"
    done = elsewhere.run("tests.integration.load_without_package", saved, out)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = torch.load(out)
    return result


# ------------------------------------------------------------------------------------------------- with the package


@pytest.mark.parametrize(("case", "swap"), PAIRS)
def test_reloaded_model_is_the_saved_one(case: str, swap: str, saved: Path) -> None:
    before = patched(case, swap)
    after, info = auto_class(CASES[case].auto_class).from_pretrained(saved / case / swap, output_loading_info=True)
    assert type(after) is type(before)
    assert not any(info.values()), info
    assert norms(after) == norms(before)
    assert norms(after)
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    assert difference(run(after, inputs(case)), unsaved_run(case, swap)) <= ROUNDING
    assert difference(unsaved_run(case, swap), unsaved_run(case)) > 1e-3  # else the line above would prove nothing


def test_eps_of_the_replaced_norm_survives(tmp_path: Path) -> None:
    config = CASES["bert"].config()
    config.layer_norm_eps = 3e-4
    patch_model(BertModel(config)).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).embeddings.LayerNorm.eps == 3e-4


@pytest.mark.parametrize("case", CASES)
def test_other_head_swaps_what_was_swapped_and_nothing_else(case: str, saved: Path) -> None:
    full = norms(patched(case))
    cls = auto_class(CASES[case].other_head)
    other, info = cls.from_pretrained(saved / case / "adanorm", output_loading_info=True)
    assert not info["mismatched_keys"]
    common = {name.removeprefix(f"{other.base_model_prefix}.") for name, _ in other.named_modules()}
    expected = {n.removeprefix(f"{other.base_model_prefix}.") for n in full}
    found = {n.removeprefix(f"{other.base_model_prefix}.") for n in norms(other)}
    assert found == expected & common
    assert found


def test_head_norm_that_was_not_in_the_checkpoint_stays_stock(tmp_path: Path) -> None:
    patch_model(BertModel(CASES["bert"].config())).save_pretrained(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert isinstance(model.cls.predictions.transform.LayerNorm, torch.nn.LayerNorm)
    assert len(norms(model)) == 5


def test_norms_that_the_checkpoint_lacks_start_as_new_ones(tmp_path: Path) -> None:
    patch_model(build("bert")).save_pretrained(tmp_path)
    model = BertModel.from_pretrained(tmp_path, num_hidden_layers=4, add_pooling_layer=False)
    new = model.encoder.layer[3].output.LayerNorm
    assert {name: set(t.tolist()) for name, t in new.named_buffers()} == {"weight": {1.0}}


def test_a_model_that_gets_its_memory_late_is_initialized() -> None:
    """Do as FSDP does: build on the meta device, `to_empty`, then `init_weights` or `reset_parameters`."""
    config = patch_model(build("bert")).config
    with torch.device("meta"):
        models = [transformers.AutoModel.from_config(config) for _ in range(2)]
    for model, by_module in zip(models, (False, True), strict=True):
        for buffer in model.to_empty(device="cpu").buffers():
            buffer.fill_(77)
        if by_module:
            for _, norm in swapped_norms(model):
                norm.reset_parameters()
        else:
            model.init_weights()
        for name, norm in swapped_norms(model):
            assert all(set(t.tolist()) <= {0.0, 1.0} for t in norm.buffers()), name


def test_some_layers_only(tmp_path: Path) -> None:
    before = patched("bert", layers=[-1])
    before.save_pretrained(tmp_path)
    after = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert_comes_back(after, before, "bert")
    assert set(norms(after)) == {f"bert.encoder.layer.1.{part}.LayerNorm" for part in ("attention.output", "output")}


def test_two_kinds_of_norm_in_one_model(tmp_path: Path) -> None:
    before = patched("marian", include="re:.*encoder.*")
    patch_model(before, "detachnorm", detach_variance=False, include="re:.*decoder.*final_layer_norm")
    before.save_pretrained(tmp_path)
    assert_comes_back(auto_class(CASES["marian"].auto_class).from_pretrained(tmp_path), before, "marian")


def test_part_of_a_composite_saves_and_loads_alone(saved: Path, tmp_path: Path) -> None:
    both = auto_class("AutoModelForSeq2SeqLM").from_pretrained(saved / "encoder-decoder" / "adanorm")
    both.encoder.save_pretrained(tmp_path)
    assert norms(AutoModel.from_pretrained(tmp_path)) == norms(both.encoder)

    clip = AutoModel.from_pretrained(saved / "clip" / "adanorm")
    if not isinstance(clip.vision_model, transformers.PreTrainedModel):
        pytest.skip("transformers < 5.2 has towers in CLIP that are no models of their own")
    vision = transformers.CLIPVisionModel.from_pretrained(saved / "clip" / "adanorm")
    expected = {n.removeprefix("vision_model."): s for n, s in norms(clip).items() if n.startswith("vision_model.")}
    assert {n.removeprefix("vision_model."): s for n, s in norms(vision).items()} == expected


def test_composite_of_patched_parts_is_patched(saved: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    patch_model(BertModel(CASES["bert"].config()), C=1.3).save_pretrained(part)
    both = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(part, part)
    both.save_pretrained(tmp_path / "both")
    again, info = transformers.EncoderDecoderModel.from_pretrained(tmp_path / "both", output_loading_info=True)
    assert not any(info.values()), info
    assert norms(again) == norms(both)
    assert len(norms(again)) == 10  # the new cross-attention was in neither part: it stays stock


def test_part_patched_by_itself_saves_with_the_whole(tmp_path: Path) -> None:
    """The part's config is its own copy then; the whole must not be saved as if nothing had happened."""
    config = CASES["bert"].config()
    model, sibling = (transformers.BertForMaskedLM(config) for _ in range(2))
    patch_model(model.bert, **SWAPS["adanorm"])
    model.save_pretrained(tmp_path)
    assert norms(AutoModelForMaskedLM.from_pretrained(tmp_path)) == norms(model)
    assert len(norms(model)) == 5
    patch_model(model.bert, **{**SWAPS["adanorm"], "C": 1.7})
    model.save_pretrained(tmp_path)
    assert norms(AutoModelForMaskedLM.from_pretrained(tmp_path)) == norms(model)
    unpatch_model(model.bert)
    model.save_pretrained(tmp_path)
    assert not is_patched(AutoModelForMaskedLM.from_pretrained(tmp_path))
    assert getattr(sibling.config, "adanorm", None) is None


def test_norm_put_in_by_hand_saves_and_loads(tmp_path: Path) -> None:
    model = build("bert")
    model.bert.encoder.layer[1].output.LayerNorm = hf_adanorm.AdaNorm(32, eps=1e-3, C=1.3)
    model.save_pretrained(tmp_path)
    assert_comes_back(AutoModelForMaskedLM.from_pretrained(tmp_path), model, "bert")


def test_stock_config_on_a_patched_checkpoint_raises(saved: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"leave out the argument config|size"):
        AutoModelForMaskedLM.from_pretrained(saved / "bert" / "adanorm", config=CASES["bert"].config())


class GammaNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma, self.beta, self.eps = nn.Parameter(torch.rand(size)), nn.Parameter(torch.rand(size)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + self.eps).sqrt()
        return x * self.gamma + self.beta


class GammaBert(BertModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.norm, self.LayerNorm = GammaNorm(config.hidden_size), GammaNorm(config.hidden_size)
        self.post_init()


@pytest.mark.filterwarnings("ignore:the trained gains")
def test_a_norm_with_tensors_of_other_names_is_refused_as_stock_too(tmp_path: Path) -> None:
    config = CASES["bert"].config()
    GammaBert(config).save_pretrained(tmp_path)
    if any(GammaBert.from_pretrained(tmp_path, output_loading_info=True)[1].values()):
        pytest.skip(f"transformers {transformers.__version__} renames gamma as it loads, in stock models too")
    patch_model(GammaBert(config), include=["norm", "LayerNorm"]).save_pretrained(tmp_path)
    _, info = GammaBert.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with pytest.raises((ValueError, RuntimeError), match=r"leave out the argument config|size"):
        GammaBert.from_pretrained(tmp_path, config=config)


def test_sharded_checkpoint(tmp_path: Path) -> None:
    before = patched("bart")
    before.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    after, info = auto_class("AutoModelForSeq2SeqLM").from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_comes_back(after, before, "bart")


def test_bfloat16_loading(saved: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(saved / "bert" / "adanorm", dtype=torch.bfloat16)
    assert {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()} == {torch.bfloat16}
    expected = patched("bert").to(torch.bfloat16)
    torch.testing.assert_close(model(**inputs("bert")).logits, expected(**inputs("bert")).logits, rtol=0.05, atol=0.2)


def test_from_config_builds_the_patched_architecture(saved: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(saved / "bert" / "adanorm")
    assert norms(AutoModelForMaskedLM.from_config(config)) == norms(patched("bert"))


def test_saving_again_changes_nothing(saved: Path, tmp_path: Path) -> None:
    """The config does not drift from load to save."""
    model = AutoModelForMaskedLM.from_pretrained(saved / "bert" / "adanorm")
    model.save_pretrained(tmp_path)
    first = json.loads((saved / "bert" / "adanorm" / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == first
    assert (tmp_path / "modeling_adanorm.py").read_bytes() == Path(hf_adanorm.modeling_adanorm.__file__).read_bytes()


def test_only_the_saved_config_has_an_auto_map_and_an_unpatched_model_takes_it_and_the_file_away_again(
    tmp_path: Path,
) -> None:
    model = patched("bert")
    model.save_pretrained(tmp_path)
    assert getattr(model.config, "auto_map", None) is None
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_adanorm.BertModel"
    assert (tmp_path / "modeling_adanorm.py").exists()
    unpatch_model(model).save_pretrained(tmp_path)
    assert not (tmp_path / "modeling_adanorm.py").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert "adanorm" not in config
    assert "auto_map" not in config
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert difference(run(again, inputs("bert")), run(build("bert"), inputs("bert"))) <= ROUNDING


def test_patched_config_on_stock_weights_raises(saved: Path, tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(saved / "bert" / "adanorm")
    with pytest.raises(RuntimeError, match="size"):
        AutoModelForMaskedLM.from_pretrained(tmp_path, config=config)


def test_spec_in_config_is_the_documented_one() -> None:
    spec = patched("bert").config.adanorm
    assert AdaNormSpec.from_dict(spec).to_dict() == spec
    assert spec["format"] == 1
    assert spec["version"] == hf_adanorm.__version__
    (group,) = spec["groups"]
    assert group == {
        "norm": "adanorm",
        "settings": {"C": 1.3, "k": 0.07},
        "eps": 1e-3,
        "modules": [
            "embeddings.LayerNorm",
            "encoder.layer.*.attention.output.LayerNorm",
            "encoder.layer.*.output.LayerNorm",
            "^cls.predictions.transform.LayerNorm",
        ],
    }


# --------------------------------------------------------------------------- trust_remote_code, with and without


@pytest.mark.parametrize(("case", "swap"), PAIRS)
def test_without_package_loading_raises_and_with_trust_outputs_are_equal(
    case: str, swap: str, child: dict[str, Any]
) -> None:
    got = child[case, swap]
    assert "size" in (got["without_trust"] or "")
    before = patched(case, swap)
    assert got["class"] == type(before).__name__
    assert got["norms"] == norms(before)
    assert not any(got["info"].values()), got["info"]
    old = {key: value for key, value in before.state_dict().items() if not key.endswith("_extra_state")}
    assert old.keys() == got["state"].keys()  # settings are in the config alone there
    assert all(torch.equal(old[key], got["state"][key]) for key in old)
    assert difference(got["run"], unsaved_run(case, swap)) <= ROUNDING


def test_without_package_norms_that_the_checkpoint_lacks_start_as_new_ones(child: dict[str, Any]) -> None:
    state = child["bert", "deeper"]["state"]
    assert state["bert.encoder.layer.3.output.LayerNorm.weight"].tolist() == [1.0]


@pytest.mark.parametrize("case", CASES)
def test_saved_again_without_package_loads_with_it(case: str, saved: Path, child: dict[str, Any]) -> None:
    """The traveling file travels on, with the package and by trust alone."""
    assert child[case, "resaved"]["norms"] == child[case, "adanorm"]["norms"]
    assert difference(child[case, "resaved"]["run"], child[case, "adanorm"]["run"]) <= ROUNDING
    folder = saved / case / "resaved"
    assert (folder / "modeling_adanorm.py").exists()
    after, info = auto_class(CASES[case].auto_class).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert difference(run(after, inputs(case)), unsaved_run(case, "adanorm")) <= ROUNDING


@pytest.mark.parametrize("case", CASES)
def test_with_package_and_trust_there_is_one_set_of_classes(
    case: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = auto_class(CASES[case].auto_class)
    model = cls.from_pretrained(saved / case / "adanorm", trust_remote_code=True)
    assert type(model) is type(patched(case))
    assert {type(m) for m in model.modules() if getattr(m, "is_adanorm_module", False)} == {hf_adanorm.AdaNorm}
    assert inspect_model(model).num_swapped == len(norms(model)) > 0
    with pytest.warns(UserWarning, match="gain 1 and bias 0"):
        unpatch_model(model)
    assert not is_patched(model)
    patch_model(model, "detachnorm")
    model.save_pretrained(tmp_path)
    assert norms(cls.from_pretrained(tmp_path, trust_remote_code=True)) == norms(model)
