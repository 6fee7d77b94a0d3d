"""A pretrained pre-norm language model moved to norms without parameters: what every way costs in perplexity.

    python recipes/studies/language_model.py --model FOLDER --text WIKIPEDIA.xml.bz2 --other_text FILE --output_dir OUT

Three norms, uncentered as the model's own RMSNorms are:

    simple         layernorm-simple
    adanorm-0.1    AdaNorm with the paper's k
    adanorm-k      AdaNorm with the k that calibrate_k proposes for each norm, on the training text

times what becomes of the gains:

    drop           they are lost
    fold           they move into the layers that read the norm; k is there at once
    untie          ... and a tied head gets a copy of its own, so that the last norm folds, too
    calibrate      ... and gains and biases are fitted to the source's activations on 512 tokens of the training text
    ramp           as untie, but k comes in over the first 60 % of a training

First every way's perplexity right after the swap, then that of some ways after a short training beside the source's,
with its gains, on the same segments. Embedding and head stand still in all of them: an untied head brings no freedom
that the source has not. Every way is trained with every learning rate on seed 0; the other seeds follow with the one
of the least validation loss there. The last tenth of --text is for testing and the tenth before for validation;
Wikipedia's XML is stripped of its markup, --other_text is for testing alone and taken as it is. Every result is a file
in OUT, so that a killed study continues where it was; tables.md and norms.png are made of what is there
(--summary_only).

Raises DataError for a missing or unreadable text, OptionError when OUT holds runs with other options.
"""

from __future__ import annotations

import argparse
import html
import math
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipes, where this file runs as a script

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.checkpoints import write_json
from comparison.report import save_figure
from comparison.significance import bootstrap_scores, paired_difference
from hf_adanorm import calibrate_k, patch_model, plots, set_fade
from hf_adanorm.fading import fade_at
from hf_adanorm.saving import write_file
from studies.folder import claim, read_json
from studies.steps import update, warm_up_then_decay
from tasks.bytes import read_bytes

FOLD = {"affine": "fold", "ramp": False}
AFFINE: dict[str, dict[str, Any]] = {
    "drop": {},
    "fold": FOLD,
    "untie": {**FOLD, "on_tied": "untie"},
    "calibrate": {**FOLD, "on_tied": "untie", "on_unfoldable": "calibrate"},
    "ramp": {"affine": "fold", "on_tied": "untie"},
}
NORMS = ("simple", "adanorm-0.1", "adanorm-k")
WAYS = ("source", *(f"{norm}-{affine}" for affine in AFFINE for norm in NORMS))
AT_ONCE = tuple(way for way in WAYS if not way.endswith("-ramp"))
PAPER_K = 0.1
RAMP_SHARE = 0.6
CALIBRATION_SEGMENTS = 4  # for k; the fit takes the first of them
# Options that add results or change none: a folder may hold runs of several.
FREE = ("train", "learning_rates", "seeds", "output_dir", "summary_only")


def read_text(path: Path, option_name: str) -> str:
    """Plain text, or that of the articles of a MediaWiki dump. Compressed files are told by their ending."""
    text = read_bytes(path, option_name).tobytes().decode("utf-8", errors="replace")
    if not text.lstrip().startswith("<mediawiki"):
        return text
    articles = re.findall(r"<text[^>]*>(.*?)</text>", text, re.DOTALL)
    return "\n\n".join(without_markup(a) for a in articles if not a.lower().startswith("#redirect"))


def without_markup(article: str) -> str:
    """Roughly the words that a reader of the article sees, without tables, notes and pictures."""
    text = html.unescape(html.unescape(article))
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<(ref|math|gallery)\b.*?</\1>", "", text, flags=re.DOTALL)
    while (inner := re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)) != text:
        text = inner
    text = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\]|\[[^\[\]]*\])*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\[\]]*\|)?([^\[\]]*)\]\]|\[https?://\S*\s?([^\]]*)\]", r"\1\2", text)
    text = re.sub(r"<[^>]+>|'{2,}|__[A-Z]+__", "", text)
    text = re.sub(r"^=+\s*(.*?)\s*=+\s*$", r"\1", text, flags=re.MULTILINE)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()


class Data:
    """Token segments: `train` in any number, `validation`, and a dict of `tests`, each int64 (segments, length)."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.length = args.length
        tokenizer = AutoTokenizer.from_pretrained(args.model)

        def tokens(text: str) -> Tensor:
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            if len(ids) < args.length:
                raise ValueError(f"a part of the text holds {len(ids)} tokens: less than a segment of {args.length}")
            return torch.tensor(ids)

        text, tenth = (found := read_text(args.text, "text")), len(found) // 10
        self.train = tokens(text[: -2 * tenth])
        self.validation = self.spread(tokens(text[-2 * tenth : -tenth]), args.segments)
        other = read_text(args.other_text, "other_text")
        self.tests = {"text": tokens(text[-tenth:]), "other": tokens(other)}
        self.tests = {name: self.spread(ids, args.segments) for name, ids in self.tests.items()}

    def spread(self, ids: Tensor, count: int) -> Tensor:
        """`count` segments at even distances. Raises ValueError where they would overlap: a bootstrap over them would
        find too little spread."""
        if len(ids) < count * self.length:
            raise ValueError(
                f"a part of the text holds {len(ids)} tokens: less than {count} segments of {self.length}"
            )
        starts = torch.linspace(0, len(ids) - self.length, count).long()
        return torch.stack([ids[start : start + self.length] for start in starts.tolist()])

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` segments of the training text, from random places."""
        starts = torch.randint(0, len(self.train) - self.length + 1, (count,), generator=generator)
        return torch.stack([self.train[start : start + self.length] for start in starts.tolist()])

    def for_calibration(self) -> list[dict[str, Tensor]]:
        segments = self.draw(CALIBRATION_SEGMENTS, torch.Generator().manual_seed(1234))
        return [{"input_ids": segment[None]} for segment in segments]


@torch.no_grad()
def losses(model: nn.Module, segments: Tensor) -> list[float]:
    """The mean loss of each segment, nats a token, in float32. Each begins without a context."""
    model.eval()
    found = []
    for ids in segments:
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        found.append(float(F.cross_entropy(logits, ids[1:])))
    return found


def build(way: str, args: argparse.Namespace, data: Data) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if way == "source":
        return model
    norm, affine = way.rsplit("-", 1)
    settings = {
        "simple": {"norm": "layernorm-simple"},
        "adanorm-0.1": {"norm": "adanorm", "k": PAPER_K},
        "adanorm-k": {"norm": "adanorm", "k": {n["name"]: n["k"] for n in start("source", args, data)["norms"]}},
    }[norm]
    inputs = {"fold_inputs": data.for_calibration()[0]} if affine == "calibrate" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the outputs do change: that is what is measured here
        return patch_model(model, targets="rmsnorm", **settings, **AFFINE[affine], **inputs)


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file holds, or what is made now and kept there."""
    if not path.is_file():
        started = time.process_time(), time.time()
        result = make()
        result["cpu_seconds"], result["seconds"] = time.process_time() - started[0], time.time() - started[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        shown = {name: round(math.exp(mean(values)), 3) for name, values in result["tests"].items()}
        print(time.strftime("%H:%M:%S"), path.stem, shown, f"{result['seconds']:.0f} s", flush=True)
    return read_json(path)


def start(way: str, args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Right after the swap; for the source also what reaches its norms."""

    def make() -> dict[str, Any]:
        model = build(way, args, data)
        result: dict[str, Any] = {"way": way}
        if way == "source":
            result["norms"] = [asdict(norm) for norm in calibrate_k(model, data.for_calibration(), k=PAPER_K).norms]
            result["width"] = model.config.hidden_size
        return {**result, "tests": {name: losses(model, segments) for name, segments in data.tests.items()}}

    return kept(args.output_dir / "start" / f"{way}.json", make)


def train(way: str, lr: float, seed: int, args: argparse.Namespace, data: Data) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        model = build(way, args, data)
        for still in (model.get_input_embeddings(), model.get_output_embeddings()):
            still.requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
        generator = torch.Generator().manual_seed(seed)
        result: dict[str, Any] = {"way": way, "lr": lr, "seed": seed, "losses": []}
        model.train()
        for step in range(args.steps):
            ids = data.draw(args.batch_size, generator)
            if way.endswith("-ramp"):
                set_fade(model, fade_at(step + 1, round(RAMP_SHARE * args.steps)))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            update(model, optimizer, loss, lr * warm_up_then_decay(step, args.steps))
            result["losses"].append(loss.item())
        result["validation"] = mean(losses(model, data.validation))
        return {**result, "tests": {name: losses(model, segments) for name, segments in data.tests.items()}}

    return kept(args.output_dir / "runs" / f"{way}-lr{lr:g}-seed{seed}-steps{args.steps}.json", make)


def best_rate(runs: list[dict[str, Any]]) -> float:
    """The learning rate of the least validation loss on seed 0."""
    first = [run for run in runs if run["seed"] == 0 and math.isfinite(run["validation"])]
    return float(min(first or runs, key=lambda run: run["validation"])["lr"])


def perplexity(runs: list[dict[str, Any]], text: str, baseline: list[dict[str, Any]] | None = None) -> str:
    """Perplexity, or how far it lies above that of the paired runs of `baseline`, in percent, from tenfold on as a
    multiple; with the 95 % interval of a bootstrap over segments."""

    def scores(which: list[dict[str, Any]]) -> np.ndarray:
        rows = [np.array([run["tests"][text], [1.0] * len(run["tests"][text])]).T for run in which]
        return bootstrap_scores(rows, lambda sums: sums[:, 0] / sums[:, 1], num_resamples=10_000)

    if baseline is None:
        found = np.exp(scores(runs).mean(0))
        low, high = np.quantile(found[1:], [0.025, 0.975])
        return f"{found[0]:.4g} ({low:.3g} to {high:.3g})"
    gap = paired_difference(scores(runs), scores(baseline))
    if gap.mean > math.log(10):
        return "{:.2g} times ({:.2g} to {:.2g})".format(*map(math.exp, (gap.mean, gap.low, gap.high)))
    return "{:+.2f} % ({:+.2f} to {:+.2f})".format(*(100 * math.expm1(x) for x in (gap.mean, gap.low, gap.high)))


def against(runs: list[dict[str, Any]], text: str, baseline: list[dict[str, Any]]) -> str:
    """`perplexity` against the runs of `baseline` with the same seeds."""
    theirs = {run.get("seed"): run for run in baseline}
    ours = [run for run in runs if run.get("seed") in theirs]
    return perplexity(ours, text, [theirs[run.get("seed")] for run in ours]) if ours else ""


def summarize(args: argparse.Namespace) -> str:
    """Markdown tables of what is there, written with the picture of the norms' inputs."""
    starts = {path.stem: read_json(path) for path in (args.output_dir / "start").glob("*.json")}
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((args.output_dir / "runs").glob(f"*-steps{args.steps}.json")):
        runs.setdefault((run := read_json(path))["way"], []).append(run)
    source = [starts["source"]]
    names = {"text": args.text.name.split("-")[0], "other": args.other_text.stem}

    def table(found: dict[str, list[dict[str, Any]]], base: list[dict[str, Any]], more: str = "") -> list[str]:
        head = " | ".join(f"{name}: perplexity | against the source" for name in names.values())
        lines = [f"| way | {head} |{more}", "|---" * (5 + more.count("|")) + "|"]
        for way in (way for way in WAYS if way in found):
            cells = [way]
            for text in names:
                cells += [perplexity(found[way], text), against(found[way], text, base) if way != "source" else ""]
            if more:
                rates = {run["lr"] for run in runs[way]}
                cells += [f"{found[way][0]['lr']:g} (of {len(rates)})", str(len(found[way]))]
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    lines = table({way: [result] for way, result in starts.items()}, source)
    chosen = {way: [run for run in which if run["lr"] == best_rate(which)] for way, which in runs.items()}
    if "source" in chosen:
        lines += ["", f"After {args.steps} steps of {args.batch_size * args.length} tokens:", ""]
        lines += table(chosen, chosen["source"], " learning rate | seeds |")
    norms = source[0]["norms"]
    lines += [
        "",
        "| norms | largest \\|y\\|: least, median, most | above 1/(2k), 1/k at k = 0.1 | k: least, median, most |",
    ]
    lines += ["|---|---|---|---|"]
    for kind, found in by_kind(norms).items():
        far = [largest(norm) for norm in found]
        shares = (f"{mean(norm[key] for norm in found):.4%}" for key in ("share_falling", "share_negative"))
        ks = [norm["k"] for norm in found]
        lines.append(
            f"| {len(found)} {kind} | {min(far):.1f}, {median(far):.1f}, {max(far):.1f} | {', '.join(shares)} "
            f"| {min(ks):.4f}, {median(ks):.4f}, {max(ks):.4f} |"
        )
    write_file(args.output_dir / "tables.md", "\n".join(lines) + "\n")
    plot(norms, source[0]["width"], args.output_dir)
    return "\n".join(lines)


def largest(norm: dict[str, Any]) -> float:
    return max(abs(norm["largest"]), abs(norm["smallest"]))


def by_kind(norms: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Norms of the same name in every layer."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for norm in norms:
        kinds.setdefault(norm["name"].rsplit(".", 1)[-1], []).append(norm)
    return kinds


def plot(norms: list[dict[str, Any]], width: int, folder: Path) -> None:
    """Largest |y| by norm, in the order of the forward pass, and the k that it allows."""
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    axes = figure.subplots()
    order = {norm["name"]: index for index, norm in enumerate(norms)}
    for index, (kind, found) in enumerate(by_kind(norms).items()):
        places = [order[norm["name"]] for norm in found]
        heights = [*map(largest, found)]
        axes.plot(places, heights, plots.MARKERS[index], color=plots.COLORS[index], label=kind, markersize=4)
    for level, what in ((width**0.5, f"√{width}, the most that a row can hold"), (1 / PAPER_K, "1/k at k = 0.1")):
        axes.axhline(level, color="black", linewidth=0.8, linestyle="--")
        axes.text(0, level, what, va="bottom", fontsize=8)
    axes.set(xlabel=plots.DEPTH, ylabel="largest |y|", ylim=(0, 1.12 * width**0.5))
    axes.legend(fontsize=8, frameon=False, loc="lower center", ncols=3)
    proposed = axes.twinx()
    proposed.set(ylim=axes.get_ylim(), ylabel="k that keeps φ within 0.75 to 1.25")
    levels = [k for k in (0.05, 0.03, 0.02, 0.015, 0.0125, 0.0105) if 0.25 / k < axes.get_ylim()[1]]
    proposed.set_yticks([0.25 / k for k in levels], [f"{k:g}" for k in levels])
    save_figure(figure, folder / "norms", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a pretrained causal language model")
    parser.add_argument("--text", type=Path, required=True, help="text, or a MediaWiki dump; plain, .gz, .bz2 or .zip")
    parser.add_argument("--other_text", type=Path, required=True, help="another text, for testing alone")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--length", type=int, default=512, help="tokens in a segment")
    parser.add_argument("--segments", type=int, default=12, help="of each text, to test and to validate on")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=2, help="segments in a step")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[5e-5, 2e-4])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--train", nargs="*", choices=WAYS, default=["source", "simple-untie", "adanorm-k-calibrate"])
    parser.add_argument("--bfloat16", action="store_true", help="train (not test) under autocast")
    parser.add_argument("--summary_only", action="store_true", help="tables and picture of what is there")
    args = parser.parse_args()
    if not args.summary_only:
        claim(args.output_dir, args, free=FREE)
        data = Data(args)
        for way in AT_ONCE:
            start(way, args, data)
        for lr in args.learning_rates:
            for way in args.train:
                train(way, lr, 0, args, data)
        for seed in range(1, args.seeds):
            for way in args.train:
                lr = best_rate([train(way, lr, 0, args, data) for lr in args.learning_rates])
                train(way, lr, seed, args, data)
    print(summarize(args))


if __name__ == "__main__":
    main()
