"""The runs of a comparison: which there are, which command each takes, running and collecting them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from common.checkpoints import changed_content, write_json
from common.options import OptionError, parse_options
from common.results import align
from common.setup import describe_norm
from comparison.choices import MOST_SEEDS, OWN, choose_recipe, grid_points, parse_grid
from comparison.paper import BASELINE
from comparison.records import Run, outcome, read_records, stated, to_record, write_records
from comparison.report import write_report
from comparison.summary import LAUNCHED, machine, summarize
from comparison.variants import canonical, folder_name, kind, known_settings, public_name, split
from hf_adanorm.norms import resolve_norm
from tasks.data import DATA_OPTIONS, data_content

ESTIMATE_STEPS = 25


class RunInterrupted(Exception):  # noqa: N818  (no error: the comparison was asked to stop)
    """SIGTERM or Ctrl-C; the run in progress has saved a checkpoint."""


class Comparison:
    """The runs of one comparison; `own` are its options, `rest` those of the recipe, as `compare.py` reads them."""

    def __init__(self, own: argparse.Namespace, rest: list[str]):
        self.own, self.rest = own, rest
        name, self.options_class = choose_recipe(own.recipe, own.config)
        recipe = importlib.import_module(name)
        self.script, self.task = Path(recipe.__file__), recipe.TASK
        self.names = {item.name for item in dataclasses.fields(self.options_class)}
        for name in OWN:
            if any(argument.split("=", 1)[0] == f"--{name}" for argument in rest):
                raise OptionError(
                    f"--{name} is set by the comparison for each run; use --norms, --seeds, --output_dir"
                )
        if min(own.seeds, default=0) < 0 or not own.seeds:
            raise OptionError(f"--seeds: expected a positive number of seeds, got {own.seeds}")
        if len(own.seeds) == 1 and own.seeds[0] > MOST_SEEDS:
            raise OptionError(f"--seeds {own.seeds[0]}: one number is how many, at most {MOST_SEEDS}")
        try:
            self.launcher = shlex.split(own.launcher) if own.launcher else [sys.executable]
        except ValueError as error:
            raise OptionError(f"--launcher {own.launcher}: {error}") from error
        if not self.launcher or shutil.which(self.launcher[0]) is None:
            raise OptionError(f"--launcher {own.launcher!r}: there is no such command")
        if not 1 <= own.grid_seeds <= len(own.seeds):
            raise OptionError(
                f"--grid_seeds must be in [1, {len(own.seeds)}], the number of seeds; got {own.grid_seeds}"
            )
        self.settings = {kind(text): known_settings(text) for text in own.norms}  # of each norm, with their defaults
        everything = {name for known in self.settings.values() for name in known}
        self.grid = parse_grid(own.grid, self.names | everything)
        own.norms = list(dict.fromkeys(map(self.canonical, own.norms)))
        self.adopted = {(run.norm, run.seed): run for path in own.records for run in read_records(path)}
        self.search: list[Run] = []
        self.runs: list[Run] = []
        self.failed: list[Run] = []
        self.contents: dict[Any, dict[str, str]] = {}
        self.launched: dict[str, tuple[Any, Path]] = {}  # how the runs were launched, and which one says so
        self.stopping = ""
        self.child: subprocess.Popen[bytes] | None = None

    def options(self, arguments: list[str]) -> Any:
        """The recipe's options as these arguments set them. Raises OptionError for what the recipe refuses."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return parse_options(self.options_class, arguments)
        except SystemExit as error:
            text = " ".join(said.getvalue().rpartition("error:")[2].split())  # without the lines on usage before it
            raise OptionError(f"{self.script.name}: {text}") from error

    def canonical(self, text: str) -> str:
        """Return the name of a variant among runs with these options."""
        norm = kind(text)
        options = self.options([*self.rest_for(norm), "--norm", norm])
        return canonical(text, {**self.settings[norm], **options.norm_settings}, self.grid)

    def rest_for(self, norm: str) -> list[str]:
        """Return the recipe's arguments without settings that only other norms of this comparison have."""
        others = {name for known in self.settings.values() for name in known} - self.names - self.settings[norm].keys()
        kept: list[str] = []
        skips = False
        for word in self.rest:
            name = word.partition("=")[0]
            is_flag = word.startswith("--")
            skips = (is_flag and name.removeprefix("--") in others) or (skips and not is_flag)
            if not skips:
                kept.append(word)
        return kept

    def check_all(self) -> None:
        """Raise OptionError for what a norm could not be trained with, before another has been."""
        if self.own.output_dir.exists() and not self.own.output_dir.is_dir():
            raise OptionError(f"--output_dir {self.own.output_dir}: a file, not a folder")
        for norm in self.own.norms:
            for point in self.points(norm):
                options = self.options(self.arguments(Run(norm, self.own.seeds[0], self.own.output_dir, point)))
                try:
                    if norm != BASELINE:
                        resolve_norm(kind(norm))[0](1, **options.norm_settings)
                except (ValueError, TypeError) as error:
                    raise OptionError(f"--norms {norm}: {error}") from error

    def arguments(self, run: Run, *, test: bool = True) -> list[str]:
        """Return the recipe's command line for a run; without a test split for one of the search."""
        norm, settings = split(run.norm)
        arguments = [*self.rest_for(norm), "--norm", norm, "--seed", str(run.seed), "--output_dir", str(run.folder)]
        for name, value in {**settings, **run.choice}.items():
            arguments += [f"--{name}", json.dumps(value) if value is None or isinstance(value, bool) else str(value)]
        if not test:
            arguments += [text for name, value in self.task.without_test.items() for text in (f"--{name}", value)]
        return arguments

    def execute(self, runs: Sequence[Run], *, test: bool = True) -> None:
        """Run what is not finished, one after the other."""
        for run in runs:
            self.check_same_options(run, test=test)
            self.check_launched_alike(run)
        for position, run in enumerate(runs, start=1):
            if run.status == "unfinished" and not self.own.report_only:
                started = time.perf_counter()
                print(
                    f"run {position}/{len(runs)}: {run.norm}, seed {run.seed}: started, see {run.folder}/log.txt",
                    flush=True,
                )
                self.run_one(run, self.arguments(run, test=test))
                self.check_launched_alike(run)
                took = f", {time.perf_counter() - started:,.0f} s"
            else:
                took = ", kept" if run.status != "unfinished" else ""
            choice = "".join(f", {name} {value}" for name, value in run.choice.items())
            stage = "run" if test else "search"
            print(
                f"{stage} {position}/{len(runs)}: {run.norm}, seed {run.seed}{choice}: {self.told(run)}{took}",
                flush=True,
            )

    def told(self, run: Run) -> str:
        """Describe how a run ended, with its score."""
        if run.status != "finished":
            return outcome(run)
        record = run.record
        split = "test" if record["test"] else "validation"
        value = record[split][self.task.score]
        score = math.nan if value is None else value  # null: not finite
        return f"{split} {self.task.label} {score:.{self.task.decimals}f}"

    def check_same_options(self, run: Run, *, test: bool = True) -> None:
        """Raise OptionError if a run that ended had other options or other data than it would be given now."""
        saved = run.record.get("options")
        if saved is None:
            return
        options = self.options(self.arguments(run, test=test))
        given = json.loads(json.dumps(dataclasses.asdict(options)))
        default = json.loads(json.dumps(dataclasses.asdict(self.options_class())))
        then, now = (stated(self.options_class, one, run.norm) for one in (saved, given))
        where = f"the record of {run.norm}, seed {run.seed}" if run.adopted else str(run.folder)
        contents = self.content(options)
        if changed := changed_content(run.record.get("content"), contents):
            raise OptionError(f"{where} holds a run on other data: {changed}; give that data, or another --output_dir")
        differing = [
            f"{name}: {then.get(name, default[name])!r} then, {now.get(name, default[name])!r} now"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name) and name not in contents
        ]
        if differing:
            raise OptionError(
                f"{where} holds a run with other options ({'; '.join(differing)}); "
                "give the same options, or another --output_dir"
            )

    def check_launched_alike(self, run: Run) -> None:
        """Raise OptionError when a run that ended was divided over another number of processes than those before it,
        and so had other batches, or ran in another precision."""
        for name in LAUNCHED:
            if name in (record := run.record) and name not in self.grid:
                value, folder = self.launched.setdefault(name, (record[name], run.folder))
                if value != record[name]:
                    raise OptionError(
                        f"{run.folder} holds a run with {name} {record[name]}, {folder} one with {value}: runs are "
                        "compared where they were launched alike; delete those that were not, and give the others' "
                        "--launcher"
                    )

    def content(self, options: Any) -> dict[str, str]:
        """Return hashes of the data files; they are the same for all runs and are read once."""
        files = tuple(sorted((name, str(value)) for name, value in vars(options).items() if name in DATA_OPTIONS))
        if files not in self.contents:
            self.contents[files] = data_content(options)
        if not (own_files := describe_norm(options)["norm_files"]):
            return self.contents[files]
        return {**self.contents[files], "norm": " ".join(own_files.values())}

    def run_one(self, run: Run, arguments: list[str]) -> None:
        """Start the recipe and wait for it.

        Raises RunInterrupted when this process was asked to stop, OptionError when the recipe refused its input.
        """
        run.folder.mkdir(parents=True, exist_ok=True)
        log = run.folder / "log.txt"
        command = [*self.launcher, str(self.script), *arguments]
        with open(log, "ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            self.child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
            try:
                if self.stopping:  # the signal came while the process was being started
                    self.child.terminate()
                code = self.child.wait()
            except BaseException:
                self.child.terminate()
                self.child.wait()
                raise
            finally:
                self.child = None
        if self.stopping:
            raise RunInterrupted
        if run.status != "unfinished":
            return
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if code == 2:
            raise OptionError(f"{self.script.name}: {lines[-1].removeprefix('error: ')}")
        self.failed.append(run)
        print(f"{run.folder} failed with exit code {code}; the end of {log}:", file=sys.stderr)
        print("\n".join(f"    {line}" for line in lines[-5:]), file=sys.stderr, flush=True)

    def stop(self, number: int, *_: object) -> None:
        """On SIGTERM or Ctrl-C: hand it to the run, which saves a checkpoint."""
        self.stopping = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if self.child is not None:
            self.child.terminate()

    def points(self, variant: str) -> list[dict[str, str]]:
        """Return the points of the grid for a variant."""
        return grid_points(self.grid, variant, self.settings[kind(variant)])

    def plan_search(self) -> None:
        """Plan every variant's points of the grid, where it has more than one, with the first seeds."""
        for norm in self.own.norms:
            points = self.points(norm)
            for point in points if len(points) > 1 else []:
                slug = ",".join([folder_name(norm), *(f"{name}={value}" for name, value in point.items())])
                folder = self.own.output_dir / "search" / slug.replace("/", "_")
                for number, seed in enumerate(self.own.seeds[: self.own.grid_seeds]):
                    self.search.append(
                        Run(norm, seed, folder.with_name(f"{folder.name}-seed{seed}") if number else folder, point)
                    )

    def choose(self) -> dict[str, dict[str, str]]:
        """Return, for every variant, the point of the grid with the best mean validation score over the seeds tried; a
        point of which more runs finished comes first."""
        chosen = {}
        for norm in self.own.norms:
            points = self.points(norm)
            ranks = [[self.rank(run) for run in self.search if (run.norm, run.choice) == (norm, p)] for p in points]
            finished = [[value for ended, value in found if ended] for found in ranks]
            diverged = [[value for ended, value in found if not ended] for found in ranks]
            keys = [(len(a), *map(fmean, filter(None, (a, b)))) for a, b in zip(finished, diverged, strict=True)]
            chosen[norm] = points[keys.index(max(keys))]
        return chosen

    def rank(self, run: Run) -> tuple[int, float]:
        """Orders the runs of a search; one that diverged late before one that diverged early, after all others."""
        if run.status != "finished":
            return (0, run.record.get("step", -1))
        record = run.record
        name, higher = self.task.selection(self.options(self.rest))
        value = record["validation"][name]
        if value is None or not math.isfinite(value):
            return (0, -1)
        return (1, record["validation"][name] if higher else -record["validation"][name])

    def plan_runs(self, chosen: dict[str, dict[str, str]]) -> None:
        """Seed by seed, so that a comparison that is stopped early has compared like with like."""
        folder = self.own.output_dir / "runs"
        self.runs = [
            self.planned(Run(norm, seed, folder / f"{folder_name(norm)}-seed{seed}", chosen[norm]))
            for seed in self.own.seeds
            for norm in self.own.norms
        ]

    def planned(self, run: Run) -> Run:
        """Return the run itself, or the record of `--records` that stands for it while its folder holds no result."""
        kept = self.adopted.get((public_name(run.norm), run.seed))
        return run if kept is None or run.status != "unfinished" else dataclasses.replace(kept, norm=run.norm)

    def report(self, command: str) -> dict[str, Any]:
        """Write all tables and figures of what there is."""
        folder = self.own.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        summary = summarize(
            self.runs,
            self.search,
            self.task,
            title=self.own.title,
            column=self.own.paper,
            command=command,
        )
        write_json(folder / "comparison.json", summary)
        about = {"recipe": self.script.stem, "title": self.own.title, "machine": machine()}
        ended = [run for run in self.runs if run.status != "unfinished"]
        write_records(
            folder / "records.jsonl", [to_record(run, self.task, self.options_class, **about) for run in ended]
        )
        write_report(folder, summary, self.runs)
        return summary

    def estimate(self) -> str:
        """Steps, tokens, parameters and measured time of the whole comparison, from a few steps of every norm."""
        rows = [("norm", "parameters", "samples", "tokens", "steps", "s a step", "runs", "hours in all")]
        total = 0.0
        with tempfile.TemporaryDirectory() as folder:
            for norm in self.own.norms:
                run = Run(norm, self.own.seeds[0], Path(folder) / folder_name(norm), self.points(norm)[0])
                short = {
                    "max_steps": str(ESTIMATE_STEPS),
                    "eval_steps": "null",
                    "max_validation_samples": "32",
                    "average_checkpoints": "0",
                    "report_to": "[]",
                    "push_to_hub": "false",
                }
                changes = [
                    text for name, value in short.items() if name in self.names for text in (f"--{name}", value)
                ]
                self.run_one(run, [*self.arguments(run, test=False), *changes])
                if run.status != "finished":
                    rows.append((norm, *(["-"] * 6), outcome(run)))
                    continue
                record, options = run.record, self.options(self.rest)
                steps = options.max_steps or options.num_epochs * record["steps_per_epoch"]
                points = len(self.points(norm))
                num_runs = len(self.own.seeds) + (points * self.own.grid_seeds if points > 1 else 0)
                hours = num_runs * steps * record["seconds_per_step"] / 3600
                total += hours
                rows.append(
                    (
                        norm,
                        f"{record['parameters']:,}",
                        f"{record['train_samples']:,}",
                        f"{record['train_tokens']:,}",
                        f"{steps:,}",
                        f"{record['seconds_per_step']:.3f}",
                        str(num_runs),
                        f"{hours:.2f}",
                    )
                )
        return (
            f"{align(rows)}\n\nIn all about {total:.1f} hours of training on this machine as it is now "
            f"({ESTIMATE_STEPS} steps of every norm measured); evaluation, saving and start-up come on top."
        )
