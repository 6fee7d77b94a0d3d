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
from common.options import OptionError, parse_options, read_config
from common.results import align
from common.setup import describe_norm
from comparison.choices import MOST_SEEDS, OWN, choose_recipe, grid_points, parse_grid
from comparison.paper import BASELINE
from comparison.records import Run, launched_unlike, read_records, stated, to_record, write_records
from comparison.report import write_report
from comparison.summary import machine, summarize
from comparison.variants import canonical, folder_name, kind, known_settings, public_name, split, value_text
from hf_adanorm.norms import resolve_norm
from tasks.data import DATA_OPTIONS, data_content

ESTIMATE_STEPS = 25


class RunInterrupted(Exception):  # noqa: N818  (no error: the comparison was asked to stop)
    """SIGTERM or Ctrl-C; the run in progress has saved a checkpoint."""


class Comparison:
    """The runs of one comparison; `own` are its options, `rest` those of the recipe, as `compare.py` reads them."""

    def __init__(self, own: argparse.Namespace, rest: list[str]):
        self.own, self.rest = own, rest
        recipe, self.options_class = choose_recipe(own.recipe, own.config)
        module = importlib.import_module(recipe)
        self.script, self.task = Path(module.__file__), module.TASK
        self.names = {item.name for item in dataclasses.fields(self.options_class)}
        if min(own.seeds, default=-1) < 0 or (len(own.seeds) == 1 and own.seeds[0] > MOST_SEEDS):
            raise OptionError(f"--seeds: expected how many (at most {MOST_SEEDS}) or several seeds, got {own.seeds}")
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
        self.check_arguments({name for known in self.settings.values() for name in known} - self.names)
        own.norms = list(dict.fromkeys(map(self.canonical, own.norms)))
        self.adopted = {(run.norm, run.seed): run for path in own.records for run in read_records(path)}
        self.search: list[Run] = []  # planned here; the runs are planned when the grid has been searched
        self.runs: list[Run] = []
        self.failed: list[Run] = []
        self.contents: dict[Any, dict[str, str]] = {}
        self.stopping = ""
        self.child: subprocess.Popen[bytes] | None = None
        self.check_all()
        self.plan_search()

    def check_arguments(self, settings: set[str]) -> None:
        """Raise OptionError for an option that the comparison sets, or a setting that is not tied to one norm.

        Set `grid`. Settings belong to a norm: to its name, or to its mapping in a config's `norm_settings`.
        """
        self.grid = parse_grid(self.own.grid, self.names | settings)
        given = {word[2:].partition("=")[0] for word in self.rest if word.startswith("--")}
        if own := given & set(OWN):
            raise OptionError(f"--{min(own)} is set by the comparison: use --norms, --seeds, --output_dir")
        config = read_config(self.own.config).get("norm_settings") or {} if self.own.config else {}
        plain = {name for name, value in config.items() if not isinstance(value, dict)}
        if loose := (given | plain) & settings:
            name = min(loose)
            norm = next((norm for norm, known in self.settings.items() if name in known), "NORM")
            raise OptionError(
                f"--{name}: a comparison takes settings in the name of a norm, as in --norms {norm}:{name}=VALUE, or "
                f"for one norm in the config, as in norm_settings: {{{norm}: {{{name}: VALUE}}}}"
            )

    def options(self, arguments: list[str]) -> Any:
        """Return the recipe's options as these arguments set them. Raises OptionError for what the recipe refuses."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return parse_options(self.options_class, arguments)
        except SystemExit as error:
            raise OptionError(f"{self.script.name}: {said.getvalue().strip().removeprefix('error: ')}") from error

    def canonical(self, text: str) -> str:
        """Return the name of a variant among runs with these options."""
        norm = kind(text)
        options = self.options([*self.rest, "--norm", norm])
        return canonical(text, {**self.settings[norm], **options.norm_settings}, self.grid)

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
        values = {"norm": norm, "seed": run.seed, "output_dir": run.folder, **settings, **run.choice}
        values |= {} if test else self.task.without_test
        return [*self.rest, *(text for name, value in values.items() for text in (f"--{name}", value_text(value)))]

    def execute(self, runs: Sequence[Run], *, test: bool = True) -> None:
        """Run what is not finished, one after the other."""
        for run in runs:
            self.check_same_options(run, test=test)
        self.check_launched_alike(runs)
        stage = "run" if test else "search"
        for position, run in enumerate(runs, start=1):
            choice = "".join(f", {name} {value}" for name, value in run.choice.items())
            about = f"{stage} {position}/{len(runs)}: {run.norm}, seed {run.seed}{choice}"
            started = time.perf_counter()
            if run.status == "unfinished" and not self.own.report_only:
                print(f"{about}: started, see {run.folder}/log.txt", flush=True)
                self.run_one(run, self.arguments(run, test=test))
                self.check_launched_alike(runs)
            said = str(run)
            if run.status == "finished":
                where = "test" if run.record["test"] else "validation"
                value = run.record[where][self.task.score]  # null: not finite
                score = math.nan if value is None else value
                said = f"{where} {self.task.label} {score:.{self.task.decimals}f}"
            print(f"{about}: {said}, {time.perf_counter() - started:,.0f} s", flush=True)

    def check_same_options(self, run: Run, *, test: bool = True) -> None:
        """Raise OptionError if a run that ended had other options or other data than it would be given now."""
        saved = run.record.get("options")
        if saved is None:
            return
        options = self.options(self.arguments(run, test=test))
        given, default = (json.loads(json.dumps(dataclasses.asdict(one))) for one in (options, self.options_class()))
        then, now = (default | stated(self.options_class, one, run.norm) for one in (saved, given))
        where = f"the record of {run.norm}, seed {run.seed}" if run.adopted else str(run.folder)
        contents = self.content(options)
        differing = [changed] if (changed := changed_content(run.record.get("content"), contents)) else []
        differing += [
            f"{name}: {then[name]!r} then, {now[name]!r} now"
            for name in now
            if then[name] != now[name] and name not in contents
        ]
        if differing:
            raise OptionError(
                f"{where} holds a run with other options or data ({'; '.join(differing)}); give the same, or another "
                "--output_dir"
            )

    def check_launched_alike(self, runs: Sequence[Run]) -> None:
        """Raise OptionError when runs were divided over different numbers of processes, and so had other batches, or
        ran in different precisions."""
        ended = [run for run in runs if run.status != "unfinished"]
        for run in ended:
            if (name := launched_unlike(run.record, ended[0].record)) and name not in self.grid:
                raise OptionError(
                    f"{run.folder} holds a run with {name} {run.record.get(name)}, {ended[0].folder} one with "
                    f"{ended[0].record.get(name)}: runs must share the same launch settings; delete those that do not"
                )

    def content(self, options: Any) -> dict[str, str]:
        """Return hashes of the data files, which are read once for all runs, and of the file of the norm."""
        files = tuple(sorted((name, str(value)) for name, value in vars(options).items() if name in DATA_OPTIONS))
        if files not in self.contents:
            self.contents[files] = data_content(options)
        own_files = describe_norm(options)["norm_files"]
        return {**self.contents[files], **({"norm": " ".join(own_files.values())} if own_files else {})}

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
        if self.stopping:  # the signal came while the process was being started
            self.child.terminate()
        code = self.child.wait()
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
        """Pass SIGTERM or Ctrl-C on to the run, which saves a checkpoint."""
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
            keys = []
            for found in ranks:
                finished, diverged = ([value for ended, value in found if ended == kept] for kept in (1, 0))
                keys.append((len(finished), *(fmean(values) for values in (finished, diverged) if values)))
            chosen[norm] = points[keys.index(max(keys))]
        return chosen

    def rank(self, run: Run) -> tuple[int, float]:
        """Return what orders the runs of a search; one that diverged late before one that diverged early, after all
        others."""
        if run.status != "finished":
            return (0, run.record.get("step", -1))
        name, higher = self.task.selection(self.options(self.rest))
        value = run.record["validation"][name]
        if value is None or not math.isfinite(value):
            return (0, -1)
        return (1, value if higher else -value)

    def plan_runs(self, chosen: dict[str, dict[str, str]]) -> None:
        """Plan the runs seed by seed, so that a comparison that is stopped early has compared like with like.

        A record of `--records` stands for a run while its folder holds no result.
        """
        for seed in self.own.seeds:
            for norm in self.own.norms:
                folder = self.own.output_dir / "runs" / f"{folder_name(norm)}-seed{seed}"
                run, kept = Run(norm, seed, folder, chosen[norm]), self.adopted.get((public_name(norm), seed))
                if kept is not None and run.status == "unfinished":
                    run = dataclasses.replace(kept, norm=norm)
                self.runs.append(run)

    def report(self, command: str) -> dict[str, Any]:
        """Write all tables and figures of what there is."""
        folder = self.own.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        about = {"title": self.own.title, "column": self.own.paper, "command": command}
        summary = summarize(self.runs, self.search, self.task, **about)
        write_json(folder / "comparison.json", summary)
        made = {"recipe": self.script.stem, "title": self.own.title, "machine": machine()}
        ended = [run for run in self.runs if run.status != "unfinished"]
        records = [to_record(run, self.task, self.options_class, **made) for run in ended]
        write_records(folder / "records.jsonl", records)
        write_report(folder, summary, self.runs)
        return summary

    def estimate(self) -> str:
        """Return steps, parameters and measured time of the whole comparison, from a few steps of every norm."""
        rows, total = [("norm", "parameters", "samples", "tokens", "steps", "s a step", "runs", "hours in all")], 0.0
        short = {"max_steps": ESTIMATE_STEPS, "eval_steps": None, "max_validation_samples": 32}
        short |= {"average_checkpoints": 0, "report_to": [], "push_to_hub": False}
        changes = [
            text for name, value in short.items() if name in self.names for text in (f"--{name}", value_text(value))
        ]
        for norm in self.own.norms:
            with tempfile.TemporaryDirectory() as folder:
                points = self.points(norm)
                run = Run(norm, self.own.seeds[0], Path(folder), points[0])
                self.run_one(run, [*self.arguments(run, test=False), *changes])
                record, options = run.record, self.options(self.rest)
                if run.status != "finished":
                    rows.append((norm, *(["-"] * 6), str(run)))
                    continue
            steps = options.max_steps or options.num_epochs * record["steps_per_epoch"]
            num_runs = len(self.own.seeds) + (len(points) * self.own.grid_seeds if len(points) > 1 else 0)
            hours = num_runs * steps * record["seconds_per_step"] / 3600
            total += hours
            sizes = [
                f"{size:,}" for size in (*map(record.get, ("parameters", "train_samples", "train_tokens")), steps)
            ]
            rows.append((norm, *sizes, f"{record['seconds_per_step']:.3f}", str(num_runs), f"{hours:.2f}"))
        return (
            f"{align(rows)}\n\nIn all about {total:.1f} hours of training on this machine as it is now "
            f"({ESTIMATE_STEPS} steps of every norm measured); evaluation, saving and start-up come on top."
        )
