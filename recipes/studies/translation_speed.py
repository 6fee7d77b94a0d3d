"""Target tokens a second of this recipe's batches, side by side with the usual ones.

    python recipes/studies/translation_speed.py --config recipes/configs/multi30k_de_en.yaml

The usual ones are those of transformers' `run_translation` example: a fixed number of sentences, drawn in random
order, padded to the longest on either side; here as many sentences as give the same mean number of target tokens.
Model, data, optimiser, loss and threads are the same. Both take turns in blocks of updates within one process, so that
whatever else the machine does falls on both; the speed of a block is its target tokens, padding apart, over its time.

Multi30k De-En with that config, one thread of a busy machine of two cores, 10 blocks of 5 updates: 1,374 against 592
target tokens a second, 2.2 times (quartiles of the ratio over blocks 2.0 and 2.8); padding in sources and targets 4
and 0.1 per cent against 54 and 52.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipes, where this file runs as a script

import numpy as np
import torch
import torch.nn.functional as F

from common.batches import train_batches
from common.checkpoints import write_json
from common.loop import Run
from common.options import option, parse_options
from common.results import versions
from tasks.data import data_content
from tasks.options import TranslationOptions
from tasks.translation import IGNORED, TranslationTask, decoder_inputs, prepare_translation


@dataclass(kw_only=True)
class SpeedOptions(TranslationOptions):
    """Options of the comparison; the rest are the translation recipe's."""

    blocks: int = option(10, "blocks of updates of either kind; the first of each is a warm-up")
    block_steps: int = option(10, "updates a block")


class SentencePlan:
    """Steps of a fixed number of sentences in random order; a `common.batches.Plan`."""

    def __init__(self, num_sentences: int, batch_size: int, seed: int):
        self.num_sentences, self.batch_size, self.seed = num_sentences, batch_size, seed

    def steps(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_sentences)
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def micro_batches(self, step: np.ndarray, rank: int) -> list[list[int]]:
        return [step.tolist()]


def endless(task: TranslationTask, plan: Any) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of all epochs."""
    for epoch in itertools.count():
        for _, micro_batches in train_batches(task.splits["train"], plan, epoch, collate=task.collate, count=len):
            yield micro_batches[0]


def run_block(
    model: Any, optimizer: Any, batches: Iterator[dict[str, torch.Tensor]], options: SpeedOptions
) -> tuple[float, float, float]:
    """Train on a block: target tokens a second, and the share of padding in sources and in targets."""
    tokens, sizes, padding = 0, np.zeros(2), np.zeros(2)
    started = time.perf_counter()
    for _ in range(options.block_steps):
        batch = next(batches)
        labels = batch.pop("labels")
        count = int((labels != IGNORED).sum())
        logits = model(**batch, decoder_input_ids=decoder_inputs(model, labels), use_cache=False).logits.float()
        loss = F.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            reduction="sum",
            ignore_index=IGNORED,
            label_smoothing=options.label_smoothing,
        )
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        tokens += count
        sizes += batch["attention_mask"].numel(), labels.numel()
        padding += int((batch["attention_mask"] == 0).sum()), labels.numel() - count
    seconds = time.perf_counter() - started
    return tokens / seconds, *(padding / sizes)


def main(argv: list[str] | None = None) -> None:
    """Time both in turns; print and write `speed.json` in `output_dir`."""
    options = parse_options(SpeedOptions, argv, __doc__)
    run = Run(options, argv, __file__, data_content)
    task = run.prepare(prepare_translation)
    model, optimizer, plan = run.model.train(), run.optimizer, task.plan
    steps = plan.steps(0)
    tokens_an_update = statistics.mean(map(plan.target_tokens, steps))
    sentences = round(tokens_an_update / statistics.mean(task.lengths["train"][1]))
    kinds = {
        "token budget": endless(task, plan),
        "fixed sentences": endless(task, SentencePlan(len(task.splits["train"]), sentences, options.seed)),
    }
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
    for _, (kind, batches) in itertools.product(range(options.blocks + 1), kinds.items()):
        found[kind].append(run_block(model, optimizer, batches, options))
    speeds = {kind: [block[0] for block in blocks[1:]] for kind, blocks in found.items()}
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    results = {
        "target_tokens_per_second": {kind: statistics.median(values) for kind, values in speeds.items()},
        "padding_source_target": {
            kind: [statistics.mean(block[side] for block in blocks) for side in (1, 2)]
            for kind, blocks in found.items()
        },
        "sentences_a_batch": sentences,
        "target_tokens_an_update": tokens_an_update,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "blocks": options.blocks,
        "block_steps": options.block_steps,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": versions(),
    }
    write_json(run.output_dir / "speed.json", results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
