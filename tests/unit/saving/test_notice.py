"""A checkpoint says by itself what it needs, in the report of whoever loads it without knowing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import accelerate.utils.modeling as accelerate_modeling
import pytest
import torch
from accelerate import load_checkpoint_in_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.trainer_utils import load_sharded_checkpoint

from hf_adanorm import patch_model, unpatch_model
from hf_adanorm.modeling_adanorm import NOTICE
from tests.zoo.processes import Scripts

KEY = f"bert.embeddings.LayerNorm.{NOTICE}"


def tiny() -> BertForSequenceClassification:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=9, **sizes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save one model as one safetensors file, in shards, and as a torch file."""
    folder = tmp_path_factory.mktemp("saved")
    model = patch_model(tiny())
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "shards", max_shard_size="2KB")
    shutil.copytree(folder / "whole", folder / "torch")
    torch.save(load_file(folder / "whole" / "model.safetensors"), folder / "torch" / "pytorch_model.bin")
    (folder / "torch" / "model.safetensors").unlink()
    return folder


FORMS = ("whole", "shards", "torch")


@pytest.mark.parametrize("form", FORMS)
def test_with_the_package_nobody_sees_it(saved: Path, form: str) -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(saved / form, output_loading_info=True)
    assert not any(info.values()), info
    assert KEY not in model.state_dict()
    _, info = AutoModel.from_pretrained(saved / form, output_loading_info=True)
    assert info["unexpected_keys"] == {"classifier.weight", "classifier.bias"}


WITHOUT = """
import sys
from transformers import AutoModelForSequenceClassification
folder, *forms, out = sys.argv[1:]
load = AutoModelForSequenceClassification.from_pretrained
for form in forms:
    print("form", form, file=sys.stderr, flush=True)
    try:
        load(f"{folder}/{form}")
        print("loaded", file=sys.stderr)
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
model, info = load(f"{folder}/shards", trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
model.save_pretrained(out)
"""


@pytest.fixture(scope="module")
def without_package(saved: Path, elsewhere: Scripts) -> dict[str, str]:
    """Load each form without the package and return the output. Then trust one form and save it again."""
    done = elsewhere.run_code(WITHOUT, saved, *FORMS, saved / "again")
    return dict(zip(FORMS, ("\n" + done.stderr).split("\nform ")[-len(FORMS) :], strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_without_package_and_trust_the_report_says_what_to_do(without_package: dict[str, str], form: str) -> None:
    said = without_package[form]
    (line,) = [line for line in said.splitlines() if line.startswith(KEY)]
    assert "UNEXPECTED" in line
    assert "MISMATCH" in said
    assert "\nloaded" not in said


@pytest.mark.usefixtures("without_package")
def test_by_trust_alone_it_goes_unseen_and_travels_on(saved: Path) -> None:
    assert KEY in load_file(saved / "again" / "model.safetensors")


def test_strict_loading_works(saved: Path) -> None:
    model = patch_model(tiny())
    weights = load_file(saved / "whole" / "model.safetensors")
    assert KEY in weights
    model.load_state_dict(weights, strict=True)
    load_sharded_checkpoint(model, str(saved / "shards"), strict=True)
    for device_map in (None, {"": "cpu"}):
        for form in ("whole", "shards"):
            load_checkpoint_in_model(model, str(saved / form), device_map=device_map, strict=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*import hf_adanorm"):
        tiny().load_state_dict(weights)


def test_accelerate_reads_the_versions_of_modules_as_without_the_package(tmp_path: Path) -> None:
    model = patch_model(tiny())
    state_dict = model.state_dict()
    state_dict[KEY] = torch.zeros(1, dtype=torch.uint8)
    torch.save(state_dict, tmp_path / "pytorch_model.bin")
    read = accelerate_modeling.load_state_dict(str(tmp_path / "pytorch_model.bin"))
    assert [*read] == [key for key in model.state_dict() if not key.endswith("_extra_state")]
    assert read._metadata == model.state_dict()._metadata


def test_no_number_of_the_model(saved: Path) -> None:
    weights = load_file(saved / "whole" / "model.safetensors")
    assert (weights[KEY].dtype, weights[KEY].numel()) == (torch.uint8, 1)
    assert [key for key in weights if NOTICE in key] == [KEY]
    index = json.loads((saved / "shards" / "model.safetensors.index.json").read_text())
    assert KEY not in index["weight_map"]


def test_it_outlives_cycles_and_ends_with_the_patch(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(saved / "whole").half()
    model.save_pretrained(tmp_path / "half")
    assert KEY in load_file(tmp_path / "half" / "model.safetensors")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())  # as FSDP's and DeepSpeed's savers do
    assert KEY in load_file(tmp_path / "given" / "model.safetensors")
    model.bert.save_pretrained(tmp_path / "base")
    assert f"embeddings.LayerNorm.{NOTICE}" in load_file(tmp_path / "base" / "model.safetensors")
    unpatch_model(model).save_pretrained(tmp_path / "stock")
    assert not [key for key in load_file(tmp_path / "stock" / "model.safetensors") if NOTICE in key]


@pytest.mark.filterwarnings("ignore:this adapter is saved without its base")
def test_adapters_do_not_hold_it(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(saved / "whole")
    adapted = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["bert.embeddings"]))
    adapted.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if NOTICE in key]


def test_a_stock_config_for_a_patched_checkpoint_is_refused_in_our_words(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = AutoModelForSequenceClassification.from_pretrained(saved / "whole").config
    del config.adanorm
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match="has swapped norms, but the config given"):
            AutoModelForSequenceClassification.from_pretrained(saved / "whole", config=config, **options)
    assert NOTICE not in caplog.text
