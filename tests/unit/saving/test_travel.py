"""Norms of the author's travel with a saved model, or saving says which line stops them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from hf_adanorm import AdaNormSpec, patch_model, register_norm, unpatch_model
from hf_adanorm.norms import load_class
from hf_adanorm.saving import inspect_code, travel
from tests.zoo.processes import Scripts

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IDS = torch.arange(8)[None]
HELPERS = "def scaled(x, alpha, shift):\n    return alpha * x + shift\n"
NORMS = '''"""Norms of an author's."""
import torch
from torch import nn
from .helpers import scaled


class BoundedRMSNorm(nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, *, alpha=0.5, shift=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((normalized_shape,), 0.3))
        self.alpha = nn.Parameter(torch.tensor([alpha]))
        self.shift = shift
        self.register_buffer("seven", torch.full((1,), 7.0), persistent=False)
        self.eight = torch.tensor([8.0])

    def forward(self, x):
        return self.weight * torch.erf(scaled(x, self.alpha, self.shift)) + self.seven - self.eight
'''


def bert() -> Any:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=9, **SIZES)).eval()


def written(folder: Path, code: str = NORMS) -> type:
    folder.mkdir(exist_ok=True)
    for name in ("helpers", "more"):
        (folder / f"{name}.py").write_text(HELPERS)
    (folder / "my_norms.py").write_text(code)
    return load_class(str(folder / "my_norms.py"), "BoundedRMSNorm")


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).last_hidden_state  # type: ignore[no-any-return]


def trained(folder: Path, **settings: Any) -> Any:
    model = patch_model(bert(), written(folder), **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


ALONE = """
import sys
import torch
from transformers import AutoModel
folder, copy = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(copy)
deeper = AutoModel.from_pretrained(copy, trust_remote_code=True, num_hidden_layers=2).encoder.layer[1].output.LayerNorm
with torch.no_grad():
    torch.save([model.eval()(torch.arange(8)[None])[0], deeper.norm.weight, deeper.norm.seven], folder + "/out.pt")
"""


def test_it_loads_by_stock_calls_by_trust_and_without_the_package_again_and_again(
    tmp_path: Path, elsewhere: Scripts
) -> None:
    model = trained(tmp_path / "code", alpha=0.7, shift=0.1)
    expected = output(model)
    assert expected.std() > 0
    model.save_pretrained(tmp_path / "first")
    torch.testing.assert_close(output(BertModel.from_pretrained(tmp_path / "first").eval()), expected)
    by_trust = AutoModel.from_pretrained(tmp_path / "first", trust_remote_code=True).eval()
    assert type(by_trust) is BertModel
    torch.testing.assert_close(output(by_trust), expected)
    for one, two in (("first", "second"), ("second", "third")):
        elsewhere.run_code(ALONE, tmp_path / one, tmp_path / two, folder=tmp_path / one)
        found, weight, seven = torch.load(tmp_path / one / "out.pt")
        torch.testing.assert_close(found, expected)
        assert (weight.unique().tolist(), seven.tolist()) == ([pytest.approx(0.3)], [7.0])  # those of a new norm
    norm = by_trust.encoder.layer[0].output.LayerNorm
    assert norm.settings() == {"alpha": 0.7, "shift": 0.1}
    learned = norm.inner.weight.detach().clone()
    assert torch.equal(unpatch_model(by_trust).encoder.layer[0].output.LayerNorm.weight, learned)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"files": {"my_norms.py": "0" * 64}}, r"saved with another version of my_norms\.py"),
        ({"class": "Unknown"}, r"the class Unknown of my_norms\.py: import my_norms and call register_norm"),
    ],
)
def test_a_stock_load_without_the_class_says_what_to_do(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    trained(tmp_path / "code").save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["adanorm"]["classes"]["BoundedRMSNorm"].update(changed)
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=told):
        BertModel.from_pretrained(tmp_path / "saved")


def test_two_folders_with_other_files_of_the_same_name_do_not_mix(tmp_path: Path) -> None:
    expected = []
    for name in ("a", "b"):
        written(tmp_path / name, NORMS.replace("7.0", "1.0" if name == "a" else "2.0"))
        model = patch_model(bert(), f"{tmp_path / name}/my_norms.py:BoundedRMSNorm")
        model.save_pretrained(tmp_path / f"saved_{name}")
        expected.append(output(model))
    assert not torch.equal(*expected)
    for name, value in zip("ab", expected, strict=True):
        again = AutoModel.from_pretrained(tmp_path / f"saved_{name}", trust_remote_code=True).eval()
        torch.testing.assert_close(output(again), value)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("from . import helpers", "write `from .name import ...`"),
        ("from .deep.helpers import scaled", "write `from .name import ...`"),
        ("from ..code import helpers", "write `from .name import ...`"),
        ("import helpers", "a file in the same folder"),
        ("import hf_adanorm", "must work where that is missing"),
        ("from hf_adanorm import AdaNorm", "must work where that is missing"),
        ("from .nowhere import x", "there is no nowhere.py"),
        ('"""Or\n    from .nowhere import it"""', "takes this text for an import"),
        ('later.nowhere = """\n    from .nowhere import it"""', "takes this text for an import"),
        ("import parts", "it imports the folder parts, which does not travel"),
        ("pass; from .more import x", "transformers does not see this import"),
    ],
)
def test_what_could_not_be_loaded_elsewhere_is_refused_with_its_line(line: str, why: str, tmp_path: Path) -> None:
    model = patch_model(bert(), written(tmp_path / "code", f"{NORMS}\n# {line.splitlines()}\n"))
    path = tmp_path / "code" / "my_norms.py"
    (path.parent / "parts").mkdir()
    (path.parent / "parts" / "__init__.py").touch()
    path.write_text(f"{NORMS}\n\ndef later():\n    {line}\n")
    number = len(NORMS.splitlines()) + 4 + line.count("\n")
    with pytest.raises(ValueError, match=rf"my_norms\.py, line {number}: .*{re.escape(why)}"):
        travel.check_file("bounded", path)
    with pytest.raises(ValueError, match="another version"):  # the file was changed since the model was patched
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()


def test_a_class_without_a_file_works_in_memory_and_is_refused_on_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = written(tmp_path / "code")
    monkeypatch.setattr(cls, "__module__", "__main__")
    model = patch_model(bert(), cls)
    output(model)
    with pytest.raises(ValueError, match=r"Move it to a file such as my_norms\.py"):
        model.save_pretrained(tmp_path)


def test_a_norm_of_a_registered_class_that_was_put_in_by_hand_is_refused_on_saving(tmp_path: Path) -> None:
    cls = written(tmp_path / "code")
    register_norm("bounded", cls)
    model = bert()
    model.embeddings.LayerNorm = cls(16)
    told = r"embeddings\.LayerNorm is a BoundedRMSNorm .* include='embeddings.LayerNorm'"
    with pytest.raises(ValueError, match=told):
        model.save_pretrained(tmp_path / "saved")


def test_the_report_tells_our_files_from_changed_ones_and_names_the_authors(tmp_path: Path) -> None:
    model, saved = trained(tmp_path / "code"), tmp_path / "saved"
    model.save_pretrained(saved)
    spec = AdaNormSpec.from_dict(model.config.adanorm)
    report = inspect_code(saved, spec)
    assert (report.loader, report.entry, report.files) == ("ours", "ours", report.expected)
    assert set(report.files) == {"helpers.py", "my_norms.py"}
    for path in saved.glob("*.py"):
        path.write_text(path.read_text() + "\nimport os\n")
    report = inspect_code(saved, spec)
    assert (report.loader, report.entry) == ("modified", "modified")
    assert not report.files.items() & report.expected.items()
    assert inspect_code(tmp_path / "code").loader == "none"
