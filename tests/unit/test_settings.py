"""Settings change at any time, by the constructor's checks, and every kind of saved state restores them."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForMaskedLM, BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_adanorm import AdaNorm, NormSchedule, NormScheduleCallback, patch_model, set_norm


class Scaled(nn.Module):
    """A norm of a user's: `scale` can change, and what depends on it; `start` only starts a parameter."""

    def __init__(self, normalized_shape: Any, eps: float = 1e-5, *, scale: float = 1.0, start: float = 0.5) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        self.scale, self._log, self.start = scale, math.log(scale), start
        self.alpha = nn.Parameter(torch.full((1,), start))
        self.noise = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * math.exp(self._log)


def bert(norm: Any = "adanorm", **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=32, max_position_embeddings=16, **sizes)
    return patch_model(BertForSequenceClassification(config), norm, **settings)


def get(model: nn.Module, name: str = "k") -> set[float]:
    return {module.settings()[name] for module in model.modules() if hasattr(module, "norm_name")}


# ------------------------------------------------------------------------------------------------------ set_norm


def test_it_changes_the_norms_that_are_meant() -> None:
    model = bert()
    assert len(set_norm(model, k=0.05)) == 5
    assert get(model) == {0.05}
    assert len(set_norm(model, include="output.LayerNorm", C=2, k=0.2)) == 4
    assert model.bert.embeddings.LayerNorm.settings() == {"C": 1.0, "k": 0.05}
    assert model.bert.encoder.layer[1].output.LayerNorm.settings() == {"C": 2.0, "k": 0.2}


@pytest.mark.parametrize(
    ("norm", "arguments", "error", "words"),
    [
        ("adanorm", {"k": -1}, ValueError, "k must be .* >= 0, got -1"),
        ("adanorm", {"k": "much"}, ValueError, "k must be a finite number"),
        ("adanorm", {"C": 2.0, "k": math.nan}, ValueError, "k must be"),
        ("adanorm", {"kk": 1}, ValueError, "has no setting 'kk'.*did you mean 'k'"),
        ("adanorm", {"k": 0.1, "include": "nowhere"}, ValueError, "include"),
        ("adanorm", {}, ValueError, "at least one setting"),
        ("layernorm", {"k": 0.1}, ValueError, "no swapped norms: call patch_model first"),
        ("detachnorm", {"detach_variance": False, "detach_mean": False}, ValueError, "nothing is detached"),
        ("layernorm-simple", {"k": 0.1, "include": "LayerNorm"}, ValueError, "has no setting 'k'"),
        ("dyt", {"alpha": 0.7}, ValueError, "alpha .* only starts a parameter"),
        (Scaled, {"start": 0.7}, ValueError, "start .* only starts a parameter"),
        (Scaled, {"scale": -1.0}, ValueError, "scale must be > 0"),
    ],
)
def test_what_it_refuses_changes_nothing(norm: Any, arguments: Any, error: type[Exception], words: str) -> None:
    model = bert(norm)
    before = {name: (dict(vars(module)), repr(module)) for name, module in model.named_modules()}
    with pytest.raises(error, match=words):
        set_norm(model, **arguments)
    assert {name: (dict(vars(module)), repr(module)) for name, module in model.named_modules()} == before


def test_a_norm_of_the_users_changes_with_all_that_depends_on_the_setting() -> None:
    model, state = bert(Scaled), torch.get_rng_state()
    norm = model.bert.embeddings.LayerNorm
    parameter = norm.norm.alpha
    x = torch.randn(2, 16)
    before = norm(x)
    torch.set_rng_state(state)
    set_norm(model, scale=3.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert norm.norm.alpha is parameter
    torch.testing.assert_close(norm(x), 3.0 * before)
    other = bert(Scaled)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.bert.embeddings.LayerNorm(x), norm(x))


# ------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_pretrained_holds_them_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    model = bert().to(dtype)
    set_norm(model, k=1 / 30, C=1.1)
    model.save_pretrained(tmp_path)
    again, info = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert (get(again), get(again, "C")) == ({1 / 30}, {1.1})
    groups = json.loads((tmp_path / "config.json").read_text())["adanorm"]["groups"]
    assert [group["settings"] for group in groups] == [{"C": 1.1, "k": 1 / 30}]
    larger = AutoModelForMaskedLM.from_pretrained(tmp_path, num_hidden_layers=3)  # a layer that the file lacks
    assert get(larger) == {1 / 30}


def test_state_dicts_and_copies_hold_them() -> None:
    model = bert()
    set_norm(model, k=0.3)
    other = bert()
    other.load_state_dict(model.state_dict())
    assert get(other) == {0.3}
    assert get(copy.deepcopy(model)) == {0.3}


def test_a_state_with_values_that_the_constructor_refuses_is_refused() -> None:
    model = bert()
    state = model.state_dict()
    state["bert.embeddings.LayerNorm._extra_state"][-2] = -1.0  # C
    with pytest.raises(ValueError, match="C must be"):
        model.load_state_dict(state)


def test_accelerate_saves_and_restores_them(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(bert())
    set_norm(model, k=0.3)
    accelerator.save_state(str(tmp_path))
    set_norm(model, k=0.01)
    accelerator.load_state(str(tmp_path))
    assert get(model) == {0.3}


# ----------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"k": (0.0, 0.1), "over": 0.5}, {0: 0.0, 25: 0.05, 50: 0.1, 100: 0.1}),
        ({"k": (0.1, 0.0), "over": 40, "begin": 10}, {0: 0.1, 10: 0.1, 30: 0.05, 50: 0.0}),
        ({"k": (0.0, 0.1), "shape": "cosine"}, {0: 0.0, 25: 0.1 * (1 - math.sqrt(0.5)) / 2, 50: 0.05, 100: 0.1}),
        ({"k": (0.0, 0.1), "over": 0, "begin": 3}, {2: 0.0, 3: 0.1}),
    ],
)
def test_values_of_a_schedule(arguments: Any, expected: dict[int, float]) -> None:
    schedule = NormSchedule(**arguments)
    found = {step: schedule.values(step, 100)["k"] for step in expected}
    assert found == pytest.approx(expected, abs=1e-9)
    assert found[max(expected)] == arguments["k"][1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "at least one setting"),
        ({"k": 0.1}, "a pair of numbers"),
        ({"k": (0.0, math.inf)}, "a pair of numbers"),
        ({"k": (0.0, 0.1), "over": 1.5}, "over must be"),
        ({"k": (0.0, 0.1), "begin": -1}, "begin must be"),
        ({"k": (0.0, 0.1), "shape": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_bad_schedules(arguments: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        NormSchedule(**arguments)


class Seen(NormScheduleCallback):
    def __init__(self, **schedule: Any) -> None:
        super().__init__(**schedule)
        self.during: list[set[float]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.during.append(get(model))


def train(folder: Path, model: Any, callback: Any, resume: str | None = None, **arguments: Any) -> Trainer:
    rows = {"input_ids": [[n % 30 + 1, 2, 3, 4] for n in range(16)], "labels": [n % 2 for n in range(16)]}
    data = Dataset.from_dict(rows)
    common: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 4}
    common |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    saving: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "logging_strategy": "no"}
    trainer = Trainer(
        model, TrainingArguments(str(folder), **common, **saving, **arguments), train_dataset=data, eval_dataset=data
    )
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("peft", [False, True])
def test_the_trainer_moves_and_resumes_them_and_its_best_model_has_those_of_its_step(
    tmp_path: Path, peft: bool
) -> None:
    def build() -> Any:
        return get_peft_model(bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS")) if peft else bert()

    seen = Seen(k=(0.0, 0.4))
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 1e-9}
    trainer = train(tmp_path, build(), seen, **best)
    assert [round(min(values), 9) for values in seen.during] == [0.0, 0.1, 0.2, 0.3]
    assert trainer.state.best_global_step is not None
    assert min(get(trainer.model)) == pytest.approx(0.1 * trainer.state.best_global_step)
    again = Seen(k=(0.0, 0.4))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "training resumes with other norms")  # the schedule sets k
        train(tmp_path / "again", build(), again, resume=str(tmp_path / "checkpoint-2"))
    assert [round(min(values), 9) for values in again.during] == [0.2, 0.3]


def test_a_schedule_that_a_norm_refuses_stops_the_training_before_its_first_step(tmp_path: Path) -> None:
    seen = Seen(C=(1.0, 0.0))
    with pytest.raises(ValueError, match="C must be"):
        train(tmp_path, bert(), seen)
    assert not seen.during


@pytest.mark.parametrize("name", ["k", "C"])
def test_at_most_two_graphs_over_a_hundred_changes(name: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(*(AdaNorm(8) for _ in range(3)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(3, 8, requires_grad=True)
    for step in range(101):
        set_norm(compiled, **{name: step / 100 + (name == "C")})
        z = compiled(x)
        torch.testing.assert_close(z, model(x))
        torch.testing.assert_close(torch.autograd.grad(z.sum(), x), torch.autograd.grad(model(x).sum(), x))
    assert counter.frame_count <= 2
    torch._dynamo.reset()
