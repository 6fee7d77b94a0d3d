"""Train a byte-level language model with AdaNorm, another norm of the paper, or LayerNorm as the control.

    accelerate launch recipes/language_modeling.py --config recipes/configs/enwik8.yaml --train_file enwik8.zip
    accelerate launch recipes/language_modeling.py --config recipes/configs/enwik_sample.yaml --train_file a_text.txt

A decoder from `model_config` reads the bytes of a text file; the score is bits per character (of bytes, as usual for
enwik8), every byte scored once with at least `sequence_length - eval_stride` bytes of context. Every option of
`patch_model`. The same command, started again, goes on from the newest complete checkpoint in `output_dir`, in the
middle of an epoch too. In `output_dir`: `results.json`, the best model as `best/` (model and tokeniser: load it with
`pipeline("text-generation", ...)` after `import hf_adanorm`), `test_bits.json`, and `checkpoint-N/`.

Exit codes: 0 finished, 2 bad input (said in one line before training starts), 3 the loss was not finite, 75 stopped by
SIGTERM after saving a checkpoint: start the same command again.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from score_bytes import collate_windows, window_bits
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.batches import StepPlan, eval_batches, train_batches
from common.checkpoints import EXIT_RESUME, Checkpoints, Interruption, Progress, write_json
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
from tasks.bytes import NUM_BYTES, ByteDataOptions, Segments, Windows, byte_tokenizer, load_byte_splits
from tasks.data import data_content
from tasks.text import ModelOptions, build_fresh, check_model_source, fresh_config, load_pretrained


@dataclass(kw_only=True)
class LanguageModelingOptions(RunOptions, OptimizationOptions, ByteDataOptions, ModelOptions, PatchOptions):
    """Options of the language modelling recipe."""

    batch_size: int = option(16, "training segments a micro-batch on each process")
    eval_batch_size: int = option(32, "windows a batch on each process in evaluation")


def build_model(options: LanguageModelingOptions) -> PreTrainedModel:
    """A fresh decoder of bytes, or one that an earlier run saved. Raises OptionError when it cannot read bytes."""
    if options.model_name_or_path:
        model = load_pretrained(AutoModelForCausalLM, options.model_name_or_path)
    else:
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        model = build_fresh(AutoModelForCausalLM, fresh_config(options, vocab_size=NUM_BYTES, **tokens))
    if model.config.vocab_size != NUM_BYTES:
        raise OptionError(f"the model has {model.config.vocab_size} tokens; a model of bytes has {NUM_BYTES}")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < options.sequence_length:
        raise OptionError(f"--sequence_length {options.sequence_length} is beyond the model's {positions} positions")
    return model


def collate_segments(rows: Sequence[np.ndarray]) -> torch.Tensor:
    """Segments (batch, sequence_length + 1) as token ids."""
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: torch.nn.Module, windows: Windows, options: LanguageModelingOptions
) -> dict[str, float]:
    """Bits per character and loss of the windows, every byte counted once; the same on every process."""
    model.eval()
    indices: list[int] = []
    outputs: list[tuple[float, int]] = []
    total = min(len(windows), options.max_validation_samples or len(windows))
    batches = eval_batches(
        windows,
        [1] * total,
        options.eval_batch_size,
        collate=collate_windows,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        workers=options.dataloader_workers,
    )
    for batch_indices, batch in batches:
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        indices += batch_indices
        outputs += zip(window_bits(model, batch).tolist(), batch["scored"].sum(1).tolist(), strict=True)
    outputs = gather_by_index(accelerator, indices, outputs, total)
    model.train()
    bits = sum(output[0] for output in outputs) / sum(output[1] for output in outputs)
    return {"bits_per_character": bits, "loss": bits * float(np.log(2))}


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Any,
    splits: dict[str, np.ndarray],
    plan: StepPlan,
    checkpoints: Checkpoints,
    save_model: Callable[[Path], None],
    options: LanguageModelingOptions,
) -> Progress:
    """The training loop: from the newest checkpoint to the last step, or until SIGTERM."""
    segments = Segments(splits["train"], options.sequence_length)
    windows = Windows(splits["validation"], options.sequence_length, options.eval_stride)
    total_steps = options.max_steps or options.num_epochs * plan.num_steps
    progress = checkpoints.resume()
    if progress.step:
        accelerator.print(f"resuming from step {progress.step}")
    stopwatch = Stopwatch(progress)
    # accelerate divides by the number of micro-batches, DDP by the number of processes: undo both, as the loss is
    # divided by the number of bytes of the whole step.
    undo_mean = accelerator.num_processes * options.gradient_accumulation_steps
    running_loss = torch.zeros((), device=accelerator.device)
    running_steps = 0
    model.train()
    shown = options.progress_bar and accelerator.is_main_process
    bar = ProgressBar(total_steps, shown=shown, first_step=progress.step, unit="characters/s")
    watching = norms_to_trackers(accelerator, model, options, progress.step)
    with bar, Interruption(accelerator) as interruption, watching as send_norms:
        while progress.step < total_steps:
            steps = train_batches(
                segments,
                plan,
                progress.epoch,
                collate=collate_segments,
                rank=accelerator.process_index,
                skip=progress.epoch_step,
                workers=options.dataloader_workers,
            )
            for num_segments, micro_batches in steps:
                lr = learning_rate_at(progress.step, total_steps, options)
                set_learning_rate(optimizer, lr)
                fade(model, progress.step, total_steps, options)
                num_characters = num_segments * options.sequence_length
                step_loss = torch.zeros((), device=accelerator.device)
                for segment in micro_batches:
                    segment = segment.to(accelerator.device)
                    inputs = {"input_ids": segment[:, :-1], "use_cache": False}
                    with accelerator.accumulate(model):
                        logits = model(**inputs).logits.float()  # (micro-batch, length, bytes)
                        losses = F.cross_entropy(logits.transpose(1, 2), segment[:, 1:], reduction="sum")
                        loss = losses / num_characters
                        accelerator.backward(loss * undo_mean)
                    step_loss += loss.detach()
                applied = optimizer_step(accelerator, model, optimizer, step_loss, progress, options, inputs)
                progress.step += 1
                send_norms(progress.step)
                progress.epoch_step += 1
                progress.skipped_steps += not applied
                stopwatch.step(num_characters)
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
                    progress.train_history.append({"step": progress.step, "loss": train_loss})
                    accelerator.log({"train/loss": train_loss, "learning_rate": lr}, step=progress.step)
                    bar.log(progress.step, stopwatch.samples_per_second, train_loss, lr)
                bar.update(progress.step, stopwatch.samples_per_second)

                evaluate_now = last or (
                    progress.step % options.eval_steps == 0 if options.eval_steps else end_of_epoch
                )
                if evaluate_now:
                    stopwatch.pause()
                    faded = fade(model, progress.step, total_steps, options)
                    scores = evaluate(accelerator, model, windows, options)
                    note_scores(accelerator, checkpoints, progress, scores, save_model, eligible=faded)
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
    checkpoints: Checkpoints,
    progress: Progress,
    scores: dict[str, float],
    save_model: Callable[[Path], None],
    *,
    eligible: bool,
) -> None:
    """Record an evaluation; save the model when it is eligible and the best so far (the earlier one of equals)."""
    progress.history.append({"step": progress.step, "epoch": progress.epoch, **scores})
    accelerator.log({f"validation/{name}": value for name, value in scores.items()}, step=progress.step)
    accelerator.print(f"step {progress.step}: validation " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
    if eligible and is_better(scores, progress.best_metrics, "bits_per_character", higher=False):
        checkpoints.save_best(progress.step, save_model)
        progress.best_step, progress.best_metrics = progress.step, scores


def test_scores(
    model_dir: Path, data: np.ndarray, options: LanguageModelingOptions, precision: str, write_to: Path
) -> dict[str, float]:
    """Scores on the test split of the saved model, loaded by stock `from_pretrained` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        text, output = Path(folder) / "test.txt", Path(folder) / "bits.json"
        text.write_bytes(data.tobytes())
        arguments = ["--model", str(model_dir.resolve()), "--data", str(text), "--output", str(output)]
        arguments += ["--sequence_length", str(options.sequence_length), "--stride", str(options.eval_stride)]
        arguments += ["--batch_size", str(options.eval_batch_size), "--mixed_precision", precision]
        run_fresh_process(Path(__file__).with_name("score_bytes.py"), arguments)
        scores = json.loads(output.read_text(encoding="utf-8"))
    write_json(write_to, scores)
    bits = sum(scores["bits"]) / sum(scores["characters"])
    return {"bits_per_character": bits, "loss": bits * float(np.log(2))}


def main(argv: list[str] | None = None) -> None:
    """Set up, train, test the best model in a fresh process, write `results.json`."""
    options = parse_options(LanguageModelingOptions, argv, __doc__)
    output_dir = Path(options.output_dir)
    with clear_errors():
        check_ranges(options)
        accelerator = make_accelerator(options, options)
        check_model_source(options)
        if not 0 < options.eval_stride <= options.sequence_length:
            raise OptionError(
                f"--eval_stride must be between 1 and --sequence_length {options.sequence_length}, "
                f"got {options.eval_stride}"
            )
        content = main_first(accelerator, lambda: data_content(options) if accelerator.is_main_process else {})
        checkpoints = Checkpoints(
            output_dir,
            accelerator,
            asdict(options),
            content=content,
            free=options_that_change(LanguageModelingOptions, "onward", "nothing"),
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
                publish(output_dir / "best", finished, options, "text-generation")
            return
        splits = load_byte_splits(options)
        set_seed(options.seed)  # the same initialisation whatever happened before, for every norm
        model = main_first(accelerator, lambda: build_model(options))
        segments = Segments(splits["train"], options.sequence_length)
        apply_patch(model, options, lambda: {"input_ids": collate_segments(calibration_rows(segments))[:, :-1]})
        norm_modules = count_norms(model, options.norm)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        num_segments = len(segments)
        plan = StepPlan(
            [1] * num_segments,
            options.batch_size,
            seed=options.seed,
            num_processes=accelerator.num_processes,
            accumulation=options.gradient_accumulation_steps,
        )
    set_seed(options.seed, device_specific=True)  # other dropout masks on every process
    optimizer = make_optimizer(model, options)
    allow_unused_parameters(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    if options.report_to:
        accelerator.init_trackers("language_modeling", config={k: str(v) for k, v in asdict(options).items()})
    accelerator.print(
        f"{num_parameters:,} parameters, {norm_modules} norms ({options.norm}); {len(splits['train']):,} bytes to "
        f"train on, {len(splits['validation']):,} to validate on, {plan.num_steps:,} updates an epoch"
    )
    tokenizer = byte_tokenizer(options.sequence_length)

    def save_model(folder: Path) -> None:
        state_dict = accelerator.get_state_dict(model)  # a collective call: on every process
        accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(
            folder, state_dict=state_dict, is_main_process=accelerator.is_main_process
        )
        if accelerator.is_main_process:
            if is_fading(model, options):
                finish_saved_fade(folder, AutoModelForCausalLM)
            tokenizer.save_pretrained(folder)

    results = {
        "norm": options.norm,
        "norm_modules": norm_modules,
        "seed": options.seed,
        "parameters": num_parameters,
        "num_processes": accelerator.num_processes,
        "command": shlex.join(["recipes/language_modeling.py", *(sys.argv[1:] if argv is None else argv)]),
        "versions": versions(),
        "options": asdict(options),
        "content": content,
    }
    with clear_endings(accelerator, output_dir, results):
        progress = train(accelerator, model, optimizer, splits, plan, checkpoints, save_model, options)
        check_trained(progress)
        best = checkpoints.promote_best(progress.best_step)
        precision, is_main = accelerator.mixed_precision, accelerator.is_main_process
        accelerator.end_training()  # the other processes are done: they need not wait for the test
        if not is_main:
            return
        speed = Stopwatch(progress).samples_per_second
        results |= {"validation": progress.best_metrics, "test": None}
        if options.score_test and "test" in splits:
            results["test"] = test_scores(best, splits["test"], options, precision, output_dir / "test_bits.json")
        results |= {
            "train_samples": num_segments,
            "train_tokens": len(splits["train"]),
            "train_samples_per_second": speed and speed / options.sequence_length,
            "train_characters_per_second": speed,
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
        for name in ("validation", "test"):
            if results[name]:
                score = results[name]["bits_per_character"]
                print(f"{options.norm}, seed {options.seed}: {name} {score:.4f} bits per character", flush=True)
        publish(best, results, options, "text-generation")


if __name__ == "__main__":
    main()
