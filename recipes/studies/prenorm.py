"""A trained pre-norm LayerNorm model, changed to layernorm-simple or AdaNorm by dropping or by folding.

    python recipes/studies/prenorm.py --text FILE [FILE ...] --output_dir OUT

Trains a small GPT-2 with LayerNorm on the bytes of the files, then swaps its norms in four ways and trains each on:

    drop x layernorm-simple     gains and biases are lost
    drop x adanorm              ... and k is there at once
    fold x layernorm-simple     the same function, to rounding (the final norm, whose head is tied, fades)
    fold x adanorm              the same function at first, then k rises over as many steps as the first training's
    half

and LayerNorm itself goes on as the yardstick. Reported: validation loss right after the swap, after a tenth of the
original steps, and after as many again; `loss.png` and `.svg` draw the way there. Files may be gzipped. A killed study
goes on with the way it was at. Raises FileNotFoundError for a missing file, OptionError when OUT holds runs with other
options.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import os
import sys
import time
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipes, where this file runs as a script

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from common.checkpoints import write_json
from comparison.report import save_figure
from hf_adanorm import patch_model, plots, set_fade
from hf_adanorm.fading import fade_at
from studies.folder import claim, read_json
from studies.steps import update

WAYS = ("layernorm", "drop layernorm-simple", "drop adanorm", "fold layernorm-simple", "fold adanorm")


def read_bytes(paths: list[Path]) -> Tensor:
    """uint8 (N,)"""
    parts = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        raw = path.read_bytes()
        parts.append(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    return torch.frombuffer(bytearray(b"\n".join(parts)), dtype=torch.uint8)


def batches(data: Tensor, size: int, length: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(data) - length, (size,), generator=generator).tolist()
        yield torch.stack([data[start : start + length] for start in starts]).long()  # (B, T)


@torch.no_grad()
def validation_loss(model: nn.Module, data: Tensor, args: argparse.Namespace) -> float:
    """Nats per byte over a fixed sample."""
    model.eval()
    source = batches(data, args.batch_size, args.length, seed=1234)
    losses = [float(model(input_ids=ids, labels=ids).loss) for ids, _ in zip(source, range(8), strict=False)]
    model.train()
    return mean(losses)


def train(
    model: nn.Module,
    data: Tensor,
    held_out: Tensor,
    args: argparse.Namespace,
    *,
    seed: int,
    report_at: list[int],
    fade_steps: int = 0,
) -> tuple[list[float], list[float]]:
    """(training losses, validation losses after the steps of `report_at`), constant rate after a short warm-up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    losses, reported = [], []
    model.train()
    for step, ids in zip(range(max(report_at)), batches(data, args.batch_size, args.length, seed), strict=False):
        if fade_steps:
            set_fade(model, fade_at(step + 1, fade_steps))
        loss = model(input_ids=ids, labels=ids).loss
        update(model, optimizer, loss, args.lr * min((step + 1) / 10, 1.0))
        losses.append(loss.item())
        if step + 1 in report_at:
            reported.append(validation_loss(model, held_out, args))
    return losses, reported


def swap(model: nn.Module, way: str) -> bool:
    """Swap in place; whether anything fades."""
    if way == "layernorm":
        return False
    affine, norm = way.split()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what dropping does is what is measured
        patch_model(model, norm, affine=affine, on_unfoldable="fade" if affine == "fold" else "keep")
    return affine == "fold"


def trained_source(seed: int, training: Tensor, held_out: Tensor, args: argparse.Namespace) -> GPT2LMHeadModel:
    """The LayerNorm model that everything starts from, trained once and kept in the output folder."""
    folder = args.output_dir / f"source-steps{args.steps}-seed{seed}"
    if (folder / "config.json").is_file():
        return GPT2LMHeadModel.from_pretrained(folder).train()
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256, n_positions=args.length, n_embd=args.width, n_layer=args.layers, n_head=4,
        bos_token_id=None, eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    train(model, training, held_out, args, seed=seed, report_at=[args.steps])
    partial = folder.with_suffix(".partial")
    model.save_pretrained(partial)
    os.replace(partial, folder)
    return model


def study(seed: int, training: Tensor, held_out: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """The results of every way with one seed; those that a killed study left behind are kept."""
    path = args.output_dir / f"results-steps{args.steps}-seed{seed}.json"
    results = read_json(path) if path.is_file() else {}
    source = trained_source(seed, training, held_out, args)
    gains = torch.cat([m.weight.detach() for m in source.modules() if isinstance(m, nn.LayerNorm)])
    spread = f"{gains.mean():.2f} +- {gains.std():.2f}"
    print(f"seed {seed}: {source.num_parameters():,} parameters, {len(training):,} bytes, gains {spread}", flush=True)
    for way in WAYS:
        if way in results:
            continue
        started = time.time()
        model = copy.deepcopy(source)
        fades = swap(model, way)
        after = validation_loss(model, held_out, args)
        losses, reported = train(
            model,
            training,
            held_out,
            args,
            seed=seed + 1,
            report_at=[max(args.steps // 10, 1), args.steps],
            fade_steps=args.steps // 2 if fades else 0,
        )
        results[way] = {"after": after, "tenth": reported[0], "end": reported[1], "losses": losses}
        write_json(path, results)
        print(f"{way}: {after:.3f} {reported[0]:.3f} {reported[1]:.3f} ({time.time() - started:.0f} s)", flush=True)
    return results


def plot(found: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """How far the training loss is above that of LayerNorm, which goes on with the same batches, against the step: the
    mean over seeds and a running mean over steps."""
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots()
    window = max(args.steps // 100, 1)
    axes.axhline(0.0, color="black", linewidth=1.2, label="layernorm")
    for index, way in enumerate(WAYS[1:]):
        losses = torch.tensor([results[way]["losses"] for results in found]).mean(0)
        losses -= torch.tensor([results["layernorm"]["losses"] for results in found]).mean(0)
        smooth = F.avg_pool1d(losses[None, None], window, 1)[0, 0]
        steps = range(window, window + len(smooth))
        axes.plot(steps, smooth, color=plots.COLORS[index], linestyle=plots.LINES[index], label=way, linewidth=1.6)
    axes.set(
        xscale="log",
        xlabel="optimizer step after the swap",
        ylabel="loss above LayerNorm's\n(nats a byte)",
        title=f"Training after the swap, mean over {len(found)} seeds and {window} steps",
    )
    axes.legend(fontsize=8, frameon=False)
    save_figure(figure, args.output_dir / "loss", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000, help="of the first training, and of each that follows")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="bytes of context")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    data = read_bytes(args.text)
    split = len(data) * 9 // 10
    claim(args.output_dir, args, free=("seeds", "steps", "output_dir"))
    found = [study(seed, data[:split], data[split:], args) for seed in range(args.seeds)]
    print(f"| way | right after | after {max(args.steps // 10, 1)} steps | after {args.steps} steps |")
    print("|---|---|---|---|")
    for way in WAYS:
        cells = []
        for key in ("after", "tenth", "end"):
            values = [results[way][key] for results in found]
            cells.append(f"{mean(values):.3f}" + (f" +- {stdev(values):.3f}" if len(values) > 1 else ""))
        print(f"| {way} | {' | '.join(cells)} |")
    plot(found, args)


if __name__ == "__main__":
    main()
