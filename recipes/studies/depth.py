"""Does AdaNorm need a scale C in a deep post-norm stack, or another k? Gradients by depth, and the loss reached.

    python recipes/studies/depth.py --train_file rt/train.jsonl --validation_file rt/validation.jsonl \
        --output_dir outputs/depth

Every way starts from the same weights and sees the same batches: LayerNorm; LayerNorm with DeepNorm's rule (Wang et
al. 2022: the residual times alpha = (2N)^(1/4), the weights of value, output and feed-forward times beta =
(8N)^(-1/4)); AdaNorm with several C, alpha among them; AdaNorm with k = 0.1 / sqrt(N). First comes the training, with
one learning rate for all: the one with which LayerNorm, at the first of `trained_layers` and with a seed of its own,
has the lowest validation loss; then the gradient by depth at initialization, beside what `predicted_loss` makes of it.
In `output_dir`: a JSON file for every cell, so that a killed study goes on; `depth.md` and `depth.png`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipes, where this file runs as a script

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoints import write_file, write_json
from common.options import option, parse_options
from comparison.report import save_figure, to_markdown
from hf_adanorm import AdaNorm, patch_model, watch_norms
from studies.folder import claim, read_json
from studies.gradients import DATA, Encode, StudyOptions, prepare
from tasks.data import load_file


@dataclass(kw_only=True)
class DepthOptions:
    """Options of the study."""

    train_file: str = option(str(DATA / "programs" / "train.jsonl.gz"), "texts with labels")
    validation_file: str = option(str(DATA / "programs" / "validation.jsonl.gz"), "the same, held out")
    measured_layers: list[int] = option([6, 12, 24, 48], "depths at which the gradient is measured at initialization")
    trained_layers: list[int] = option([12, 24], "depths that are trained as well")
    width: int = option(64, "hidden size")
    num_steps: int = option(200, "optimiser steps of each training; the first quarter warms up")
    batch_size: int = option(16, "texts a step", within="(0, inf)")
    max_length: int = option(24, "longest text in tokens", within="[3, inf)")
    learning_rates: list[float] = option([1e-4, 3e-4, 1e-3, 3e-3], "Adam's learning rates to choose from")
    num_seeds: int = option(3, "seeds of every cell")
    num_threads: int = option(1, "threads of torch")
    summary_only: bool = option(False, "compute nothing: table and picture of the cells that are there")
    output_dir: str = option("outputs/depth", "where the numbers and the picture go")


@dataclass(frozen=True, kw_only=True)
class Way:
    """What stands in place of LayerNorm in N layers."""

    C: float | None = None  # None: LayerNorm
    k: float = 0.1
    deepnorm: bool = False


def ways(num_layers: int) -> dict[str, Way]:
    """Every way by its name."""
    alpha = (2 * num_layers) ** 0.25
    return {
        "LayerNorm": Way(),
        "LayerNorm, DeepNorm's rule": Way(deepnorm=True),
        "AdaNorm": Way(C=1.0),
        **{f"AdaNorm, C = {C:g}": Way(C=C) for C in (1.5, 2.0, 3.0)},
        "AdaNorm, C = alpha": Way(C=alpha),
        "AdaNorm, k = 0.1/√N": Way(C=1.0, k=0.1 / num_layers**0.5),
        "AdaNorm, DeepNorm's rule": Way(C=1.0, deepnorm=True),
        "AdaNorm, DeepNorm's rule, k = 0.1/N": Way(C=1.0, k=0.1 / num_layers, deepnorm=True),
    }


class MeanPooled(nn.Module):
    """A BERT that classifies by the mean over the positions of a text, so that each of them has a gradient.
    (Rows of [CLS] all start from the same vector, and what becomes of one is chance.)"""

    def __init__(self, model: Any):
        super().__init__()
        self.bert, self.classifier = model.bert, model.classifier

    def forward(self, labels: Tensor, **batch: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, logits)"""
        weights = batch["attention_mask"][..., None]  # (B, T, 1)
        pooled = (self.bert(**batch).last_hidden_state * weights).sum(1) / weights.sum(1)
        logits = self.classifier(pooled)
        return F.cross_entropy(logits, labels), logits


def set_up(model: MeanPooled, way: Way) -> None:
    """Change a fresh model in place."""
    layers = model.bert.encoder.layer
    if way.deepnorm:
        alpha, beta = (2 * len(layers)) ** 0.25, (8 * len(layers)) ** -0.25
        for layer in layers:
            scaled = (layer.attention.self.value, layer.attention.output, layer.intermediate, layer.output)
            for module in scaled:
                getattr(module, "dense", module).weight.data.mul_(beta)
            for block in (layer.attention.output, layer.output):  # called with (branch, residual)
                block.register_forward_pre_hook(lambda _, inputs: (inputs[0], alpha * inputs[1]))
    if way.C is not None:
        patch_model(model, "adanorm", C=way.C, k=way.k)


def profile(model: MeanPooled, batches: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """For the norms of the layers (not the embeddings'), in the order of the forward pass: variance of the gradient at
    their input, and variance within a row of the branch that was added to the residual. Leaves no gradient behind."""
    ends = [block.dense for layer in model.bert.encoder.layer for block in (layer.attention.output, layer.output)]
    branches: dict[nn.Module, list[float]] = {end: [] for end in ends}
    handles = [
        end.register_forward_hook(lambda end, _, out: branches[end].append(float(out.detach().var(-1).mean())))
        for end in ends
    ]
    with watch_norms(model) as log:
        for batch in batches:
            model(**batch)[0].backward()
        log.end_step()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    gradients = [record.grad_input_var for record in log.records if ".layer." in record.name]
    return {"gradient": gradients, "branch": [mean(found) for found in branches.values()]}


def loss_of_gradient(found: Mapping[str, Any]) -> float:
    """Variance of the gradient at the last norm over that at the first."""
    variances = found["gradient"]
    return float(variances[-1] / max(variances[0], 1e-300))


def predicted_loss(k: float, branches: Sequence[float], width: int, rows: int = 256) -> float:
    """`loss_of_gradient` at initialization of a stack that is nothing but norms and branches that are random matrices.

    C does not occur: it scales the output of a norm, through it the branch, and the next norm divides by both.

    Args:
        k: AdaNorm's k; 0 for LayerNorm.
        branches: for every norm, the variance of what was added to the residual, over C² (over alpha² with DeepNorm).
        width: entries of a row.
        rows: rows of random input to average over.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    norm, inputs = AdaNorm(width, k=k), []
    z = normal(rows).requires_grad_()
    for branch in branches:
        inputs.append(z + z @ normal(width) * (branch / width / float(z.detach().square().mean())) ** 0.5)
        z = norm(inputs[-1])
    first, last = torch.autograd.grad((z * normal(rows)).sum(), [inputs[0], inputs[-1]])
    return float(last.var(1).mean() / first.var(1).mean())


def warmed_up(step: int, options: DepthOptions) -> float:
    return min(1.0, (step + 1) / max(options.num_steps // 4, 1))


def train(model: nn.Module, batches: Iterator[Any], options: DepthOptions, learning_rate: float) -> list[float]:
    """The losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    losses = []
    for step, batch in enumerate(islice(batches, options.num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmed_up(step, options)
        loss = model(**batch)[0]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def validate(model: nn.Module, encode: Encode, options: DepthOptions) -> dict[str, float]:
    """Loss and accuracy (%) on all of the validation file."""
    data = load_file(options.validation_file, "validation")
    loss = right = 0.0
    model.eval()
    for start in range(0, len(data), 64):
        batch = encode(data, range(start, min(start + 64, len(data))))
        mean_loss, logits = model(**batch)
        loss += float(mean_loss) * len(batch["labels"])
        right += int((logits.argmax(-1) == batch["labels"]).sum())
    model.train()
    return {"validation_loss": loss / len(data), "validation_accuracy": 100 * right / len(data)}


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter == "." else "_" for letter in name)


class Study:
    """The cells, each made when it is asked for and not there."""

    def __init__(self, options: DepthOptions):
        self.options = options
        self.folder = Path(options.output_dir) / "cells"
        self.folder.mkdir(exist_ok=True)
        self.prepared: dict[tuple[int, int], Any] = {}

    def cell(self, name: str, make: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        """What is in the file, or else what is made now and put there; nothing in a summary that lacks it."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            if self.options.summary_only:
                return []
            write_json(path, make())
            print(name, flush=True)
        return [read_json(path)]

    def start(self, num_layers: int, way: Way, seed: int) -> tuple[MeanPooled, Callable[[], Iterator[Any]], Encode]:
        """A fresh model, the stream of batches, what makes batches."""
        options = self.options
        if (num_layers, seed) not in self.prepared:
            self.prepared[num_layers, seed] = prepare(
                StudyOptions(
                    train_file=options.train_file,
                    num_layers=num_layers,
                    width=options.width,
                    batch_size=options.batch_size,
                    max_length=options.max_length,
                    dropout=0.0,
                    seed=seed,
                )
            )
        build, batches, encode = self.prepared[num_layers, seed]
        torch.manual_seed(seed)
        model = MeanPooled(build()).train()
        set_up(model, way)
        return model, batches, encode

    def measured(self, num_layers: int, name: str, seed: int) -> list[dict[str, Any]]:
        """The profile at initialization."""

        def make() -> dict[str, Any]:
            model, batches, _ = self.start(num_layers, ways(num_layers)[name], seed)
            return profile(model.double(), list(islice(batches(), 2)))

        return self.cell(f"start-{num_layers}-{slug(name)}-{seed}", make)

    def trained(self, num_layers: int, name: str, seed: int, learning_rate: float) -> list[dict[str, Any]]:
        """Losses, validation and the profile after the training."""

        def make() -> dict[str, Any]:
            model, batches, encode = self.start(num_layers, ways(num_layers)[name], seed)
            stream = batches()
            losses = train(model, stream, self.options, learning_rate)
            scores = validate(model, encode, self.options)
            found = profile(model.double(), list(islice(stream, 2)))
            return {"losses": losses, **scores, **found}

        return self.cell(f"run-{num_layers}-{slug(name)}-{learning_rate:g}-{seed}", make)


Cells = Mapping[tuple[int, str], Sequence[Mapping[str, Any]]]
"""What was found for a depth and a way, by seed."""


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(mean(map(math.log, values)))


def factor(values: Sequence[float]) -> str:
    spread = f" ×/÷ {math.exp(stdev(map(math.log, values))):.2g}" if len(values) > 1 else ""  # noqa: RUF001
    return f"{geometric_mean(values):.3g}{spread}"


def value(values: Sequence[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def predicted(num_layers: int, name: str, cells: Sequence[Mapping[str, Any]], width: int) -> float:
    way = ways(num_layers)[name]
    unit = (2 * num_layers) ** 0.5 if way.deepnorm else (way.C or 1.0) ** 2
    k = 0.0 if way.C is None else way.k
    return geometric_mean([predicted_loss(k, [v / unit for v in cell["branch"]], width) for cell in cells])


def tables(starts: Cells, runs: Cells, predictions: Mapping[tuple[int, str], float]) -> tuple[list[Any], list[Any]]:
    """At initialization, a row a way; after the training, a row a run's depth and way."""
    depths = sorted({num_layers for num_layers, _ in starts})
    first = [["loss of gradient at initialization (predicted)", *(f"{depth} layers" for depth in depths)]]
    for name in ways(1):
        cells = [
            f"{factor(list(map(loss_of_gradient, starts[depth, name])))} ({predictions[depth, name]:.3g})"
            if (depth, name) in starts
            else ""
            for depth in depths
        ]
        first.append([name, *cells])
    second = [
        [
            "after the training",
            "layers",
            "seeds",
            "loss of gradient",
            "training loss",
            "validation loss",
            "accuracy (%)",
        ]
    ]
    for (depth, name), found in runs.items():
        last = [mean(run["losses"][-max(len(run["losses"]) // 5, 1) :]) for run in found]
        second.append(
            [
                name,
                str(depth),
                str(len(found)),
                factor(list(map(loss_of_gradient, found))),
                value(last, 3),
                value([run["validation_loss"] for run in found], 3),
                value([run["validation_accuracy"] for run in found], 1),
            ]
        )
    return first, second


DRAWN = (
    "LayerNorm",
    "LayerNorm, DeepNorm's rule",
    "AdaNorm",
    "AdaNorm, C = 3",
    "AdaNorm, k = 0.1/√N",
    "AdaNorm, DeepNorm's rule, k = 0.1/N",
)


def draw(starts: Cells, runs: Cells, predictions: Mapping[tuple[int, str], float]) -> Any:
    """Variance by depth at initialization and after the training, in the deepest model that was trained, and the loss
    of gradient against the number of layers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from hf_adanorm.diagnostics.plots import COLORS, LINES, MARKERS

    figure, panels = plt.subplots(1, 3, figsize=(13.5, 3.8), layout="constrained")
    depth = max(num_layers for num_layers, _ in runs)
    depths = sorted({num_layers for num_layers, _ in starts})
    titles = (f"{depth} layers, at initialization", f"{depth} layers, after the training")
    for panel, cells, title in zip(panels, (starts, runs), titles, strict=False):
        for index, name in enumerate(DRAWN):
            profiles = [
                [v / found["gradient"][-1] for v in found["gradient"]] for found in cells.get((depth, name), ())
            ]
            if profiles:
                line = [geometric_mean(at_norm) for at_norm in zip(*profiles, strict=True)]
                panel.plot(range(1, len(line) + 1), line, color=COLORS[index], linestyle=LINES[index], label=name)
        panel.set(yscale="log", title=title, xlabel="norm, in the order of the forward pass")
    panels[0].set_ylabel("variance of the gradient\nover that at the last norm")
    for index, name in enumerate(DRAWN):
        there = [depth for depth in depths if (depth, name) in starts]
        measured = [geometric_mean(list(map(loss_of_gradient, starts[depth, name]))) for depth in there]
        panels[2].plot(there, measured, MARKERS[index], color=COLORS[index], label=name)
        panels[2].plot(there, [predictions[depth, name] for depth in there], linestyle="--", color=COLORS[index])
    panels[2].set(
        xscale="log", yscale="log", xlabel="layers", ylabel="variance at the last norm\nover that at the first",
        title="marks measured, lines predicted",
    )  # fmt: skip
    panels[2].set_xticks(depths, list(map(str, depths)), minor=False)
    panels[2].minorticks_off()
    panels[2].legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    """Make the cells that are not there, then the tables and the picture."""
    options = parse_options(DepthOptions, description=__doc__)
    torch.set_num_threads(options.num_threads)
    claim(Path(options.output_dir), options, free=("output_dir", "num_seeds", "num_threads", "summary_only"))
    study = Study(options)
    seeds = range(1, options.num_seeds + 1)
    choice = {
        rate: found["validation_loss"]
        for rate in options.learning_rates
        for found in study.trained(options.trained_layers[0], "LayerNorm", 0, rate)
    }
    rate = min(choice, key=lambda rate: choice[rate])
    print("validation loss by learning rate:", choice, flush=True)
    runs: dict[tuple[int, str], list[Any]] = {}
    starts: dict[tuple[int, str], list[Any]] = {}
    for num_layers in options.trained_layers:
        for seed in seeds:
            for name in ways(num_layers):
                runs.setdefault((num_layers, name), []).extend(study.trained(num_layers, name, seed, rate))
    for num_layers in options.measured_layers:
        for name in ways(num_layers):
            starts[num_layers, name] = [cell for seed in seeds for cell in study.measured(num_layers, name, seed)]
    runs, starts = ({key: found for key, found in cells.items() if found} for cells in (runs, starts))
    predictions = {key: predicted(*key, found, options.width) for key, found in starts.items()}
    text = "\n".join(map(to_markdown, tables(starts, runs, predictions)))
    write_file(Path(options.output_dir) / "depth.md", text)
    print(text)
    save_figure(draw(starts, runs, predictions), Path(options.output_dir) / "depth", dpi=150)


if __name__ == "__main__":
    main()
