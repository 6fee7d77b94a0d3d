"""Runs the loop that all recipes share, around the few lines that are a recipe's own.

    options = parse_options(Options, argv, __doc__)
    run = Run(options, argv, __file__, data_content)  # launcher, lock, newest checkpoint
    if run.finished:
        return
    task = run.prepare(prepare_task)             # data, model, patch, optimizer
    with run.training():                         # resumes; clear endings, SIGTERM and Ctrl-C
        for step in run:                         # sets the learning rate
            for batch in step:                   # micro-batches, on the device; then clips, checks and steps
                loss = cross_entropy(run.model(**batch)...) / step.size
                run.backward(loss, batch)
            if step.evaluates:
                run.note(evaluate(run, task))    # history, best model, early stopping; then checkpoints
        best = run.best()                        # the folder of the best model
        if run.alone():                          # the other processes end
            run.write_results({"test": test_scores(run, best)})

A step's loss is divided by `step.size`, its examples or tokens over all micro-batches and processes. So a step may be
divided in any way. A run that is asked to stop saves a checkpoint and ends with code 75. If this happens during an
evaluation, the resumed run evaluates first.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import send_to_device, set_seed

from common.batches import eval_batches, train_batches
from common.checkpoints import Checkpoints, Interruption, write_json
from common.endings import EXIT_RESUME, DivergedError, clear_endings, clear_errors
from common.evaluation import gather_by_index, is_better, main_first, peak_memory_mb, run_fresh_process
from common.options import options_that_change
from common.progress import Stopwatch, time_left
from common.publishing import prepare_push, publish
from common.results import format_results, versions
from common.setup import (
    allow_unused_parameters,
    apply_patch,
    describe_norm,
    learning_rate_at,
    make_accelerator,
    make_optimizer,
    norm_schedules,
    norms_to_trackers,
    processes_line,
)
from common.steps import check_trained, optimizer_step
from hf_adanorm.norms import STOCK, remember, resolve_norm


class Step:
    """One optimizer step. Iterating over it yields this process's micro-batches, then applies their gradients."""

    def __init__(self, run: Run, size: int, micro_batches: Sequence[Any]):
        self.run, self.size, self.micro_batches = run, size, micro_batches
        self.loss = torch.zeros((), device=run.accelerator.device)
        self.inputs: dict[str, Any] | None = None
        self.evaluates = False  # set after the last micro-batch

    def __iter__(self) -> Iterator[Any]:
        for batch in self.micro_batches:
            with self.run.accelerator.accumulate(self.run.model):
                yield send_to_device(batch, self.run.accelerator.device)
        if self.micro_batches:
            self.run.end_step()


class Run:
    """One run of a recipe; see the module.

    `content(options)` returns a hash of the run's data by option, as `tasks.data.data_content` does. `finished` says
    whether the folder contains the results of a run with these options.
    """

    def __init__(
        self, options: Any, argv: Sequence[str] | None, script: str, content: Callable[[Any], dict[str, str]]
    ):
        self.options, self.output_dir = options, Path(options.output_dir)
        self.script = Path(script)
        with clear_errors():
            self.accelerator = make_accelerator(options)
            self.is_main = self.accelerator.is_main_process
            self.print(processes_line(self.accelerator, self.script.name))
            norm = describe_norm(options)
            found = main_first(self.accelerator, lambda: content(options) if self.is_main else {})
            if norm["norm_files"]:
                found["norm"] = " ".join(norm["norm_files"].values())
            self.checkpoints = Checkpoints(
                self.output_dir,
                self.accelerator,
                asdict(options),
                content=found,
                free=options_that_change(type(options), "onward", "nothing"),
                keep=max(options.save_total_limit, getattr(options, "average_checkpoints", 0)),
                overwrite=options.overwrite_output_dir,
            )
            self.resuming = self.checkpoints.check_resumable() is not None
            if self.is_main:
                prepare_push(options)
        self.finished = self.resuming and (self.output_dir / "results.json").exists()
        if self.finished:
            self.print(f"{self.output_dir} contains a finished run with these options; nothing to do")
            if options.push_to_hub and self.is_main:
                record = json.loads((self.output_dir / "results.json").read_text(encoding="utf-8"))
                publish(self.output_dir / "best", record, options)
        self.record: dict[str, Any] = {
            **norm,
            "seed": options.seed,
            "num_processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "command": shlex.join([f"recipes/{self.script.name}", *(sys.argv[1:] if argv is None else argv)]),
            "versions": versions(),
            "options": asdict(options),
            "content": found,
        }

    def print(self, text: str) -> None:
        """Print on the main process."""
        if self.is_main:
            print(text, flush=True)

    @property
    def division(self) -> dict[str, int]:
        """Return how steps are divided, as arguments of a plan."""
        division = {"seed": self.options.seed, "accumulation": self.options.gradient_accumulation_steps}
        return {**division, "num_processes": self.accelerator.num_processes}

    def prepare(self, prepare: Callable[[Run], Any]) -> Any:
        """Return the task that `prepare` makes; set up its patched model and optimizer. Bad input ends the run."""
        options, accelerator = self.options, self.accelerator
        with clear_errors():
            if options.norm != STOCK:
                remember(resolve_norm(options.norm)[0])  # to load an earlier model with it
            self.task = task = prepare(self)
            set_seed(options.seed)  # the same initialization for every norm
            model = main_first(accelerator, task.build_model)
            num_norms = apply_patch(model, options, lambda: task.calibration_batch(model))
            self.total_steps = options.max_steps or options.num_epochs * task.plan.num_steps
            self.schedules = norm_schedules(options, model, self.total_steps)
        set_seed(options.seed, device_specific=True)  # other dropout masks on every process
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        optimizer = make_optimizer(model, options)
        allow_unused_parameters(accelerator, model)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.bare = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if options.report_to:
            settings = {name: str(value) for name, value in asdict(options).items()}
            run = {"name": self.output_dir.name, "resume": "allow" if self.resuming else "never"}
            accelerator.init_trackers(self.script.stem, config=settings, init_kwargs={"trackio": run})
        self.record |= {"norm_modules": num_norms, "parameters": num_parameters}
        metric = ("score", "label", "scale", "decimals", "higher_is_better")
        self.record |= {"pipeline": task.pipeline, "metric": {name: getattr(task, name) for name in metric}}
        self.print(
            f"{type(self.bare).__name__}: {num_parameters:,} parameters, {num_norms} norms ({options.norm})\n"
            f"{task.summary}\n{self.total_steps:,} updates, {task.plan.num_steps:,} an epoch; checkpoints in "
            f"{self.output_dir}"
        )
        return task

    # ------------------------------------------------------------------------------------------------- training

    @contextmanager
    def training(self) -> Iterator[None]:
        """Resume from the newest checkpoint; inside the block, end with one line and the code that fits."""
        accelerator, options = self.accelerator, self.options
        with clear_endings(), Interruption(accelerator) as self.interruption:
            self.progress = self.checkpoints.resume()
            if self.progress.step:
                self.print(f"resuming from step {self.progress.step}")
            self._set_norms()
            self.saved_step = self.progress.step
            self.stopwatch = Stopwatch(self.progress)
            self.running_loss = torch.zeros((), device=accelerator.device)  # this process's share
            if self.is_main:
                self.running_loss += self.progress.running_loss
            self.model.train()
            try:
                with norms_to_trackers(accelerator, self.model, options, self.progress.step) as self.send_norms:
                    yield
            except DivergedError as error:
                if self.is_main:
                    record = {**self.record, "step": error.step, "diverged": str(error)}
                    write_json(self.output_dir / "diverged.json", record)
                accelerator.wait_for_everyone()  # every process raised it
                raise

    def __iter__(self) -> Iterator[Step]:
        """Yield the steps from the newest checkpoint to the last one, or until early stopping."""
        options, progress = self.options, self.progress
        evaluated = progress.history and progress.history[-1]["step"] == progress.step
        if progress.step and self._evaluation_due() and not evaluated:
            self.step = Step(self, 0, [])  # it was stopped in the middle of this evaluation
            self._begin_evaluation()
            yield self.step
            self._save_or_stop()
        while not self.done:
            steps = train_batches(
                self.task.train_data,
                self.task.plan,
                progress.epoch,
                count=self.task.count,
                collate=self.task.train_collate(progress.epoch),
                rank=self.accelerator.process_index,
                skip=progress.epoch_step,
                workers=options.dataloader_workers,
            )
            for size, micro_batches in steps:
                self.learning_rate = learning_rate_at(progress.step, self.total_steps, options)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate
                self.step = Step(self, size, micro_batches)
                yield self.step
                self._save_or_stop()
                if self.done:
                    break

    def backward(self, loss: torch.Tensor, inputs: dict[str, Any] | None = None) -> None:
        """Add a micro-batch's gradients.

        Args:
            loss: the micro-batch's share of the step's loss.
            inputs: what the model was given, to find the first module whose output is not finite.
        """
        # accelerate divides by the number of micro-batches and DDP by that of processes. The step's size counts both.
        undo_mean = self.accelerator.num_processes * self.options.gradient_accumulation_steps
        self.accelerator.backward(loss * undo_mean)
        self.step.loss += loss.detach()
        self.step.inputs = inputs

    def end_step(self) -> None:
        """Apply the gradients of the step's micro-batches, count, log, and decide whether to evaluate."""
        accelerator, options, progress, step = self.accelerator, self.options, self.progress, self.step
        warming = progress.step < (options.warmup_steps or round(options.warmup_ratio * self.total_steps))
        applied = optimizer_step(
            accelerator, self.model, self.optimizer, step.loss, progress, options, step.inputs, warming=warming
        )
        progress.step += 1
        self.send_norms(progress.step)
        self._set_norms()
        progress.epoch_step += 1
        progress.skipped_steps += not applied
        self.stopwatch.step(step.size)
        if applied:
            self.running_loss += step.loss
            progress.running_steps += 1
        if progress.epoch_step == self.task.plan.num_steps:
            progress.epoch, progress.epoch_step = progress.epoch + 1, 0
        due = progress.step % options.logging_steps == 0 or progress.step == self.total_steps
        if due and progress.running_steps:  # 0 if all steps since were skipped
            train_loss = accelerator.reduce(self.running_loss, "sum").item() / progress.running_steps
            self.running_loss.zero_()
            progress.running_steps = 0
            progress.train_history.append({"step": progress.step, "loss": train_loss})
            accelerator.log({"train/loss": train_loss, "learning_rate": self.learning_rate}, step=progress.step)
            seconds, speed = self.stopwatch.seconds_per_step, self.stopwatch.samples_per_second
            remaining = self.total_steps - progress.step
            pace = f", {speed:,.0f} {self.task.unit}" if speed else ""
            pace += f", {time_left(seconds * remaining)}" if seconds and remaining else ""
            at = f"step {progress.step}/{self.total_steps}"
            self.print(f"{at}: loss {train_loss:.4f}, learning rate {self.learning_rate:.3g}{pace}")
        if self._evaluation_due():
            self._begin_evaluation()

    def _set_norms(self) -> None:
        """Give the norms the settings of this step, which a checkpoint then contains."""
        for schedule in self.schedules:
            schedule.apply(self.bare, self.progress.step, self.total_steps)

    def _evaluation_due(self) -> bool:
        progress, every = self.progress, self.options.eval_steps
        return progress.step == self.total_steps or (progress.step % every == 0 if every else progress.epoch_step == 0)

    def _begin_evaluation(self) -> None:
        self.step.evaluates = True
        self.stopwatch.pause()

    @property
    def done(self) -> bool:
        """Return whether the last step is done, or early stopping has run out of patience."""
        progress, patience = self.progress, self.options.early_stopping_patience
        if progress.step >= self.total_steps:
            return True
        if patience is None or progress.best_step is None:
            return False
        return sum(entry["step"] > progress.best_step for entry in progress.history) >= patience

    def _save_or_stop(self) -> None:
        every, evaluated = self.options.checkpointing_steps, self.step.evaluates
        if not self.done:
            self.stop_if_asked()
        saves = self.done or (self.progress.step % every == 0 if every else evaluated)
        if saves:
            self.stopwatch.pause()
            self._save()
        if saves or evaluated:
            self.stopwatch.resume()

    def _save(self) -> None:
        """Save, unless this step is saved: rewriting its checkpoint would put it at risk."""
        if self.saved_step != self.progress.step:
            self.progress.running_loss = self.accelerator.reduce(self.running_loss, "sum").item()
            self.checkpoints.save(self.progress)
            self.saved_step = self.progress.step

    def _stop(self) -> NoReturn:
        """Save, and end the process with the code of a run that can be resumed."""
        self._save()
        signal, step = self.interruption.name, self.progress.step
        self.print(f"stopped by {signal} at step {step}; run the same command again to resume")
        self.accelerator.end_training()
        sys.exit(EXIT_RESUME)

    # ----------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(
        self,
        data: Any,
        lengths: Sequence[int],
        collate: Callable[[list[Any]], Any],
        outputs_of: Callable[[Any, list[int]], Sequence[Any]],
    ) -> list[Any]:
        """Return the outputs of `outputs_of(batch, indices)` for every example of `data`, in order, on every process.

        The model is in eval mode meanwhile. A run that is asked to stop does so between two batches.
        """
        accelerator = self.accelerator
        self.model.eval()
        indices: list[int] = []
        outputs: list[Any] = []
        batches = eval_batches(
            data,
            lengths,
            self.options.eval_batch_size,
            collate=collate,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            workers=self.options.dataloader_workers,
        )
        for batch_indices, batch in batches:
            self.stop_if_asked()
            indices += batch_indices
            outputs += outputs_of(send_to_device(batch, accelerator.device), batch_indices)
        self.model.train()
        return gather_by_index(accelerator, indices, outputs, len(lengths))

    def stop_if_asked(self) -> None:
        """Save and stop if a process was asked to. Called on every process."""
        if self.interruption.requested():
            self._stop()

    def note(self, scores: dict[str, float]) -> None:
        """Record an evaluation. Save the model if its score is better than all earlier ones."""
        progress = self.progress
        progress.history.append({"step": progress.step, "epoch": progress.epoch, **scores})
        self.accelerator.log({f"validation/{name}": value for name, value in scores.items()}, step=progress.step)
        self.print(f"step {progress.step}: validation " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        name, higher = self.task.selection(self.options)
        if is_better(scores, progress.best_metrics, name, higher=higher):
            with self.checkpoints.staged(self.output_dir / f"best-{progress.step}") as temporary:
                self.save_model(temporary)
            progress.best_step, progress.best_metrics = progress.step, scores

    def save_model(self, folder: Path) -> None:
        """Write model and processor as stock `from_pretrained` reads them. Called on every process."""
        # For a compiled model, accelerate would return the names of the wrapper, which from_pretrained does not know.
        state_dict = self.accelerator.get_state_dict(getattr(self.model, "_orig_mod", self.model))  # a collective call
        self.bare.save_pretrained(folder, state_dict=state_dict, is_main_process=self.is_main)
        if self.is_main:
            self.task.processor.save_pretrained(folder)

    # -------------------------------------------------------------------------------------------------- the end

    def best(self) -> Path:
        """Return the folder of the best model at the end of the training. Called on every process."""
        check_trained(self.progress)
        return self.checkpoints.promote_best(self.progress.best_step)

    def alone(self) -> bool:
        """Let the other processes end, and return whether this one continues with the test."""
        self.accelerator.end_training()
        return self.is_main

    def fresh_process(self, script: str, **arguments: Any) -> None:
        """Run another script of the recipes in a fresh process, with the precision of this run.

        When this process is asked to stop meanwhile, both end.
        """
        options, precision = self.options, self.accelerator.mixed_precision
        words = []
        for name, value in arguments.items():  # with "=", as a text may begin with a hyphen
            words += [f"--{name}={value}"] if np.ndim(value) == 0 else [f"--{name}", *map(str, value)]
        words += ["--mixed_precision", precision, "--batch_size", str(options.eval_batch_size), "--quiet"]
        words += ["--trust_remote_code"] if self.record["norm_files"] else []  # in the folder that this run wrote
        if not run_fresh_process(self.script.with_name(script), words, lambda: self.interruption.signalled):
            self.print(f"stopped by {self.interruption.name} in the test; run the same command again to resume")
            sys.exit(EXIT_RESUME)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write `results.json`, print the scores, and publish.

        Args:
            results: the recipe's own figures, at least `train_samples`, `train_tokens` and `test`.
        """
        progress = self.progress
        self.record |= {
            "validation": progress.best_metrics,
            "train_samples_per_second": self.stopwatch.samples_per_second,
            "steps": progress.step,
            "steps_per_epoch": self.task.plan.num_steps,
            "seconds_per_step": self.stopwatch.seconds_per_step,
            "best_step": progress.best_step,
            "skipped_steps": progress.skipped_steps,
            "peak_memory_mb": peak_memory_mb(),
            "history": progress.history,
            "train_history": progress.train_history,
            **results,
        }
        # The card comes first: a run that is killed here has no results yet and resumes. A failed push leaves both.
        best = self.output_dir / "best"
        publish(best, self.record, replace(self.options, push_to_hub=False))
        write_json(self.output_dir / "results.json", self.record)
        use = self.task.use.format(pipeline=self.task.pipeline, model=best)
        if self.record["norm_files"]:
            in_python = use.endswith(")")
            use = f"{use[:-1]}, trust_remote_code=True)" if in_python else f"{use} --trust_remote_code"
        self.print(f"{format_results([self.record])}\nbest model, of step {progress.best_step}: {use}")
        if self.options.push_to_hub:
            publish(best, self.record, self.options)
