"""From a pretrained LayerNorm model to AdaNorm: which way keeps what the model learned?

    python recipes/studies/pretrained.py --model MODEL --data FOLDER_OF_JSONL --output_dir OUT

For every way below: how far the pooled output moves before any training, then fine-tuning on a sentence classification
task with the same budget. Every way is run with every learning rate on seed 0; the other seeds follow with the one
that had the best validation accuracy there, and the table takes those runs. Every finished run is a file in OUT/runs,
so that a killed study continues where it was, and the table can be made from what is there (--summary_only).

    layernorm                 the model as it is
    layernorm-distilled       ... with the term of simple-distilled, the control for it
    simple-drop               layernorm-simple, gains and biases dropped
    simple-fold               ... folded, residual norms by their gain's mean (on_unfoldable="approximate")
    simple-calibrated         ... folded by a fit to one batch (on_unfoldable="calibrate")
    simple-distilled          ... and drawn to the source's pooled outputs, less and less over the first 60 % of the
                              steps (each of those runs the source as well)
    adanorm-drop              AdaNorm with the paper's k, gains and biases dropped
    adanorm-fold-ramp         folded as simple-fold, then k from 0 to the paper's over the first 60 % of the steps
    adanorm-fold-layerwise    ... one norm after the other instead of all together
    adanorm-fade              gain and bias fade out and k in, over the first 60 % of the steps
    adanorm-calibrated        AdaNorm with a k per norm that its outliers allow, folded by the fit, no ramp
    adanorm-distilled         ... and drawn to the source's pooled outputs, as simple-distilled

Raises FileNotFoundError for a missing data file, OptionError when OUT holds runs with other options.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipes, where this file runs as a script

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from common.checkpoints import write_json
from comparison.report import save_figure
from hf_adanorm import calibrate_k, patch_model, set_fade
from hf_adanorm.fading import Order, fade_at
from hf_adanorm.saving import write_file
from studies.folder import claim, read_json
from studies.steps import update, warm_up_then_decay

WAYS = (
    "layernorm",
    "layernorm-distilled",
    "adanorm-calibrated",
    "adanorm-distilled",
    "simple-calibrated",
    "simple-distilled",
    "simple-fold",
    "adanorm-drop",
    "adanorm-fold-ramp",
    "adanorm-fold-layerwise",
    "simple-drop",
    "adanorm-fade",
)
PAPER_K = 0.1
CALIBRATION_SENTENCES = 32
FADE_SHARE = 0.6
# Options that add runs or change none: a folder may hold runs of several.
FREE = ("ways", "steps", "learning_rates", "seeds", "output_dir", "summary_only")


class MeanPooledClassifier(nn.Module):
    """A pretrained encoder, the mean over its tokens, a dense layer that starts as the identity, a classifier.

    The dense layer gives the last norm a linear reader, so that a fold keeps the pooled output.
    """

    def __init__(self, folder: str, seed: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        width = self.encoder.config.hidden_size
        self.dense = nn.Linear(width, width)
        nn.init.eye_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)
        self.classifier = nn.Linear(width, 2)
        nn.init.normal_(self.classifier.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.classifier.bias)
        # The embedding table is half of the parameters and hardly moves in a short run.
        self.encoder.embeddings.word_embeddings.weight.requires_grad_(False)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, T, H)
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.dense((hidden * mask).sum(1) / mask.sum(1))  # (B, H)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.classifier(self.pooled(input_ids, attention_mask))  # (B, 2)


class Data:
    """The three splits, and batches of token tensors."""

    def __init__(self, folder: Path, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.splits: dict[str, list[dict[str, Any]]] = {}
        for split in ("train", "validation", "test"):
            path = folder / f"{split}.jsonl"
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: --data must hold train, validation and test.jsonl")
            self.splits[split] = [
                json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")
            ]

    def batch(self, rows: list[dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        encoded = self.tokenizer(
            [row["text"] for row in rows],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        return inputs, torch.tensor([row["label"] for row in rows])

    def training_batches(self, seed: int, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Endless; sentences of like length together, in an order that depends on the seed alone."""
        order = random.Random(seed)
        while True:
            rows = self.splits["train"][:]
            order.shuffle(rows)
            for start in range(0, len(rows), 50 * size):
                pool = sorted(rows[start : start + 50 * size], key=lambda row: len(row["text"]))
                chunks = [pool[i : i + size] for i in range(0, len(pool), size)]
                order.shuffle(chunks)
                yield from (self.batch(chunk) for chunk in chunks if len(chunk) == size)

    def accuracy(self, model: nn.Module, split: str, limit: int | None = None) -> float:
        rows = sorted(self.splits[split][:limit], key=lambda row: len(row["text"]))
        model.eval()
        right = 0
        with torch.no_grad():
            for start in range(0, len(rows), 32):
                inputs, labels = self.batch(rows[start : start + 32])
                right += int((model(**inputs).argmax(-1) == labels).sum())
        model.train()
        return right / len(rows)


def build(way: str, args: argparse.Namespace, data: Data, seed: int) -> tuple[MeanPooledClassifier, dict[str, Any]]:
    """The model before training, and what was chosen on the way."""
    model = MeanPooledClassifier(args.model, seed)
    notes: dict[str, Any] = {}
    calibration, _ = data.batch(data.splits["train"][:CALIBRATION_SENTENCES])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the outputs do change: that is what is measured here
        if way == "simple-drop":
            patch_model(model, "layernorm-simple")
        elif way == "simple-fold":
            options = {"affine": "fold", "on_unfoldable": "approximate", "fold_inputs": calibration}
            patch_model(model, "layernorm-simple", **options)
        elif way in ("simple-calibrated", "simple-distilled"):
            options = {"affine": "fold", "on_unfoldable": "calibrate", "fold_inputs": calibration}
            patch_model(model, "layernorm-simple", **options)
        elif way == "adanorm-drop":
            patch_model(model, "adanorm", k=PAPER_K)
        elif way in ("adanorm-fold-ramp", "adanorm-fold-layerwise"):
            options = {"affine": "fold", "on_unfoldable": "approximate", "fold_inputs": calibration}
            patch_model(model, "adanorm", k=PAPER_K, **options)
        elif way == "adanorm-fade":
            patch_model(model, "adanorm", k=PAPER_K, affine="fade")
        elif way in ("adanorm-calibrated", "adanorm-distilled"):
            report = calibrate_k(model, [calibration], margin=args.margin)
            notes["k"] = [min(report.k.values()), max(report.k.values())]
            notes["calibration"] = str(report)
            options = {"affine": "fold", "on_unfoldable": "calibrate", "fold_inputs": calibration}
            patch_model(model, "adanorm", k=report.k, **options)
    return model, notes


def distance_at_start(
    model: MeanPooledClassifier, args: argparse.Namespace, data: Data, seed: int
) -> dict[str, float]:
    """Pooled output against the source's: mean cosine, relative error."""
    inputs, _ = data.batch(data.splits["validation"][:64])
    source = MeanPooledClassifier(args.model, seed).eval()
    model.eval()
    with torch.no_grad():
        want, have = source.pooled(**inputs), model.pooled(**inputs)
    model.train()
    return {
        "cosine": float(F.cosine_similarity(have, want).mean()),
        "relative_error": float((have - want).norm() / want.norm()),
    }


def run(way: str, lr: float, seed: int, args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Train once; the result is a file, and a file that is there is the result."""
    name = f"{way}-lr{lr:g}-seed{seed}-steps{args.steps}"
    path = Path(args.output_dir) / "runs" / f"{name}.json"
    if path.is_file():
        return read_json(path)
    started = time.time()
    torch.manual_seed(seed)
    model, notes = build(way, args, data, seed)
    result: dict[str, Any] = {"way": way, "lr": lr, "seed": seed, "steps": args.steps, **notes}
    result["start"] = distance_at_start(model, args, data, seed)
    fading = way in ("adanorm-fold-ramp", "adanorm-fold-layerwise", "adanorm-fade")
    order: Order = "forward" if way == "adanorm-fold-layerwise" else "together"
    source = MeanPooledClassifier(args.model, seed).eval() if way.endswith("-distilled") else None
    ramp_steps = round(FADE_SHARE * args.steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    losses: list[float] = []
    curve: list[tuple[int, float]] = []
    model.train()
    for step, (inputs, labels) in zip(range(args.steps), data.training_batches(seed, 16), strict=False):
        if fading:
            set_fade(model, fade_at(step, ramp_steps), order=order)
        pooled = model.pooled(**inputs)
        loss = F.cross_entropy(model.classifier(pooled), labels)
        objective = loss
        if source is not None and step < ramp_steps:
            with torch.no_grad():
                wanted = source.pooled(**inputs)
            distance = F.mse_loss(pooled, wanted) / wanted.square().mean()
            objective = loss + (1 - fade_at(step, ramp_steps)) * distance
        update(model, optimizer, objective, lr * warm_up_then_decay(step, args.steps))
        losses.append(loss.item())
        if (step + 1) % max(args.steps // 3, 1) == 0 and step + 1 < args.steps:
            curve.append((step + 1, data.accuracy(model, "validation", args.validation_sentences // 2)))
    if fading:
        set_fade(model, 1.0)
    result["losses"] = losses
    result["validation"] = data.accuracy(model, "validation", args.validation_sentences)
    result["curve"] = [*curve, (args.steps, result["validation"])]
    result["test"] = data.accuracy(model, "test", args.test_sentences)
    result["seconds"] = time.time() - started
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    shown = {key: round(value, 4) for key, value in result.items() if isinstance(value, float) and key != "test"}
    print(time.strftime("%H:%M:%S"), name, shown, result["start"], result["curve"], flush=True)
    return result


def best_rate(runs: list[dict[str, Any]]) -> float:
    """The learning rate of the best validation accuracy on seed 0, the lower training loss in a tie."""
    first = [run for run in runs if run["seed"] == 0]

    def rank(run: dict[str, Any]) -> tuple[float, float]:
        loss = mean(run["losses"][-10:])
        return run["validation"], -loss if math.isfinite(loss) else -math.inf

    return float(max(first, key=rank)["lr"])


def load_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((folder / "runs").glob("*.json")):
        result = read_json(path)
        found.setdefault(result["way"], []).append(result)
    return found


def summarize(args: argparse.Namespace) -> str:
    """A Markdown table of the chosen runs, written with a plot of the losses beside the runs."""
    folder = Path(args.output_dir)
    everything = load_runs(folder)
    found = {
        way: [run for run in runs if run["lr"] == best_rate(runs)]
        for way, runs in everything.items()
        if any(run["seed"] == 0 for run in runs)
    }
    lines = [
        "| way | cosine at start | relative error | validation along the way | validation | test "
        "| learning rate (tried) | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        if way not in found:
            continue
        runs = found[way]
        spread = {
            key: f"{mean(r[key] for r in runs):.3f}"
            + (f" +- {stdev(r[key] for r in runs):.3f}" if len(runs) > 1 else "")
            for key in ("validation", "test")
        }
        along = ", ".join(
            f"{mean(points):.3f}"
            for points in zip(*([value for _, value in r["curve"][:-1]] for r in runs), strict=True)
        )
        tried = len({run["lr"] for run in everything[way]})
        lines.append(
            f"| {way} | {runs[0]['start']['cosine']:.3f} | {runs[0]['start']['relative_error']:.2f} | {along} "
            f"| {spread['validation']} | {spread['test']} | {runs[0]['lr']:g} ({tried}) | {len(runs)} |"
        )
    table = "\n".join(lines)
    write_file(folder / "table.md", table + "\n")
    plot(found, folder)
    return table


def plot(found: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Loss against step for every way, a running mean over 10 steps and the mean over seeds."""
    styles = ["-", "--", "-.", ":"]
    colors = ["black", "#0072b2", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#56b4e9"]  # Okabe and Ito's
    colors += ["#999933", "#7f7f7f", "#882255", "#332288", "#aa4499"]
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.subplots()
    losses_of = {way: torch.tensor([run["losses"] for run in found[way]]).mean(0) for way in WAYS if way in found}
    styles_of = {way: (styles[index % 4], colors[index % len(colors)]) for index, way in enumerate(WAYS)}
    # The legend in the order of the lines' right ends.
    for way in sorted(losses_of, key=lambda way: -float(losses_of[way][-10:].mean())):
        losses, (style, color) = losses_of[way], styles_of[way]
        window = min(10, len(losses))
        smooth = F.avg_pool1d(losses[None, None], window, 1)[0, 0]
        steps = range(window, window + len(smooth))
        axes.plot(steps, smooth, style, color=color, label=way, linewidth=1.8)
    axes.set(xlabel="optimizer step", ylabel="training loss (nats, mean over 10 steps)")
    figure.legend(loc="outside right center", fontsize=8)
    save_figure(figure, folder / "loss", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a pretrained BERT-like encoder")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train, validation and test.jsonl (text, label)"
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-4, 2e-4, 5e-5])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--margin", type=float, default=0.25, help="of calibrate_k: k = margin / max |y|")
    parser.add_argument("--max_length", type=int, default=64, help="tokens")
    parser.add_argument("--validation_sentences", type=int, default=400)
    parser.add_argument("--test_sentences", type=int, default=None, help="the first so many; all by default")
    parser.add_argument("--summary_only", action="store_true", help="no training: table and plot of what is there")
    args = parser.parse_args()
    if not args.summary_only:
        data = Data(args.data, AutoTokenizer.from_pretrained(args.model), args.max_length)
        claim(Path(args.output_dir), args, free=FREE)
        for way in args.ways:
            rate = best_rate([run(way, lr, 0, args, data) for lr in args.learning_rates])
            for seed in range(args.seeds):
                run(way, rate, seed, args, data)
    print(summarize(args))


if __name__ == "__main__":
    main()
