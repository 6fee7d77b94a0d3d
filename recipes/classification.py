"""Train a classifier of texts or images with AdaNorm, another norm of the paper, or LayerNorm as the control.

    accelerate launch recipes/classification.py --config recipes/configs/demo.yaml --norm adanorm
    accelerate launch --multi_gpu recipes/classification.py --config recipes/configs/rt.yaml --mixed_precision bf16

A fresh model from `model_config`, or a pretrained one by name or folder; data by Hub id or from local files; every
option of `patch_model`. The same command, started again, goes on from the newest complete checkpoint in `output_dir`,
in the middle of an epoch too. In `output_dir`: `results.json`, the best model as `best/` (model and tokeniser: load it
with `pipeline("text-classification", ...)` after `import hf_adanorm`), and `checkpoint-N/`.

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
from accelerate.utils import set_seed

from common.batches import Plan, StepPlan, eval_batches, train_batches
from common.checkpoints import EXIT_RESUME, Checkpoints, Interruption, Progress, write_json
from common.evaluation import (
    gather_by_index,
    is_better,
    load_metric,
    main_first,
    mean,
    peak_memory_mb,
    run_fresh_process,
)
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
from common.results import format_results, versions
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
from common.token_batches import TokenPlan
from tasks.data import data_content
from tasks.images import ImageOptions, prepare_image
from tasks.text import ModelOptions, Task, TextOptions, prepare_text


@dataclass(kw_only=True)
class ClassificationOptions(RunOptions, OptimizationOptions, TextOptions, ImageOptions, ModelOptions, PatchOptions):
    """Options of the classification recipe."""

    task: Literal["text", "image"] = option("text", "what is classified: texts, or pairs of them, or images")
    batch_size: int = option(32, "training examples a micro-batch on each process")
    max_tokens: int | None = option(
        None, "texts: a micro-batch holds as many as fit in so many tokens, padding included; wins over batch_size"
    )
    eval_batch_size: int = option(64, "examples a batch on each process in evaluation")


TASKS = {"text": prepare_text, "image": prepare_image}
PIPELINES = {"text": "text-classification", "image": "image-classification"}


def make_plan(lengths: list[int], options: ClassificationOptions, num_processes: int) -> Plan:
    """Batches of so many examples, or of so many tokens. Raises OptionError for tokens of images."""
    settings: dict[str, Any] = {
        "seed": options.seed,
        "num_processes": num_processes,
        "accumulation": options.gradient_accumulation_steps,
    }
    if options.max_tokens is None:
        return StepPlan(lengths, options.batch_size, **settings)
    if options.task != "text":
        raise OptionError(f"--max_tokens counts those of texts; for task {options.task} give --batch_size")
    return TokenPlan(lengths, lengths, options.max_tokens, **settings)


def calibration_batch(task: Task) -> dict[str, torch.Tensor]:
    """Training examples, as evaluation shows them to the model."""
    batch = task.collate(calibration_rows(task.splits["train"]))
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: torch.nn.Module, task: Task, split: str, metric: Any, options: Any
) -> dict[str, float]:
    """Loss and accuracy on a split, every example counted once; the same on every process."""
    model.eval()
    data = task.splits[split]
    indices: list[int] = []
    outputs: list[tuple[int, float]] = []
    batches = eval_batches(
        data,
        task.lengths[split],
        options.eval_batch_size,
        collate=task.collate,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        workers=options.dataloader_workers,
    )
    for batch_indices, batch in batches:
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()  # (batch, classes)
        losses = F.cross_entropy(logits, labels, reduction="none")
        indices += batch_indices
        outputs += zip(logits.argmax(-1).tolist(), losses.tolist(), strict=True)
    outputs = gather_by_index(accelerator, indices, outputs, len(data))
    model.train()
    accuracy = metric.compute(predictions=[output[0] for output in outputs], references=data["labels"][:])
    return {**accuracy, "loss": mean([output[1] for output in outputs])}


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Any,
    task: Task,
    plan: Plan,
    checkpoints: Checkpoints,
    options: ClassificationOptions,
) -> Progress:
    """The training loop: from the newest checkpoint to the last step, or until SIGTERM."""
    metric = main_first(accelerator, lambda: load_metric("accuracy"))
    total_steps = options.max_steps or options.num_epochs * plan.num_steps
    progress = checkpoints.resume()
    if progress.step:
        accelerator.print(f"resuming from step {progress.step}")
    stopwatch = Stopwatch(progress)
    # accelerate divides by the number of micro-batches, DDP by the number of processes: undo both, as the loss is
    # divided by the number of examples of the whole step.
    undo_mean = accelerator.num_processes * options.gradient_accumulation_steps
    running_loss = torch.zeros((), device=accelerator.device)
    running_steps = 0
    model.train()
    shown = options.progress_bar and accelerator.is_main_process
    bar = ProgressBar(total_steps, shown=shown, first_step=progress.step)
    watching = norms_to_trackers(accelerator, model, options, progress.step)
    with bar, Interruption(accelerator) as interruption, watching as send_norms:
        while progress.step < total_steps:
            steps = train_batches(
                task.splits["train"],
                plan,
                progress.epoch,
                collate=task.train_collate(progress.epoch),
                rank=accelerator.process_index,
                skip=progress.epoch_step,
                workers=options.dataloader_workers,
            )
            for num_examples, micro_batches in steps:
                lr = learning_rate_at(progress.step, total_steps, options)
                set_learning_rate(optimizer, lr)
                fade(model, progress.step, total_steps, options)
                step_loss = torch.zeros((), device=accelerator.device)
                for batch in micro_batches:
                    batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
                    labels = batch.pop("labels")
                    with accelerator.accumulate(model):
                        logits = model(**batch).logits.float()  # (micro-batch, classes)
                        loss = F.cross_entropy(logits, labels, reduction="sum") / num_examples
                        accelerator.backward(loss * undo_mean)
                    step_loss += loss.detach()
                applied = optimizer_step(accelerator, model, optimizer, step_loss, progress, options, batch)
                progress.step += 1
                send_norms(progress.step)
                progress.epoch_step += 1
                progress.skipped_steps += not applied
                stopwatch.step(num_examples)
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
                    faded = fade(model, progress.step, total_steps, options)
                    scores = evaluate(accelerator, model, task, "validation", metric, options)
                    note_scores(accelerator, model, task, checkpoints, progress, scores, options, eligible=faded)
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


def note_scores(
    accelerator: Accelerator,
    model: torch.nn.Module,
    task: Task,
    checkpoints: Checkpoints,
    progress: Progress,
    scores: dict[str, float],
    options: ClassificationOptions,
    *,
    eligible: bool,
) -> None:
    """Record an evaluation; save the model when it is eligible and the best so far (the earlier one of equals)."""
    progress.history.append({"step": progress.step, "epoch": progress.epoch, **scores})
    accelerator.log({f"validation/{name}": value for name, value in scores.items()}, step=progress.step)
    accelerator.print(f"step {progress.step}: validation " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
    if not eligible or not is_better(scores, progress.best_metrics, "accuracy", higher=True):
        return
    state_dict = accelerator.get_state_dict(model)  # a collective call: on every process

    def save(folder: Path) -> None:
        accelerator.unwrap_model(model).save_pretrained(
            folder, state_dict=state_dict, is_main_process=accelerator.is_main_process
        )
        if accelerator.is_main_process:
            if is_fading(model, options):
                finish_saved_fade(folder, task.auto_class)
            task.processor.save_pretrained(folder)

    checkpoints.save_best(progress.step, save)
    progress.best_step, progress.best_metrics = progress.step, scores


def test_scores(
    model_dir: Path, task: Task, options: ClassificationOptions, precision: str, write_to: Path
) -> dict[str, float]:
    """Accuracy on the test split of the saved model, loaded by stock `from_pretrained` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder) / "test.parquet", Path(folder) / "predictions.json"
        task.raw_test.select_columns(task.columns).to_parquet(data)
        arguments = ["--model", str(model_dir.resolve()), "--data", str(data), "--output", str(output)]
        arguments += ["--task", options.task, "--columns", *task.columns, "--mixed_precision", precision]
        run_fresh_process(
            Path(__file__).with_name("predict.py"), [*arguments, "--batch_size", str(options.eval_batch_size)]
        )
        predictions = json.loads(output.read_text(encoding="utf-8"))
    labels = task.splits["test"]["labels"][:]
    write_json(write_to, {"predictions": predictions, "labels": labels})
    return load_metric("accuracy").compute(predictions=predictions, references=labels)


def main(argv: list[str] | None = None) -> None:
    """Set up, train, test the best model in a fresh process, write `results.json`."""
    options = parse_options(ClassificationOptions, argv, __doc__)
    output_dir = Path(options.output_dir)
    with clear_errors():
        check_ranges(options)
        accelerator = make_accelerator(options, options)
        content = main_first(accelerator, lambda: data_content(options) if accelerator.is_main_process else {})
        checkpoints = Checkpoints(
            output_dir,
            accelerator,
            asdict(options),
            content=content,
            free=options_that_change(ClassificationOptions, "onward", "nothing"),
            keep=options.save_total_limit,
            overwrite=options.overwrite_output_dir,
        )
        resuming = checkpoints.check_resumable() is not None
        if accelerator.is_main_process:
            prepare_push(options)
        if resuming and (output_dir / "results.json").exists():
            accelerator.print(f"{output_dir} holds a finished run with these options; nothing to do")
            if options.push_to_hub and accelerator.is_main_process:
                finished = json.loads((output_dir / "results.json").read_text(encoding="utf-8"))
                publish(output_dir / "best", finished, options, PIPELINES[options.task])
            return
        task = TASKS[options.task](options, accelerator, output_dir, resuming)
        set_seed(options.seed)  # the same initialisation whatever happened before, for every norm
        model = main_first(accelerator, task.build_model)
        apply_patch(model, options, lambda: calibration_batch(task))
        norm_modules = count_norms(model, options.norm)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        plan = make_plan(task.lengths["train"], options, accelerator.num_processes)
    set_seed(options.seed, device_specific=True)  # other dropout masks on every process
    optimizer = make_optimizer(model, options)
    allow_unused_parameters(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    if options.report_to:
        accelerator.init_trackers("classification", config={k: str(v) for k, v in asdict(options).items()})

    results = {
        "norm": options.norm,
        "norm_modules": norm_modules,
        "seed": options.seed,
        "parameters": num_parameters,
        "num_processes": accelerator.num_processes,
        "command": shlex.join(["recipes/classification.py", *(sys.argv[1:] if argv is None else argv)]),
        "versions": versions(),
        "options": asdict(options),
        "content": content,
    }
    with clear_endings(accelerator, output_dir, results):
        progress = train(accelerator, model, optimizer, task, plan, checkpoints, options)
        check_trained(progress)
        best = checkpoints.promote_best(progress.best_step)
        precision, is_main = accelerator.mixed_precision, accelerator.is_main_process
        accelerator.end_training()  # the other processes are done: they need not wait for the test
        if not is_main:
            return
        results |= {"validation": progress.best_metrics, "test": None}
        if task.raw_test is not None:
            write_to = output_dir / "test_predictions.json"
            results["test"] = test_scores(best, task, options, precision, write_to)
        results |= {
            "train_samples": len(task.splits["train"]),
            "train_tokens": sum(task.lengths["train"]),
            "train_samples_per_second": Stopwatch(progress).samples_per_second,
            "steps": progress.step,
            "steps_per_epoch": plan.num_steps,
            "seconds_per_step": Stopwatch(progress).seconds_per_step,
            "best_step": progress.best_step,
            "skipped_steps": progress.skipped_steps,
            "peak_memory_mb": peak_memory_mb(),
            "history": progress.history,
            "train_history": progress.train_history,
        }
        write_json(output_dir / "results.json", results)
        print(format_results([results]), flush=True)
        publish(best, results, options, PIPELINES[options.task])


if __name__ == "__main__":
    main()
