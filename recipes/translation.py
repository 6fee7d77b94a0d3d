"""Train a translation model with AdaNorm, another norm of the paper, or LayerNorm as the control.

    accelerate launch recipes/translation.py --config recipes/configs/demo_en_de.yaml --norm adanorm --output_dir out/a
    accelerate launch --multi_gpu recipes/translation.py --config recipes/configs/iwslt14_de_en.yaml

A fresh model from `model_config` with a joint BPE tokeniser, or a pretrained one by name or folder; data by Hub id,
from tables or from plain text files; every option of `patch_model`. Batches are filled by `max_tokens`; a step's loss
is divided by its target tokens over all micro-batches and processes. The same command, started again, goes on from the
newest complete checkpoint in `output_dir`, in the middle of an epoch too.

In `output_dir`: `results.json`; the best model as `best/` (model, tokeniser and the settings of its search: translate
with `recipes/translate.py` or with stock `generate` after `import hf_adanorm`), the last as `last/`, the mean of the
last checkpoints as `average/` if asked for; `*_translations.jsonl` with source, reference and translation.

Exit codes: 0 finished, 2 bad input (said in one line before training starts), 3 the loss was not finite, 75 stopped by
SIGTERM after saving a checkpoint: start the same command again.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import AutoModelForSeq2SeqLM

from common.batches import eval_batches
from common.checkpoints import (
    EXIT_RESUME,
    Checkpoints,
    Interruption,
    Progress,
    write_json,
)
from common.evaluation import gather_by_index, is_better, main_first, peak_memory_mb, run_fresh_process
from common.fade import fade, finish_saved_fade, is_fading
from common.options import (
    OptimizationOptions,
    OptionError,
    PatchOptions,
    RunOptions,
    check_ranges,
    option,
    options_that_change,
    parse_options,
)
from common.publishing import prepare_push, publish
from common.results import versions
from common.setup import (
    ProgressBar,
    Stopwatch,
    allow_unused_parameters,
    apply_patch,
    calibration_rows,
    clear_endings,
    clear_errors,
    count_norms,
    learning_rate_at,
    make_accelerator,
    make_optimizer,
    norms_to_trackers,
    set_learning_rate,
)
from common.steps import check_trained, optimizer_step
from common.token_batches import TokenPlan, token_batches
from common.weight_average import load_average
from hf_adanorm.saving.files import write_file
from tasks.bleu import SCORES, translation_scores
from tasks.data import data_content
from tasks.parallel_text import SOURCE
from tasks.translation import (
    IGNORED,
    TranslationDataOptions,
    TranslationModelOptions,
    TranslationTask,
    decoder_inputs,
    prepare_translation,
    references,
    source_texts,
)

SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


@dataclass(kw_only=True)
class TranslationOptions(
    RunOptions, OptimizationOptions, TranslationDataOptions, TranslationModelOptions, PatchOptions
):
    """Options of the translation recipe."""

    max_tokens: int = option(4096, "most tokens of a micro-batch on each process, source or target, padding included")
    label_smoothing: float = option(0.1, "share of the target probability spread over the vocabulary")
    eval_batch_size: int = option(64, "sentences a batch on each process in evaluation")
    num_beams: int = option(5, "beams of the search")
    length_penalty: float = option(1.0, "a beam's score is divided by its length to this power")
    validation_search_samples: int | None = option(
        None, "translate only the first so many validation sentences during training; the loss is of all"
    )
    best_metric: Literal["loss", "sacrebleu", "sacrebleu_lowercase", "bleu_tokenized_lowercase", "chrf"] = option(
        "sacrebleu", "validation score that chooses the best checkpoint"
    )
    early_stopping_patience: int | None = option(
        None, "stop after so many evaluations in a row without a better best_metric"
    )
    average_checkpoints: int = option(0, "also test the mean of the weights of the last so many checkpoints")


def check_options(options: TranslationOptions, accelerator: Accelerator) -> None:
    """Raise OptionError for a number outside its range and for what cannot be combined."""
    for name in ("max_tokens", "eval_batch_size", "num_beams", "validation_search_samples", "early_stopping_patience"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name} must be positive, got {value}")
    if not 0 <= options.label_smoothing < 1:
        raise OptionError(f"--label_smoothing must be in [0, 1), got {options.label_smoothing}")
    if options.average_checkpoints < 0 or options.average_checkpoints == 1:
        raise OptionError(f"--average_checkpoints must be 0 or at least 2, got {options.average_checkpoints}")
    if options.average_checkpoints and accelerator.distributed_type in SHARDED:
        raise OptionError("--average_checkpoints does not go with FSDP or DeepSpeed; give --average_checkpoints 0")


def calibration_batch(model: torch.nn.Module, task: TranslationTask) -> dict[str, torch.Tensor]:
    """Training pairs as the model takes them."""
    batch = task.collate(calibration_rows(task.splits["train"]))
    return {**batch, "decoder_input_ids": decoder_inputs(model, batch.pop("labels"))}


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    task: TranslationTask,
    options: TranslationOptions,
    write_to: Path | None = None,
) -> dict[str, float]:
    """Loss a target token and the scores of beam search on the validation split; the same on every process.

    Every sentence counts once. `write_to` is given the translations beside the references, by the main process.
    """
    model.eval()
    data = task.splits["validation"]
    num_searched = min(options.validation_search_samples or len(data), len(data))
    searcher = accelerator.unwrap_model(model, keep_torch_compile=False)
    indices: list[int] = []
    outputs: list[tuple[float, int, str | None]] = []
    batches = eval_batches(
        data,
        [max(pair) for pair in zip(*task.lengths["validation"], strict=True)],
        options.eval_batch_size,
        collate=task.collate,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        workers=options.dataloader_workers,
    )
    for batch_indices, batch in batches:
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch, decoder_input_ids=decoder_inputs(searcher, labels), use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED).sum(-1)
        searched = [position for position, index in enumerate(batch_indices) if index < num_searched]
        texts: list[str | None] = [None] * len(batch_indices)
        if searched or accelerator.distributed_type in SHARDED:  # where the forward pass is a collective call
            rows = torch.tensor(searched or [0], device=accelerator.device)
            with accelerator.autocast():
                found = searcher.generate(
                    **{name: tensor[rows] for name, tensor in batch.items()},
                    synced_gpus=accelerator.distributed_type in SHARDED,
                )
            for position, text in zip(
                searched, task.tokenizer.batch_decode(found, skip_special_tokens=True), strict=False
            ):
                texts[position] = text
        indices += batch_indices
        outputs += zip(losses.tolist(), (labels != IGNORED).sum(-1).tolist(), texts, strict=True)
    outputs = gather_by_index(accelerator, indices, outputs, len(data))
    model.train()
    translations = task.restore([text for _, _, text in outputs[:num_searched]])
    raw = task.raw["validation"].select(range(num_searched))
    scores, _ = translation_scores(translations, references(raw), options.target_lang)
    if write_to is not None and accelerator.is_main_process:
        write_translations(write_to, raw, translations)
    loss = sum(output[0] for output in outputs) / sum(output[1] for output in outputs)
    return {**scores, "loss": loss}


def write_translations(path: Path, data: Any, translations: list[str]) -> None:
    """One JSON object a line: source, reference, translation."""
    rows = zip(data[SOURCE], references(data), translations, strict=True)
    names = ("source", "reference", "translation")
    write_file(
        path, "".join(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
    )


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Any,
    task: TranslationTask,
    plan: TokenPlan,
    checkpoints: Checkpoints,
    options: TranslationOptions,
) -> Progress:
    """The training loop: from the newest checkpoint to the last step, early stopping, or SIGTERM."""
    total_steps = options.max_steps or options.num_epochs * plan.num_steps
    progress = checkpoints.resume()
    if progress.step:
        accelerator.print(f"resuming from step {progress.step}")
    stopwatch = Stopwatch(progress)  # counts target tokens
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    # accelerate divides by the number of micro-batches, DDP by the number of processes: undo both, as the loss is
    # divided by the number of target tokens of the whole step.
    undo_mean = accelerator.num_processes * options.gradient_accumulation_steps
    running_loss = torch.zeros((), device=accelerator.device)
    running_steps = 0
    model.train()
    shown = options.progress_bar and accelerator.is_main_process
    bar = ProgressBar(total_steps, shown=shown, first_step=progress.step, unit="target tokens/s")
    watching = norms_to_trackers(accelerator, model, options, progress.step)
    with bar, Interruption(accelerator) as interruption, watching as send_norms:
        while progress.step < total_steps and not should_stop(progress, options):
            steps = token_batches(
                task.splits["train"],
                plan,
                progress.epoch,
                collate=task.collate,
                rank=accelerator.process_index,
                skip=progress.epoch_step,
                workers=options.dataloader_workers,
            )
            for num_tokens, micro_batches in steps:
                lr = learning_rate_at(progress.step, total_steps, options)
                set_learning_rate(optimizer, lr)
                fade(unwrapped, progress.step, total_steps, options)
                step_loss = torch.zeros((), device=accelerator.device)
                for batch in micro_batches:
                    batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
                    labels = batch.pop("labels")
                    with accelerator.accumulate(model):
                        inputs = decoder_inputs(unwrapped, labels)
                        logits = model(**batch, decoder_input_ids=inputs, use_cache=False).logits.float()
                        loss = F.cross_entropy(
                            logits.flatten(0, 1),  # (rows x longest target, vocabulary)
                            labels.flatten(),
                            reduction="sum",
                            ignore_index=IGNORED,
                            label_smoothing=options.label_smoothing,
                        )
                        accelerator.backward(loss / num_tokens * undo_mean)
                    step_loss += loss.detach() / num_tokens
                batch["decoder_input_ids"] = inputs
                applied = optimizer_step(accelerator, model, optimizer, step_loss, progress, options, batch)
                progress.step += 1
                send_norms(progress.step)
                progress.epoch_step += 1
                progress.skipped_steps += not applied
                stopwatch.step(num_tokens)
                running_loss += step_loss
                running_steps += 1

                end_of_epoch = progress.epoch_step == plan.num_steps
                if end_of_epoch:
                    progress.epoch, progress.epoch_step = progress.epoch + 1, 0
                last = progress.step == total_steps
                if progress.step % options.logging_steps == 0 or last:
                    train_loss = accelerator.reduce(running_loss, "sum").item() / running_steps
                    running_loss.zero_()
                    running_steps = 0
                    speed = stopwatch.samples_per_second
                    progress.train_history.append({"step": progress.step, "loss": train_loss})
                    accelerator.log({"train/loss": train_loss, "learning_rate": lr}, step=progress.step)
                    bar.log(progress.step, speed, train_loss, lr)
                bar.update(progress.step, stopwatch.samples_per_second)

                evaluate_now = last or (
                    progress.step % options.eval_steps == 0 if options.eval_steps else end_of_epoch
                )
                if evaluate_now:
                    stopwatch.pause()
                    faded = fade(unwrapped, progress.step, total_steps, options)
                    written = checkpoints.folder / "validation_translations.jsonl"
                    scores = evaluate(accelerator, model, task, options, write_to=written)
                    note_scores(accelerator, model, task, checkpoints, progress, scores, options, eligible=faded)
                    last |= should_stop(progress, options)
                    stopwatch.resume()
                interrupted = interruption.requested()
                save_now = evaluate_now or interrupted
                if options.checkpointing_steps:
                    save_now = last or interrupted or progress.step % options.checkpointing_steps == 0
                if save_now:
                    stopwatch.pause()
                    checkpoints.save(progress)
                    stopwatch.resume()
                if interrupted and not last:
                    accelerator.print(f"stopped by SIGTERM at step {progress.step}; start the same command to resume")
                    accelerator.end_training()
                    sys.exit(EXIT_RESUME)
                if last:
                    break
    return progress


def should_stop(progress: Progress, options: TranslationOptions) -> bool:
    """Whether the last `early_stopping_patience` evaluations all were no better than the best before them."""
    if options.early_stopping_patience is None or progress.best_step is None:
        return False
    since = [entry for entry in progress.history if entry["step"] > progress.best_step]
    return len(since) >= options.early_stopping_patience


def save_model(accelerator: Accelerator, model: torch.nn.Module, task: TranslationTask, folder: Path) -> None:
    """Write model and tokeniser as stock `from_pretrained` reads them. Called on every process."""
    state_dict = accelerator.get_state_dict(model)  # a collective call
    accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(
        folder, state_dict=state_dict, is_main_process=accelerator.is_main_process
    )
    if accelerator.is_main_process:
        task.tokenizer.save_pretrained(folder)


def note_scores(
    accelerator: Accelerator,
    model: torch.nn.Module,
    task: TranslationTask,
    checkpoints: Checkpoints,
    progress: Progress,
    scores: dict[str, float],
    options: TranslationOptions,
    *,
    eligible: bool,
) -> None:
    """Record an evaluation; save the model when it is eligible and the best so far (the earlier one of equals)."""
    progress.history.append({"step": progress.step, "epoch": progress.epoch, **scores})
    accelerator.log({f"validation/{name}": value for name, value in scores.items()}, step=progress.step)
    shown = ", ".join(
        f"{name} {value:.4f}" if name == "loss" else f"{name} {value:.2f}" for name, value in scores.items()
    )
    accelerator.print(f"step {progress.step}: validation {shown}")
    name = options.best_metric
    if not eligible or not is_better(scores, progress.best_metrics, name, higher=name != "loss"):
        return
    checkpoints.save_best(progress.step, lambda folder: save_model(accelerator, model, task, folder))
    progress.best_step, progress.best_metrics = progress.step, scores


def test_scores(
    model_dir: Path, task: TranslationTask, options: TranslationOptions, precision: str, write_to: Path
) -> tuple[dict[str, float], dict[str, str]]:
    """Scores on the test split of the saved model, loaded by stock `from_pretrained` in a fresh process."""
    data = task.raw["test"]
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "source.txt", Path(folder) / "translations.txt"
        source.write_text("\n".join(source_texts(data, options.source_prefix)) + "\n", encoding="utf-8")
        arguments = ["--model", str(model_dir.resolve()), "--input", str(source), "--output", str(output)]
        arguments += ["--mixed_precision", precision, "--batch_size", str(options.eval_batch_size)]
        if options.source_lang_code is not None:
            arguments += ["--source_lang_code", options.source_lang_code]
        run_fresh_process(Path(__file__).with_name("translate.py"), arguments)
        translations = task.restore(output.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    write_translations(write_to, data, translations)
    return translation_scores(translations, references(data), options.target_lang)


def main(argv: list[str] | None = None) -> None:
    """Set up, train, test the best model in a fresh process, write `results.json`."""
    options = parse_options(TranslationOptions, argv, __doc__)
    output_dir = Path(options.output_dir)
    with clear_errors():
        check_ranges(options)
        accelerator = make_accelerator(options, options)
        check_options(options, accelerator)
        content = main_first(accelerator, lambda: data_content(options) if accelerator.is_main_process else {})
        checkpoints = Checkpoints(
            output_dir,
            accelerator,
            asdict(options),
            content=content,
            free=options_that_change(TranslationOptions, "onward", "nothing"),
            keep=max(options.save_total_limit, options.average_checkpoints),
            overwrite=options.overwrite_output_dir,
        )
        resuming = checkpoints.check_resumable() is not None
        if accelerator.is_main_process:
            prepare_push(options)
        if resuming and (output_dir / "results.json").exists():
            accelerator.print(f"{output_dir} holds a finished run with these options; nothing to do")
            if options.push_to_hub and accelerator.is_main_process:
                finished = json.loads((output_dir / "results.json").read_text(encoding="utf-8"))
                publish(output_dir / "best", finished, options, "translation")
            return
        task = prepare_translation(options, accelerator, output_dir, resuming)
        set_seed(options.seed)  # the same initialisation whatever happened before, for every norm
        model = main_first(accelerator, task.build_model)
        apply_patch(model, options, lambda: calibration_batch(model, task))
        norm_modules = count_norms(model, options.norm)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        plan = TokenPlan(
            *task.lengths["train"],
            options.max_tokens,
            seed=options.seed,
            num_processes=accelerator.num_processes,
            accumulation=options.gradient_accumulation_steps,
        )
    set_seed(options.seed, device_specific=True)  # other dropout masks on every process
    optimizer = make_optimizer(model, options)
    allow_unused_parameters(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2:  # beam search enters below the forward pass, where parameters would be left in shards
        register_fsdp_forward_method(model, "generate")
    if options.report_to:
        accelerator.init_trackers("translation", config={k: str(v) for k, v in asdict(options).items()})
    num_pairs, num_tokens = len(task.splits["train"]), sum(task.lengths["train"][1])
    accelerator.print(
        f"{num_parameters:,} parameters, {norm_modules} norms ({options.norm}); {num_pairs:,} training pairs, "
        f"{num_tokens:,} target tokens, {plan.num_steps:,} updates an epoch"
    )
    results = {
        "norm": options.norm,
        "norm_modules": norm_modules,
        "seed": options.seed,
        "parameters": num_parameters,
        "num_processes": accelerator.num_processes,
        "command": shlex.join(["recipes/translation.py", *(sys.argv[1:] if argv is None else argv)]),
        "versions": versions(),
        "options": asdict(options),
        "content": content,
    }
    with clear_endings(accelerator, output_dir, results):
        progress = train(accelerator, model, optimizer, task, plan, checkpoints, options)
        check_trained(progress)
        folders = {"": checkpoints.promote_best(progress.best_step)}
        with checkpoints.staged(output_dir / "last") as temporary:
            save_model(accelerator, model, task, temporary)
        if options.average_checkpoints:
            steps = load_average(accelerator.unwrap_model(model), output_dir, options.average_checkpoints)
            folders["average_"] = output_dir / "average"
            scores = evaluate(accelerator, model, task, options)
            with checkpoints.staged(folders["average_"]) as temporary:
                save_model(accelerator, model, task, temporary)
            results |= {"average_steps": steps, "average_validation": scores}
        if is_fading(model, options) and accelerator.is_main_process:
            for folder in {*folders.values(), output_dir / "last"}:
                finish_saved_fade(folder, AutoModelForSeq2SeqLM)
        precision, is_main = accelerator.mixed_precision, accelerator.is_main_process
        accelerator.end_training()  # the other processes are done: they need not wait for the test
        if not is_main:
            return
        tokens_per_second = Stopwatch(progress).samples_per_second
        results |= {
            "validation": progress.best_metrics,
            "test": None,
            # Sentence pairs: target tokens a second by the mean length of a training target.
            "train_samples_per_second": tokens_per_second and tokens_per_second * num_pairs / num_tokens,
            "train_target_tokens_per_second": tokens_per_second,
            "train_samples": num_pairs,
            "train_tokens": num_tokens,
            "target_tokens": progress.samples,
            "steps": progress.step,
            "steps_per_epoch": plan.num_steps,
            "seconds_per_step": Stopwatch(progress).seconds_per_step,
            "best_step": progress.best_step,
            "skipped_steps": progress.skipped_steps,
            "peak_memory_mb": peak_memory_mb(),
            "history": progress.history,
            "train_history": progress.train_history,
        }
        if "test" in task.raw:
            for prefix, folder in folders.items():
                write_to = output_dir / f"{prefix}test_translations.jsonl"
                results[f"{prefix}test"], results["signatures"] = test_scores(
                    folder, task, options, precision, write_to
                )
        write_json(output_dir / "results.json", results)
        for name in ("validation", "test", "average_validation", "average_test"):
            if results.get(name):
                shown = ", ".join(f"{score} {results[name][score]:.2f}" for score in SCORES)
                print(f"{options.norm}, seed {options.seed}: {name} {shown}", flush=True)
        publish(output_dir / "best", results, options, "translation")


if __name__ == "__main__":
    main()
