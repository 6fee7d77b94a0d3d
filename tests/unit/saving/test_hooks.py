"""The wrappers around transformers: installed once, invisible to stock models, removable, good neighbors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertModel

from hf_adanorm import is_patched, patch_model, unpatch_model
from hf_adanorm.saving import card, install
from tests.zoo.round_trip import CASES, build


def tiny() -> BertModel:
    return BertModel(CASES["bert"].config())


def test_stock_model_saves_without_a_trace(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "with")
    install.uninstall()
    try:
        model.save_pretrained(tmp_path / "without")
    finally:
        install.install()
    files = {path.name: path.read_bytes() for path in (tmp_path / "without").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "with").iterdir()} == files


def test_saving_a_stock_model_leaves_a_foreign_file_of_our_name(tmp_path: Path) -> None:
    (tmp_path / "modeling_adanorm.py").write_text("# mine\n")
    tiny().save_pretrained(tmp_path)
    assert (tmp_path / "modeling_adanorm.py").read_text() == "# mine\n"


def test_auto_map_entries_that_point_elsewhere_stay(tmp_path: Path) -> None:
    model = patch_model(tiny())
    model.config.auto_map = {"AutoModel": "other/repo--their_file.TheirBert", "AutoTokenizer": "x.Y"}
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "other/repo--their_file.TheirBert"
    assert auto_map["AutoTokenizer"] == "x.Y"
    assert auto_map["AutoModelForMaskedLM"] == "modeling_adanorm.BertForMaskedLM"


def test_auto_map_names_the_class_that_was_saved(tmp_path: Path) -> None:
    patch_model(build("encoder-decoder")).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map.values()) == {"modeling_adanorm.EncoderDecoderModel"}


def test_foreign_classes_need_the_package(tmp_path: Path) -> None:
    """A config class from outside transformers: there is no auto_map, so the hooks alone restore the norms."""

    class ForeignConfig(type(CASES["bert"].config())):  # type: ignore[misc]
        model_type = "foreign-bert"

    class ForeignBert(BertModel):
        config_class = ForeignConfig

    config = ForeignConfig(**CASES["bert"].config().to_dict() | {"model_type": "foreign-bert"})
    model = patch_model(ForeignBert(config))
    model.save_pretrained(tmp_path)
    assert "AutoModel" not in (json.loads((tmp_path / "config.json").read_text()).get("auto_map") or {})
    again = ForeignBert.from_pretrained(tmp_path)
    assert is_patched(again)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )


CANNOT_BE_READ: dict[str, Callable[[Path], object]] = {
    "latin-1": lambda path: path.write_bytes("Modèle".encode("latin-1")),
    "utf-16": lambda path: path.write_text("Modèle", encoding="utf-16"),
    "a folder": lambda path: path.mkdir(),
    "a link that leads outside": lambda path: path.symlink_to("/etc/hostname"),
    "half a section": lambda path: path.write_text(f"{card.BEGIN}\n---\na: [\n"),
}


@pytest.mark.parametrize("what", CANNOT_BE_READ)
@pytest.mark.parametrize("patched", [True, False])
def test_no_card_stops_a_save(what: str, patched: bool, tmp_path: Path) -> None:
    model = patch_model(tiny())
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "model.safetensors").unlink()
    CANNOT_BE_READ[what](tmp_path / "README.md")
    before = (tmp_path / "README.md").lstat().st_ino
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        (model if patched else unpatch_model(model)).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").lstat().st_ino == before
    assert is_patched(AutoModel.from_pretrained(tmp_path)) == patched
    told = [str(w.message) for w in caught if "what hf_adanorm adds to" in str(w.message)]
    assert len(told) == (patched or what != "half a section")
    assert all("README.md" in line for line in told)


def test_even_a_warning_that_raises_comes_after_the_weights(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="README"):
            patch_model(tiny()).save_pretrained(tmp_path)
    assert is_patched(AutoModel.from_pretrained(tmp_path))


def test_a_traveling_file_that_cannot_be_written_is_not_pointed_to(tmp_path: Path) -> None:
    (tmp_path / "modeling_adanorm.py" / "in the way").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"what hf_adanorm adds.*modeling_adanorm\.py"):
        patch_model(tiny()).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert is_patched(AutoModel.from_pretrained(tmp_path))


def test_another_json_file_of_a_stock_config_takes_nothing_away(tmp_path: Path) -> None:
    patch_model(tiny()).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tiny().config.to_json_file(tmp_path / "stock_reference.json")
    assert before.items() <= {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items()
