"""Every model type in transformers' auto mappings: build tiny, patch, run, save, load elsewhere, compare, undo.

    OMP_NUM_THREADS=1 python tests/campaigns/sweep.py --out sweep.csv
    OMP_NUM_THREADS=1 python tests/campaigns/sweep.py --out few.csv --types bert,clip
    python tests/campaigns/sweep.py --out sweep.csv --support docs/support.csv

All types take about half an hour; a second call resumes. For each type, one process builds a tiny model with random
gains and biases and saves it as an unpatched control. It counts the mean-subtracting norms by a probe of the whole
model (`norm_census`), patches (C = 1.3, k = 0.07, eps = 2e-5), runs forward and backward, and saves. Then it unpatches
and compares with the original bit for bit. A second process, in which nothing was patched, loads control and patched
model with stock `from_pretrained` and compares weights, norm settings and outputs. If the control itself does not
reload bit for bit, the patched model may be as far off. `patch_model` uses its defaults: the norms on the residual
stream. Those inside a branch count as explained.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from torch import Tensor

from hf_adanorm import inspect_model, patch_model, unpatch_model
from hf_adanorm.detection import NormInfo
from hf_adanorm.modeling_adanorm import is_swapped
from hf_adanorm.report import NormRow
from tests.zoo import tiny_inputs, tiny_models
from tests.zoo.norm_census import census
from tests.zoo.tiny_inputs import tensors

SETTINGS: dict[str, Any] = {"C": 1.3, "k": 0.07, "eps": 2e-5}
TRAIN_ONLY = ("reformer", "rwkv")  # no backward pass in eval mode
KINDS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
BOTH = "LayerNorm, RMSNorm"
MAX_PARAMETERS = 30_000_000
STAGES = ("built", "forward before", "forward after", "backward", "saved", "round trip", "unpatch")
FIELDS = ["model_type", "class", "way", "parameters", "kinds", *STAGES, "counted", "swapped", "exercised",
          "explained", "skipped", "missed", "changed", "control exact", "seconds", "cpu seconds", "failed at",
          "reason", "inputs", "norms"]  # fmt: skip


class FailedError(Exception):
    """Raised when a stage goes wrong, with its name and what happened."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


# --- one type --------------------------------------------------------------------------------------------------------


def find_runnable(model_type: str, row: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return the first class, and way to shrink it, that builds and runs."""
    ways = list(tiny_models.configs(model_type))
    num_classes = len(tiny_models.model_classes(model_type, ways[0][1]))
    if not num_classes:
        raise FailedError("built", "no class of its own in transformers")
    reasons: list[str] = []
    for index in range(min(num_classes, 4)):
        for way, fresh in ways:
            config = copy.deepcopy(fresh)
            cls = tiny_models.model_classes(model_type, config)[index]
            try:
                config = type(config).from_dict(config.to_dict())  # as it will be after saving
                size = tiny_models.num_parameters(cls, config)
                if size > MAX_PARAMETERS:
                    reasons.append(f"{cls.__name__} ({way}) has {size / 1e6:.0f}M parameters")
                    continue
                model = tiny_models.build(cls, config)
                row["built"] = "yes"
                inputs, _ = tiny_inputs.run(model)
            except Exception as error:
                reasons.append(f"{cls.__name__} ({way}): {_short(error)}")
                continue
            row |= {"class": cls.__name__, "way": way, "parameters": size, "forward before": "yes"}
            row["inputs"] = " ".join(inputs)
            return model, inputs
    raise FailedError("forward before" if row.get("built") else "built", reasons[0])


def _short(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" at {Path(frame.filename).name}:{frame.lineno}" if frame else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


def forward(model: torch.nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Return all floating tensors that the model returns, with every random draw seeded."""
    torch.manual_seed(0)
    with torch.no_grad():
        return [t.detach().clone() for t in tensors(model(**copy.deepcopy(inputs)))]


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """Return the largest difference: inf if shapes differ, 0 where both hold the same non-finite value."""
    if [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if a.numel() == 0 or torch.equal(a, b):
            continue
        gap = (a.double() - b.double()).abs()
        gap[(a == b) | (a.isnan() & b.isnan())] = 0
        worst = max(worst, float(gap.nan_to_num(nan=float("inf")).max()))
    return worst


def norm_settings(model: torch.nn.Module) -> dict[str, str]:
    """Return name and all settings of every swapped norm."""
    return {name: str(module) for name, module in model.named_modules() if is_swapped(module)}


def formula(info: NormInfo) -> str:
    if info.kind == "other":
        return f"skipped: {info.reason}"
    gain = "" if not info.gain_name else "w * " if not info.gain_offset else "(1 + w) * "
    value = "(x - mean) / sqrt(var + eps)" if info.kind == "layernorm" else "x / sqrt(mean(x^2) + eps)"
    return gain + value + (" + b" if info.bias_name else "") + (", channels first" if info.channels_first else "")


def stage(name: str, row: dict[str, Any], action: Callable[[], Any]) -> Any:
    try:
        result = action()
    except FailedError:
        raise
    except Exception as error:
        raise FailedError(name, _short(error)) from error
    row[name] = "yes"
    return result


def patch_and_save(model_type: str, folder: Path, row: dict[str, Any]) -> None:
    """Run the first process: everything up to saving, and the undo."""
    model, inputs = find_runnable(model_type, row)
    original = forward(model, inputs)
    noise = distance(original, forward(model, inputs))
    state = {k: v.clone() for k, v in model.state_dict().items()}

    found, ran = census(model, lambda: model(**copy.deepcopy(inputs)))
    rows = inspect_model(model).rows
    row["norms"] = json.dumps(sorted({(type(r.module).__name__, formula(r.info)) for r in rows}))
    kinds = {r.kind for r in rows if r.chosen}
    row |= {"kinds": ", ".join(name for kind, name in KINDS.items() if kind in kinds), "counted": len(found)}
    if not kinds:
        _check_count(found, ran, set(), rows, row)
        return

    before: int | str
    try:
        before = backward(model, inputs)
    except Exception as error:
        before = _short(error)
    model.save_pretrained(folder / "control")
    stage("forward after", row, lambda: patch_model(model, "adanorm", **SETTINGS))
    settings = norm_settings(model)
    row |= {"swapped": len(settings), "exercised": len(ran & set(settings))}
    _check_count(found, ran, set(settings), rows, row)
    patched = stage("forward after", row, lambda: forward(model, inputs))
    row["changed"] = "yes" if distance(original, patched) > 10 * noise else "no"
    stage("backward", row, lambda: check_backward(model, inputs, before))
    stage("saved", row, lambda: model.save_pretrained(folder / "patched"))
    torch.save(
        {"inputs": inputs, "patched": patched, "original": original, "noise": noise, "settings": settings,
         "state": dict(model.state_dict()), "control_state": state},
        folder / "expected.pt",
    )  # fmt: skip

    def undo() -> None:
        unpatch_model(model)
        after = model.state_dict()
        if list(after) != list(state) or any(not torch.equal(after[k], v) for k, v in state.items()):
            raise FailedError("unpatch", "weights differ from the original's")
        if (gap := distance(original, forward(model, inputs))) > noise:
            raise FailedError("unpatch", f"outputs differ from the original's by {gap:.1e}")

    stage("unpatch", row, undo)


def _check_count(
    found: set[str], ran: set[str], swapped: set[str], rows: Sequence[NormRow], row: dict[str, Any]
) -> None:
    """Check that swapped and explained norms are all there are, and that nothing else was swapped."""
    explained = {r.name for r in rows if r.reason} & found - swapped
    missed = sorted(found - swapped - explained)
    wrong = sorted({r.name for r in rows if r.kind == "layernorm"} & swapped & ran - found)
    skipped = sum(r.cause == "branch" for r in rows)
    row |= {"explained": len(explained), "missed": " ".join(missed), "skipped": skipped}
    if missed:
        raise FailedError("forward after", f"not recognized: {missed[:3]}")
    if wrong:
        raise FailedError("forward after", f"swapped, though the probe says they subtract no mean: {wrong[:3]}")


def backward(model: torch.nn.Module, inputs: dict[str, Any]) -> int:
    """Run a backward pass through all outputs and return the number of gradients that are not finite."""
    torch.manual_seed(0)
    model.requires_grad_(True)
    model.train(model.config.model_type in TRAIN_ONLY)
    try:
        outputs = [t for t in tensors(model(**copy.deepcopy(inputs))) if t.requires_grad]
        if not outputs:
            raise FailedError("backward", "no output requires a gradient")
        finite = [t.nan_to_num(posinf=0, neginf=0) for t in outputs]
        torch.stack([t.square().mean() for t in finite]).sum().backward()
    finally:
        model.eval()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    if not grads:
        raise FailedError("backward", "no parameter received a gradient")
    return sum(not bool(torch.isfinite(g).all()) for g in grads)


def check_backward(model: torch.nn.Module, inputs: dict[str, Any], before: int | str) -> None:
    """Check that the patched model trains if the unpatched one does."""
    try:
        bad = backward(model, inputs)
    except Exception as error:
        if isinstance(before, str):
            raise FailedError("backward", f"unpatched neither: {before}") from error
        raise
    if isinstance(before, str) or bad > before:
        raise FailedError("backward", f"{bad} gradients are not finite (unpatched: {before})")


def load_and_compare(folder: Path, row: dict[str, Any]) -> None:
    """Run the second process: stock loading of control and patched model."""
    expected = torch.load(folder / "expected.pt", weights_only=False)

    def compare() -> None:
        config = transformers.AutoConfig.from_pretrained(folder / "control")
        cls = next(c for c in tiny_models.model_classes(config.model_type, config) if c.__name__ == row["class"])
        options = {"attn_implementation": "eager", "dtype": torch.float32}
        try:
            control = cls.from_pretrained(folder / "control", **options).eval()
        except Exception as error:
            raise FailedError("round trip", f"the unpatched control does not load either: {_short(error)}") from error
        patched = cls.from_pretrained(folder / "patched", **options).eval()
        control_gap = distance(expected["original"], forward(control, expected["inputs"]))
        row["control exact"] = "yes" if control_gap == 0 else f"{control_gap:.1e}"
        if norm_settings(patched) != expected["settings"]:
            raise FailedError("round trip", "norm settings differ")
        off_in_control = _differing(control.state_dict(), expected["control_state"])
        off = [k for k in _differing(patched.state_dict(), expected["state"]) if k not in off_in_control]
        if off:
            raise FailedError("round trip", f"weights differ: {off[:3]}")
        gap = distance(expected["patched"], forward(patched, expected["inputs"]))
        if gap > max(10 * control_gap, expected["noise"]):
            raise FailedError(
                "round trip", f"outputs differ by {gap:.1e} (the unpatched control's by {control_gap:.1e})"
            )

    stage("round trip", row, compare)


def _differing(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    keys = set(state) ^ set(expected)
    same = (k for k in state.keys() & expected.keys())
    return sorted(keys | {k for k in same if not _same(state[k], expected[k])})


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def warm_up() -> None:
    """Build, save and load an unpatched model here, so that the forked processes inherit what that imports."""
    import transformers.modelcard  # writing a patched model's card takes it, and with it the Trainer, peft ...

    config = next(config for _, config in tiny_models.configs("bert"))
    model = tiny_models.build(transformers.BertModel, config)
    inputs, _ = tiny_inputs.run(model)
    sum(t.sum() for t in tensors(model(**inputs))).backward()  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        transformers.AutoModel.from_pretrained(folder)


# --- processes -------------------------------------------------------------------------------------------------------


def in_fork(action: Callable[[dict[str, Any]], None], row: dict[str, Any], seconds: int) -> None:
    """Run `action(row)` in a forked process with a time limit, and update `row` with what it wrote.

    The parent has imported everything and never patches, so a child is as fresh as a new interpreter.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # CPU time: a busy machine does not count
        signal.alarm(20 * seconds)
        try:
            action(row)
        except FailedError as failure:
            row |= {"failed at": failure.stage, "reason": str(failure)}
        except BaseException as error:
            row |= {"failed at": _next_stage(row), "reason": _short(error)}
        with os.fdopen(write, "w") as stream:
            json.dump(row, stream)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    _, status, usage = os.wait4(child, 0)
    if text:
        row |= json.loads(text)
    else:
        late = os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGPROF)
        cause = f"took longer than {seconds} s" if late else f"died with status {status}"
        row |= {"failed at": _next_stage(row), "reason": cause}
    row["cpu seconds"] = round(row.get("cpu seconds", 0) + usage.ru_utime + usage.ru_stime, 1)


def _next_stage(row: dict[str, Any]) -> str:
    return next((name for name in STAGES if not row.get(name)), STAGES[-1])


def sweep_type(model_type: str, seconds: int) -> dict[str, Any]:
    """Return one row of the table."""
    start = time.time()
    row: dict[str, Any] = {"model_type": model_type}
    folder = Path(tempfile.mkdtemp(prefix="sweep_"))
    try:
        in_fork(lambda r: patch_and_save(model_type, folder, r), row, seconds)
        if row.get("saved"):
            failed = {k: row.pop(k) for k in ("failed at", "reason") if k in row}
            in_fork(lambda r: load_and_compare(folder, r), row, seconds)
            row |= failed
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    row["seconds"] = round(time.time() - start, 1)
    return row


# --- the table -------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    with path.open(newline="") as stream:
        return {row["model_type"]: dict.fromkeys(FIELDS, "") | row for row in csv.DictReader(stream)}


def write_rows(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, restval="")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))
    partial.replace(path)


def result(row: dict[str, Any]) -> str:
    """Return what a type came to, in the words of the support table."""
    if row["failed at"]:
        return f"stops at: {row['failed at']}"
    if not row["kinds"]:
        return "nothing to swap"
    return "verified (no norm reached)" if row["changed"] == "no" and row["exercised"] in ("", "0") else "verified"


def write_support(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write the support table of the documentation, one line per type."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["type", "norms", "swapped", "skipped", "result", "cause"])
        for name in sorted(rows, key=str.lower):
            row = rows[name]
            norms = row["kinds"].replace(",", " and")
            norms = norms if norms or row["failed at"] else "neither"
            writer.writerow([name, norms, row["swapped"], row["skipped"], result(row), row["reason"][:200]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file, read back to resume")
    parser.add_argument("--types", help="comma-separated model types; default: all")
    parser.add_argument("--seconds", type=int, default=30, help="CPU time limit of each of a type's two processes")
    parser.add_argument("--support", type=Path, help="write the support table of the documentation there")
    args = parser.parse_args()

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    rows = read_rows(args.out)
    todo = args.types.split(",") if args.types else tiny_models.model_types()
    if unknown := sorted(set(todo) - set(tiny_models.model_types())):
        parser.error(f"not a model type of transformers {transformers.__version__}: {unknown}")
    warm_up()
    for model_type in todo:
        if model_type in rows:
            continue
        row = rows[model_type] = dict.fromkeys(FIELDS, "") | sweep_type(model_type, args.seconds)
        write_rows(args.out, rows)
        verdict = (
            f"{row['failed at']}: {row['reason'][:160]}" if row["failed at"] else f"{row['swapped'] or 0} swapped"
        )
        print(f"{model_type:34s} {row['seconds']:5.1f} s  {row['class']:40s} {verdict}", flush=True)
    for text, count in Counter(map(result, rows.values())).most_common():
        print(f"{count:4d} {text}")
    if args.support:
        write_support(args.support, rows)


if __name__ == "__main__":
    main()
