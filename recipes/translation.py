"""Train a translation model with AdaNorm, another norm, or LayerNorm as the control.

    accelerate launch recipes/translation.py --config recipes/configs/demo_en_de.yaml --norm adanorm --output_dir out/a
    accelerate launch --multi_gpu recipes/translation.py --config recipes/configs/iwslt14_de_en.yaml

The model is fresh, from `model_config` with a joint BPE tokenizer, or pretrained, from a name or a folder. The data
come from the Hub, from tables or from plain text files. `max_tokens` fills the batches; a step's loss is divided by
its target tokens over all micro-batches and processes. Run the same command again to resume from the newest complete
checkpoint in `output_dir`.

`output_dir` then contains `results.json`, the best model as `best/`, the last one as `last/`, on request the mean of
the last checkpoints as `average/`, and `*_translations.jsonl` with source, reference and translation. Translate with
`recipes/translate.py`, or with stock `generate` after `import hf_adanorm`.
"""

from __future__ import annotations

from common.options import parse_options
from tasks.options import TranslationOptions

if __name__ == "__main__":  # help, and mistakes in the options, before torch is imported
    parse_options(TranslationOptions, description=__doc__)

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import register_fsdp_forward_method

from common.loop import Run
from common.weight_average import load_average
from hf_adanorm.saving import write_file
from tasks.bleu import translation_scores
from tasks.data import data_content
from tasks.parallel_text import SOURCE
from tasks.translation import (
    IGNORED,
    SHARDED,
    TranslationTask,
    decoder_inputs,
    prepare_translation,
    references,
    translate_arguments,
)

OPTIONS, TASK = TranslationOptions, TranslationTask


def evaluate(run: Run, task: TranslationTask, write_to: Path | None = None) -> dict[str, float]:
    """Return the loss per target token and the scores of beam search on validation, the same on every process.

    The main process writes the translations and references to `write_to`.
    """
    data = task.splits["validation"]
    num_searched = min(run.options.validation_search_samples or len(data), len(data))
    sharded = run.accelerator.distributed_type in SHARDED  # where the forward pass is a collective call

    def outputs_of(batch: dict[str, torch.Tensor], indices: list[int]) -> list[tuple[float, int, str | None]]:
        labels = batch.pop("labels")
        inputs = decoder_inputs(run.bare, labels)
        logits = run.model(**batch, decoder_input_ids=inputs, use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED).sum(-1)
        searched = [position for position, index in enumerate(indices) if index < num_searched]
        texts: list[str | None] = [None] * len(indices)
        if searched or sharded:
            rows = torch.tensor(searched or [0], device=labels.device)
            with run.accelerator.autocast():
                chosen = {name: tensor[rows] for name, tensor in batch.items()}
                found = run.bare.generate(**chosen, synced_gpus=sharded)
            decoded = task.processor.batch_decode(found, skip_special_tokens=True)
            for position, text in zip(searched, decoded, strict=False):
                texts[position] = text
        return list(zip(losses.tolist(), (labels != IGNORED).sum(-1).tolist(), texts, strict=True))

    lengths = [max(pair) for pair in zip(*task.lengths["validation"], strict=True)]
    outputs = run.evaluate(data, lengths, task.collate, outputs_of)
    translations = task.restore([text for _, _, text in outputs[:num_searched]])
    raw = task.raw["validation"].select(range(num_searched))
    scores, _ = translation_scores(translations, references(raw), run.options.target_lang)
    if write_to is not None and run.is_main:
        write_translations(write_to, raw, translations)
    return {**scores, "loss": sum(output[0] for output in outputs) / sum(output[1] for output in outputs)}


def write_translations(path: Path, data: Any, translations: list[str]) -> None:
    """Write one JSON object per line: source, reference, translation."""
    rows = zip(data[SOURCE], references(data), translations, strict=True)
    names = ("source", "reference", "translation")
    lines = (json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in rows)
    write_file(path, "".join(line + "\n" for line in lines))


def test_scores(
    run: Run, task: TranslationTask, model: Path, write_to: Path
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the scores of the saved model on the test split, from a fresh process that loads it by stock calls."""
    options, data = run.options, task.raw["test"]
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "source.txt", Path(folder) / "translations.txt"
        sentences = [text.replace("\n", " ") for text in data[SOURCE]]
        source.write_text("\n".join(sentences) + "\n", encoding="utf-8")
        said = translate_arguments(options)
        run.fresh_process("translate.py", model=model.resolve(), input=source, output=output, **said)
        translations = task.restore(output.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    write_translations(write_to, data, translations)
    return translation_scores(translations, references(data), options.target_lang)


def main(argv: list[str] | None = None) -> None:
    """Set up, train, test the best model in a fresh process, and write `results.json`."""
    options = parse_options(TranslationOptions, argv, __doc__)
    run = Run(options, argv, __file__, data_content)
    if run.finished:
        return
    task = run.prepare(prepare_translation)
    if run.accelerator.is_fsdp2:  # beam search starts below the forward pass, where parameters would stay in shards
        register_fsdp_forward_method(run.model, "generate")
    output_dir = run.output_dir
    with run.training():
        for step in run:
            for batch in step:
                labels = batch.pop("labels")
                inputs = {**batch, "decoder_input_ids": decoder_inputs(run.bare, labels)}
                logits = run.model(**inputs, use_cache=False).logits.float()
                loss = F.cross_entropy(
                    logits.flatten(0, 1),  # (rows x longest target, vocabulary)
                    labels.flatten(),
                    reduction="sum",
                    ignore_index=IGNORED,
                    label_smoothing=options.label_smoothing,
                )
                run.backward(loss / step.size, inputs)
            if step.evaluates:
                run.note(evaluate(run, task, write_to=output_dir / "validation_translations.jsonl"))
        folders = {"": run.best()}
        with run.checkpoints.staged(output_dir / "last") as temporary:
            run.save_model(temporary)
        results: dict[str, Any] = {"test": None}
        if options.average_checkpoints:
            steps = load_average(run.bare, output_dir, options.average_checkpoints)
            folders["average_"] = output_dir / "average"
            results |= {"average_steps": steps, "average_validation": evaluate(run, task)}
            with run.checkpoints.staged(folders["average_"]) as temporary:
                run.save_model(temporary)
        if not run.alone():
            return
        num_pairs, num_tokens = len(task.train_data), sum(task.lengths["train"][1])
        speed = run.stopwatch.samples_per_second  # in target tokens
        results |= {
            # Sentence pairs: target tokens a second by the mean length of a training target.
            "train_samples_per_second": speed and speed * num_pairs / num_tokens,
            "train_target_tokens_per_second": speed,
            "train_samples": num_pairs,
            "train_tokens": num_tokens,
            "target_tokens": run.progress.samples,
        }
        for prefix, folder in folders.items() if "test" in task.raw else ():
            written = output_dir / f"{prefix}test_translations.jsonl"
            results[f"{prefix}test"], results["signatures"] = test_scores(run, task, folder, written)
        run.write_results(results)


if __name__ == "__main__":
    main()
