"""watch_norms against statistics computed by hand in float64, and in every way a model is trained."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from hf_adanorm import AdaNorm, DetachNorm, LayerNormSimple, NoNorm, WatchNormsCallback, patch_model, watch_norms
from hf_adanorm.diagnostics.log import FIELDS, HISTOGRAM_BINS
from tests.zoo.classifier import batch, bert
from tests.zoo.processes import together

WIDTH, ROWS = 24, 40


def train(model, steps: int = 1, accumulate: int = 1, optimizer=None) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    for step in range(steps):
        for micro in range(accumulate):
            model(**batch(step * accumulate + micro)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def num_hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


# ------------------------------------------------------------------------------------------------ the numbers


def reference(norm: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> dict[str, float]:
    """Return all statistics of one norm, computed from the definitions in float64."""
    x, grad = x.double(), grad.double()
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    center = 0 if isinstance(norm, nn.RMSNorm) else mean
    sigma = ((x - center).square().mean(-1, keepdim=True) + norm.eps).sqrt()
    y = (x - center) / sigma
    leaf = x.clone().requires_grad_(True)
    copy.deepcopy(norm).double()(leaf).backward(grad)
    dx = leaf.grad
    k = getattr(norm, "k", 0.1)
    dy = grad * (
        norm.C * (1 - k * y) if isinstance(norm, AdaNorm) else getattr(norm, "weight", torch.ones(())).double()
    )
    out = {
        "input_mean": x.mean(),
        "input_std": var.sqrt().mean(),
        "share_negative": (y >= 1 / k).double().mean(),
        "share_falling": (y > 1 / (2 * k)).double().mean(),
        "grad_output_mean": grad.mean(-1).abs().mean(),
        "grad_output_var": grad.var(-1, correction=0).mean(),
        "grad_detached_mean": (dy.mean(-1).abs() / sigma[:, 0]).mean(),
        "grad_detached_var": (dy.var(-1, correction=0) / sigma[:, 0].square()).mean(),
        "grad_input_mean": dx.mean(-1).abs().mean(),
        "grad_input_var": dx.var(-1, correction=0).mean(),
    }
    return {name: value.item() for name, value in out.items()}


def stock_norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    return norm


NORMS = {
    "layernorm": stock_norm,
    "rmsnorm": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
    "bfloat16": lambda: LayerNormSimple(WIDTH, dtype=torch.bfloat16),
    "channels-first": lambda: AdaNorm(WIDTH, channels_first=True),
    "adanorm": lambda: AdaNorm(WIDTH, C=1.5, k=0.3),
    "layernorm-simple": lambda: LayerNormSimple(WIDTH),
    "detachnorm": lambda: DetachNorm(WIDTH),
    "mean-detached": lambda: DetachNorm(WIDTH, detach_variance=False),
    "variance-detached": lambda: DetachNorm(WIDTH, detach_mean=False),
}


def record_alone(norm: nn.Module, x: torch.Tensor, grad: torch.Tensor, **options):
    with watch_norms(nn.Sequential(norm), every=1, **options) as log:
        # x + 0 has a gradient and another reader: a residual connection must not show in the norm's own gradient.
        leaf = x.clone().requires_grad_(True)
        inner = leaf + 0
        torch.autograd.backward([norm(inner), 3 * inner], [grad, torch.ones_like(x)])
    return log


@pytest.mark.parametrize("name", NORMS)
def test_statistics_are_those_of_the_definitions(name):
    torch.manual_seed(1)
    norm = NORMS[name]()
    x = 2 * torch.randn(ROWS, WIDTH) + torch.randn(ROWS, 1)
    x[:4, 0] += 30
    grad = 1e-3 * (torch.randn(ROWS, WIDTH) + 0.5)
    if name == "bfloat16":
        x, grad = x.bfloat16(), grad.bfloat16()
    rows = [t.view(2, 5, 4, WIDTH).movedim(-1, 1) if name == "channels-first" else t for t in (x, grad)]
    (record,) = record_alone(norm, *rows).records
    expected = reference(AdaNorm(WIDTH) if name == "channels-first" else norm, x, grad)
    assert record.num_rows == ROWS
    for field, value in expected.items():
        if name == "bfloat16" and field.startswith("grad_input"):
            continue  # dl/dx has been rounded to bfloat16
        assert getattr(record, field) == pytest.approx(value, rel=2e-4, abs=2e-9), field
    assert expected["share_falling"] > expected["share_negative"] or name != "adanorm"


def test_without_a_norm_the_gradient_passes_unchanged():
    x, grad = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    (record,) = record_alone(NoNorm(WIDTH), x, grad).records
    assert record.norm == "none"
    assert record.grad_input_var == record.grad_output_var
    assert record.grad_detached_var != record.grad_detached_var  # NaN: there is no y


def test_histogram_counts_every_value_of_y():
    x = torch.randn(ROWS, WIDTH)
    log = record_alone(AdaNorm(WIDTH), x, torch.ones(ROWS, WIDTH), histogram=True)
    counts = log.histograms["0"]
    assert counts.shape == (HISTOGRAM_BINS,)
    assert counts.sum() == ROWS * WIDTH
    y = nn.functional.layer_norm(x, (WIDTH,))
    assert counts[HISTOGRAM_BINS // 2 :].sum() == int((y >= 0).sum())


# ------------------------------------------------------------------------------------------------ steps and hooks


def test_records_every_nth_step_from_the_first():
    model = bert("adanorm")
    with watch_norms(model, every=3) as log:
        train(model, steps=7)
    assert log.steps == [1, 4, 7]
    assert log.values("grad_input_var").shape == (3, 7)
    assert torch.isfinite(log.values("grad_input_var")).all()


def test_no_hooks_between_recorded_steps_or_afterwards():
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with suppress(RuntimeError), watch_norms(model, every=3):
        assert num_hooks(model) > 0
        train(model, 1, optimizer=optimizer)
        assert num_hooks(model) == 0
        train(model, 2, optimizer=optimizer)
        assert num_hooks(model) > 0
        raise RuntimeError  # leaves nothing behind either
    assert num_hooks(model) == 0
    assert not _global_optimizer_post_hooks


def test_training_is_not_changed_by_watching():
    plain, watched = bert("adanorm"), bert("adanorm")
    train(plain, 3)
    with watch_norms(watched, every=1):
        train(watched, 3)
    torch.testing.assert_close(list(plain.parameters()), list(watched.parameters()))


def test_evaluation_is_not_recorded():
    model = bert()
    with watch_norms(model, every=1) as log, torch.no_grad():
        model.eval()(**batch())
    assert log.records == []


def test_accumulated_micro_batches_are_one_step():
    """The row averages of a step of two micro-batches are the mean of those of each alone."""
    together, first, second = bert("adanorm"), bert("adanorm"), bert("adanorm")
    with watch_norms(together, every=1) as log:
        train(together, steps=1, accumulate=2)
    parts = []
    for model, seed in ((first, 0), (second, 1)):
        with watch_norms(model, every=1) as part:
            model.train()(**batch(seed)).loss.backward()
        parts.append(part)
    assert log.steps == [1]
    assert log.records[0].num_rows == 2 * parts[0].records[0].num_rows
    for field in ("input_std", "grad_output_var", "grad_input_var"):
        mean = (parts[0].values(field) + parts[1].values(field)) / 2
        torch.testing.assert_close(log.values(field), mean, rtol=1e-5, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_does_not_count_twice(use_reentrant):
    plain, checkpointed = bert("adanorm"), bert("adanorm")
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    logs = []
    for model in (plain, checkpointed):
        with watch_norms(model, every=1, histogram=True) as log:
            train(model, steps=2)
        logs.append(log)
    assert logs[0].names == logs[1].names
    assert [r.num_rows for r in logs[0].records] == [r.num_rows for r in logs[1].records]
    for field in FIELDS:
        rounding = 1e-6 if field == "grad_input_mean" else 1e-12  # the former is zero except for rounding
        torch.testing.assert_close(logs[0].values(field), logs[1].values(field), rtol=1e-4, atol=rounding)
    for name in logs[0].names:  # rounding moves a value at an edge to the next bin
        torch.testing.assert_close(logs[0].histograms[name], logs[1].histograms[name], rtol=0, atol=1)


def test_names_come_in_the_order_in_which_the_norms_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first, self.linear = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.linear(self.first(x)))

    model = Backwards()
    with watch_norms(model) as log:
        model(torch.randn(3, 4)).square().sum().backward()
    assert log.names == ["first", "second"]
    assert log.records[0].grad_input_var != log.records[0].grad_input_var  # NaN: the input has no gradient


def test_a_shared_norm_counts_every_call():
    norm = nn.LayerNorm(4)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm)
    with watch_norms(model) as log:
        model(torch.randn(5, 4)).square().sum().backward()
    assert [record.num_rows for record in log.records] == [10]


def test_two_optimizers_of_one_model_are_one_step():
    model = bert()
    head, rest = list(model.classifier.parameters()), list(model.bert.parameters())
    optimizers = [torch.optim.SGD(p, lr=1e-3) for p in (rest, head)]
    with watch_norms(model, every=1) as log:
        for step in range(2):
            model.train()(**batch(step)).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
    assert log.steps == [1, 2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 2.5}, TypeError, "every must be an integer"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"k": 0.0}, ValueError, "k must be a finite number > 0"),
        ({"model": "bert"}, TypeError, "model must be"),
        ({"model": nn.Linear(2, 2)}, ValueError, "has no LayerNorm"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message), watch_norms(**{"model": bert(), **options}):
        pass


def test_steps_can_be_ended_by_hand():
    model, other = bert(), nn.Linear(2, 2)
    with watch_norms(model, every=2, start_step=10) as log:
        for seed in range(3):
            model.train()(**batch(seed)).loss.backward()
            torch.optim.SGD(other.parameters(), lr=0.1).step()  # of another model: it ends no step
            log.end_step()
    assert log.steps == [11, 13]
    with pytest.raises(RuntimeError, match="outside"):
        log.end_step()
    with pytest.raises(ValueError, match="no statistic 'variance'"):
        log.values("variance")


def test_a_model_patched_while_it_is_watched_is_looked_at_again():
    model = bert()
    with watch_norms(model, every=1) as log:
        train(model, 1)
        patch_model(model, "detachnorm")
        train(model, 2)
    # the step in which it happened is left out
    assert [(r.step, r.norm) for r in log.records] == [(1, "layernorm")] * 7 + [(3, "detachnorm")] * 7


class Shifted(nn.Module):
    """A user's norm that does not tell what it computes."""

    def __init__(self, normalized_shape, eps=1e-5, *, shift=0.5):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        return x - self.shift


def test_a_class_that_declares_nothing_lacks_only_the_statistics_of_y():
    model = patch_model(bert(), Shifted)
    with watch_norms(model) as log:
        train(model, 1)
    shown = {field for field in FIELDS if log.values(field).isfinite().any()}
    assert shown == {"input_mean", "input_std", "grad_output_mean", "grad_output_var", *FIELDS[-2:]}
    assert str(log).endswith("nan: nothing to measure; statistics of y need a class with `plain_settings`")
    stock = bert()
    with watch_norms(stock) as log:
        train(stock, 1)
    assert "nan" not in str(log)


# ------------------------------------------------------------------------------------------------------- the log


def test_scalars_and_rows_go_to_json():
    model = bert("adanorm")
    with watch_norms(model, every=1) as log:
        train(model, 2)
    rows = json.loads(json.dumps(log.to_rows()))
    assert [row["step"] for row in rows] == [1] * 7 + [2] * 7
    scalars = log.scalars()
    name = "bert.encoder.layer.0.output.LayerNorm"
    assert scalars[f"norms/grad_input_var/{name}"] == next(
        row["grad_input_var"] for row in rows if row["name"] == name and row["step"] == 2
    )
    assert log.scalars(1) != scalars
    assert name in str(log)


# ------------------------------------------------------------------------------------------- compile, Trainer, DDP


def test_compiled_models_run_recorded_steps_eagerly():
    eager, compiled = bert("adanorm"), bert("adanorm")
    wrapper = torch.compile(compiled, backend="eager")
    with watch_norms(eager, every=2) as expected:
        train(eager, 3)
    with watch_norms(wrapper, every=2) as log:
        train(wrapper, 3)
    assert log.steps == [1, 3]
    assert log.names == expected.names
    torch.testing.assert_close(log.values("grad_input_var"), expected.values("grad_input_var"), rtol=1e-3, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # the step between them was compiled


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        item = batch(i, 1)
        return {"input_ids": item["input_ids"][0], "labels": item["labels"][0]}


def test_trainer_callback_records_and_reaches_the_trackers(tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))

    # The distributed worker, which imports this file, needs neither.
    from transformers import Trainer, TrainingArguments

    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5}
    quiet = {"disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), report_to=["tensorboard"], **sizes, **quiet)
    trainer = Trainer(model=bert("adanorm"), args=arguments, train_dataset=Sentences())
    callback = WatchNormsCallback(trainer, every=2)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.log.steps == [1, 3, 5]
    assert callback.log.records[0].num_rows == 2 * 2 * 8
    assert num_hooks(trainer.model) == 0
    (folder,) = {path.parent for path in (tmp_path / "events").rglob("events.out.tfevents.*")}
    events = tensorboard.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    name = "train/norms/grad_input_var/bert.encoder.layer.0.output.LayerNorm"
    assert [event.step for event in events.Scalars(name)] == [1, 3, 5]
    assert not any("norms/" in key for entry in trainer.state.log_history for key in entry)


def watched_together(folder: Path) -> None:
    rank = dist.get_rank()
    wrapped = nn.parallel.DistributedDataParallel(bert("adanorm").train())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-3)
    with watch_norms(wrapped, every=2, histogram=True) as log:
        for step in range(3):
            wrapped(**batch(10 * step + rank, 2 + 2 * rank)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    counts = [[int(h.sum()) for h in part.histograms.values()] for part in (log, log.gather())]
    found = {"hooks": num_hooks(wrapped), "own": log.to_rows(), "merged": log.gather().to_rows(), "counts": counts}
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_distributed_processes_record_their_rows_and_join_them(tmp_path):
    together(watched_together, tmp_path, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["hooks"] == 0
    assert first["merged"] == second["merged"]
    for one, other, both in zip(first["counts"][0], second["counts"][0], first["counts"][1], strict=True):
        assert both == one + other > one
    assert [row["name"] for row in first["own"]] == [row["name"] for row in first["merged"]]
    assert {row["step"] for row in first["own"]} == {1, 3}
    assert not any(row["name"].startswith("module.") for row in first["own"])
    for a, b, both in zip(first["own"], second["own"], first["merged"], strict=True):
        assert (a["num_rows"], b["num_rows"], both["num_rows"]) == (16, 32, 48)
        assert both["grad_input_var"] == pytest.approx((a["grad_input_var"] + 2 * b["grad_input_var"]) / 3)
