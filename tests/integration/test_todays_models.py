"""The model types of today, tiny: patch, train, generate, save, load with and without the package, fold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from hf_adanorm import fold_affine, inspect_model, patch_model
from tests.zoo.processes import together
from tests.zoo.tiny_inputs import tensors
from tests.zoo.todays_models import TODAY, build, output

ROOT = Path(__file__).parents[2]
WITHOUT_PACKAGE = """
import json, sys, torch, transformers
from pathlib import Path
sys.modules["hf_adanorm"] = None  # cannot be imported
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
for folder in sorted(Path(sys.argv[1]).iterdir()):
    expected = torch.load(folder / "expected.pt", weights_only=False)
    options = {"trust_remote_code": expected["trust"], "attn_implementation": "eager", "dtype": "float32"}
    auto_map = json.loads((folder / "config.json").read_text()).get("auto_map", {})
    by_trust = (name for name, code in auto_map.items() if "Model" in name and code.endswith(expected["class"]))
    cls = getattr(transformers, next(by_trust) if expected["trust"] else expected["class"])
    model = cls.from_pretrained(folder, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        found = model.eval()(**expected["inputs"])
    found = next(found[name] for name in ("logits", "logits_per_image", "last_hidden_state") if name in found)
    error = float((found - expected["output"]).abs().max() / expected["output"].abs().max())
    print(folder.name, "wrong" if not error < 1e-5 else "right", error, flush=True)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which the tests save models and their outputs, for `test_loads_without_the_package`."""
    return tmp_path_factory.mktemp("today")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save(model: Any, inputs: dict[str, Any], folder: Path, *, trust: bool) -> None:
    model.save_pretrained(folder)
    torch.save(
        {"class": type(model).__name__, "trust": trust, "inputs": inputs, "output": output(model, inputs)},
        folder / "expected.pt",
    )


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
def test_patch_train_generate_save_load(model_type: str, folders: Path) -> None:
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
    save(model, inputs, folders / f"{model_type}-patched", trust=True)
    loaded = type(model).from_pretrained(
        folders / f"{model_type}-patched", attn_implementation="eager", dtype="float32"
    )
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", TODAY)
def test_fold(model_type: str, folders: Path) -> None:
    model, inputs = build(model_type)
    before = output(model, inputs)
    report = fold_affine(model, inputs=inputs)
    assert len(report.names("folded")) == TODAY[model_type].folded
    assert float((output(model, inputs) - before).abs().max() / before.abs().max()) < 1e-5
    save(model, inputs, folders / f"{model_type}-folded", trust=not report.is_stock)


def test_loads_without_the_package(folders: Path) -> None:
    """Load by trust where norms are swapped, and as a stock model where everything was folded."""
    assert len(list(folders.iterdir())) == 2 * len(TODAY)
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(folders)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = re.findall(r"^(\S+) (right|wrong) (\S+)$", done.stdout, re.MULTILINE)
    assert [result for result in results if result[1] == "wrong"] == []
    assert len(results) == 2 * len(TODAY)


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
