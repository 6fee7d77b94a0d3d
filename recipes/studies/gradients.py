"""What does a norm do to the gradient? Train a small deep post-norm Transformer with each norm, watch, draw.

    python recipes/studies/gradients.py --output_dir outputs/gradients
    python recipes/studies/gradients.py --train_file rt/train.jsonl --norms [adanorm,layernorm] --num_layers 12
    python recipes/studies/gradients.py --train_file pairs.jsonl --text_column de --target_column en

Texts with labels train a classifier (BERT), pairs of texts an encoder-decoder (Marian); both are post-norm, and every
norm starts from the same weights and sees the same batches. In `output_dir`: `gradients.json` (every record and loss)
and pictures: |mean| and variance of the gradient by depth, Theorem 1 in one model, variance over steps, losses, and
phi with the activations that it met.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipes, where this file runs as a script

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, BertConfig, MarianConfig, MarianMTModel

from common.checkpoints import write_json
from common.options import option, parse_options
from comparison.contestants import parse_norm, title_of
from hf_adanorm import patch_model, plots, watch_norms
from tasks.data import load_file, resolve_labels
from tasks.tokenization import train_encoder_tokenizer

DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass(kw_only=True)
class StudyOptions:
    """Options of the study."""

    train_file: str = option(str(DATA / "programs" / "train.jsonl.gz"), "texts with labels, or pairs of texts")
    text_column: str = option("text", "column of the text")
    label_column: str = option("label", "column of the label, for a classifier")
    target_column: str | None = option(None, "column of the second text, for an encoder-decoder")
    norms: list[str] = option(
        ["adanorm", "layernorm", "layernorm-simple", "detachnorm"],
        "norms to compare, also with settings, as in compare.py",
    )
    num_layers: int = option(12, "layers (of the encoder, and of the decoder)")
    width: int = option(64, "hidden size")
    initializer_range: float | None = option(
        None, "standard deviation of the initial weights; by default as wide as BERT-base's 0.02 is for its width"
    )
    num_steps: int = option(150, "optimiser steps for each norm")
    every: int = option(5, "record every so many steps")
    dropout: float = option(0.1, "dropout", within="[0, 1)")
    batch_size: int = option(32, "texts a step", within="(0, inf)")
    max_length: int = option(40, "longest text in tokens", within="[3, inf)")
    learning_rate: float = option(5e-4, "Adam's learning rate, after 20 steps of warm-up", within="(0, inf)")
    seed: int = option(1, "seed of the weights and of the order of the data", within="[0, 4294967295]")
    num_threads: int = option(1, "threads of torch")
    output_dir: str = option("outputs/gradients", "where the numbers and the pictures go")


Build = Callable[[], torch.nn.Module]
Encode = Callable[[Dataset, Sequence[int]], dict[str, Any]]


def prepare(options: StudyOptions) -> tuple[Build, Callable[[], Iterator[dict[str, Any]]], Encode]:
    """(what builds the model, what starts the stream of batches, what makes one of rows of any split)."""
    data = load_file(options.train_file)
    columns = [column for column in (options.text_column, options.target_column) if column is not None]
    tokenizer = train_encoder_tokenizer(
        (text for column in columns for text in data[column]),
        kind="word",
        vocab_size=8000,
        min_frequency=2,
        lowercase=True,
        max_length=options.max_length,
    )
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    # What a layer adds to the residual stream grows with range * sqrt(width).
    initial = options.initializer_range or 0.02 * (768 / options.width) ** 0.5
    if options.target_column is None:
        names, _ = resolve_labels({"train": data}, options.label_column, None)
        config: Any = BertConfig(
            **sizes,
            hidden_size=options.width,
            num_hidden_layers=options.num_layers,
            num_attention_heads=4,
            intermediate_size=4 * options.width,
            max_position_embeddings=options.max_length,
            num_labels=len(names),
            initializer_range=initial,
            hidden_dropout_prob=options.dropout,
            attention_probs_dropout_prob=options.dropout,
        )
        build: Build = lambda: AutoModelForSequenceClassification.from_config(config)  # noqa: E731
    else:
        size = {"layers": options.num_layers, "attention_heads": 4, "ffn_dim": 4 * options.width}
        both = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in size.items()}
        config = MarianConfig(
            **sizes,
            **both,
            d_model=options.width,
            init_std=initial,
            attention_dropout=options.dropout,
            dropout=options.dropout,
            max_position_embeddings=options.max_length,
            decoder_start_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.sep_token_id,
        )
        build = lambda: MarianMTModel(config)  # noqa: E731

    def encode(split: Dataset, rows: Sequence[int]) -> dict[str, Any]:
        chosen = split[list(rows)]
        encoded = [tokenizer(chosen[column], truncation=True, padding=True, return_tensors="pt") for column in columns]
        if options.target_column is None:
            labels = [
                label if isinstance(label, int) else names.index(label) for label in chosen[options.label_column]
            ]
            return {**encoded[0], "labels": torch.tensor(labels)}
        targets = encoded[1]["input_ids"].masked_fill(encoded[1]["attention_mask"] == 0, -100)
        return {**encoded[0], "labels": targets}

    def batches() -> Iterator[dict[str, Any]]:
        order = random.Random(options.seed)
        while True:
            yield encode(data, order.sample(range(len(data)), options.batch_size))

    return build, batches, encode


def main() -> None:
    """Train with each norm, then write the numbers and draw the pictures."""
    options = parse_options(StudyOptions, description=__doc__)
    norms = {title_of(name): parse_norm(name) for name in options.norms}
    torch.set_num_threads(options.num_threads)
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    build, batches, _ = prepare(options)
    logs, losses = {}, {}
    for label, (norm, settings) in norms.items():
        torch.manual_seed(options.seed)
        model = build().train()
        if norm != "layernorm":
            patch_model(model, norm, **settings)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98))
        stream = batches()
        losses[label] = []
        with watch_norms(model, every=options.every, histogram=True) as logs[label]:
            for step in range(options.num_steps):
                for group in optimizer.param_groups:
                    group["lr"] = options.learning_rate * min(1.0, (step + 1) / 20)
                loss = model(**next(stream)).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses[label].append(loss.item())
        print(
            f"{label}: loss {sum(losses[label][-20:]) / len(losses[label][-20:]):.4f} over the last 20 steps",
            flush=True,
        )
    records = {label: log.to_rows() for label, log in logs.items()}
    write_json(output_dir / "gradients.json", {"options": vars(options), "losses": losses, "records": records})
    draw(logs, losses, output_dir)


def draw(logs: dict[str, Any], losses: dict[str, list[float]], output_dir: Path) -> None:
    """Write the pictures as PNG."""
    pictures = {
        "gradients": plots.plot_gradients(logs)[0],
        "losses": plots.plot_losses(losses, smooth=9),
    }
    for label, log in logs.items():
        name = re.sub(r"[^\w.]+", "-", label.lower().replace("/", "")).strip("-")
        pictures[f"theorem-{name}"] = plots.plot_theorem(log)[0]
        pictures[f"steps-{name}"] = plots.plot_heatmap(log)
        pictures[f"phi-{name}"] = plots.plot_phi(log)
    for name, ax in pictures.items():
        ax.figure.savefig(output_dir / f"{name}.png", dpi=120)


if __name__ == "__main__":
    main()
