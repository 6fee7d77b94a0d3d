"""The model types of today, tiny: patch, train, generate, save, load with and without the package, fold."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from hf_adanorm import fold_affine, inspect_model, patch_model
from tests.zoo.processes import Scripts, together
from tests.zoo.tiny_inputs import tensors
from tests.zoo.todays_models import TODAY, build, output

ROOT = Path(__file__).parents[2]
LOAD = """
import json, sys, torch, transformers
from pathlib import Path
from tests.zoo.todays_models import output
torch.set_num_threads(1)
folder = Path(sys.argv[1])
expected = torch.load(folder / "expected.pt", weights_only=False)
options = {"trust_remote_code": expected["trust"], "attn_implementation": "eager", "dtype": "float32"}
auto_map = json.loads((folder / "config.json").read_text()).get("auto_map", {})
by_trust = (name for name, code in auto_map.items() if "Model" in name and code.endswith(expected["class"]))
cls = getattr(transformers, next(by_trust) if expected["trust"] else expected["class"])
found = output(cls.from_pretrained(folder, **options).eval(), expected["inputs"])
print(float((found - expected["output"]).abs().max() / expected["output"].abs().max()))
"""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save(model: Any, inputs: dict[str, Any], folder: Path, *, trust: bool) -> None:
    model.save_pretrained(folder)
    kept = {"class": type(model).__name__, "trust": trust, "inputs": inputs, "output": output(model, inputs)}
    torch.save(kept, folder / "expected.pt")


def train_one_step(model: Any, inputs: dict[str, Any]) -> None:
    labels = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    with_labels = {**inputs, "labels": labels} if "For" in type(model).__name__ else inputs
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = model.train()(**with_labels)
    loss = getattr(found, "loss", None)
    if loss is None:
        loss = torch.stack([t.float().square().mean() for t in tensors(found) if t.requires_grad]).sum()
    loss.backward()
    optimizer.step()
    assert bool(loss.isfinite())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    model.eval()


@pytest.mark.parametrize("model_type", TODAY)
def test_patch_train_generate_save_load(model_type: str, tmp_path: Path, elsewhere: Scripts) -> None:
    model, inputs = build(model_type)
    report, before = inspect_model(model), output(model, inputs)
    assert (report.num_swappable, report.num_skipped) == (TODAY[model_type].swapped, TODAY[model_type].skipped)
    patch_model(model, "adanorm", k=0.05)
    assert inspect_model(model).num_swapped == report.num_swappable
    assert not torch.allclose(output(model, inputs), before, rtol=1e-3)
    patched = output(model, inputs)
    train_one_step(model, inputs)
    assert not torch.equal(output(model, inputs), patched)
    if model.can_generate():
        prompt = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
        assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[-1] > 1
    save(model, inputs, tmp_path, trust=True)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager", dtype="float32")
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), rtol=1e-5, atol=1e-6)
    assert float(elsewhere.run_code(LOAD, tmp_path).stdout) < 1e-5


@pytest.mark.parametrize("model_type", TODAY)
def test_fold(model_type: str, tmp_path: Path, elsewhere: Scripts) -> None:
    """Fold, save, and load without the package: as a stock model, or by trust where swapped norms are left."""
    model, inputs = build(model_type)
    before = output(model, inputs)
    report = fold_affine(model, inputs=inputs)
    assert len(report.names("folded")) == TODAY[model_type].folded
    assert float((output(model, inputs) - before).abs().max() / before.abs().max()) < 1e-5
    save(model, inputs, tmp_path, trust=not report.is_stock)
    assert float(elsewhere.run_code(LOAD, tmp_path).stdout) < 1e-5


def test_the_support_table_lists_these_counts() -> None:
    text = (ROOT / "docs" / "support.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9_]+)`[^|]*\| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert {name: tuple(map(int, counts)) for name, *counts in rows} == {
        name: (today.swapped, today.skipped, today.folded) for name, today in TODAY.items()
    }


def _run_sharded(folder: str) -> None:
    expected = torch.load(Path(folder) / "expected.pt", weights_only=False)
    model = transformers.Qwen3ForCausalLM.from_pretrained(folder, tp_plan="auto", dtype="float32")
    assert model.model.layers[0].self_attn.q_proj.weight.placements[0].is_shard()
    torch.testing.assert_close(output(model, expected["inputs"]), expected["output"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="sharded"):
        fold_affine(model)
    dist.barrier()


def test_tensor_parallel_plans_that_name_norms(tmp_path: Path) -> None:
    """Qwen3's plan names query and key norms. A patched model loads sharded; a fold of one is refused."""
    model, inputs = build("qwen3")
    plan = model.config.base_model_tp_plan
    assert any("q_norm" in name for name in plan)
    patch_model(model, "adanorm", k=0.05, targets="all")
    save(model, inputs, tmp_path / "model", trust=True)
    assert "q_norm" in json.dumps(json.loads((tmp_path / "model" / "config.json").read_text()))
    together(_run_sharded, tmp_path, str(tmp_path / "model"))
