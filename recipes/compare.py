"""Compare norms over seeds with one of the recipes: tables beside the paper's, significance, curves, an HTML report.

    python recipes/compare.py --config recipes/configs/rt.yaml \\
        --norms layernorm layernorm-simple detachnorm adanorm none --seeds 5 --output_dir outputs/rt
    python recipes/compare.py --config recipes/configs/rt.yaml --seeds 5 \\
        --norms layernorm adanorm adanorm:C=2 adanorm:C=1,k=0.05 my_norms.py:Derf:alpha=0.7
    python recipes/compare.py --config recipes/configs/rt.yaml --seeds 3 --grid learning_rate=2e-4,5e-4 C=0.8,1.0
    python recipes/compare.py --config recipes/configs/iwslt14_de_en.yaml --estimate
    python recipes/compare.py --config recipes/configs/iwslt14_de_en.yaml --launcher "accelerate launch --multi_gpu"
    python recipes/compare.py --config recipes/configs/rt.yaml --seeds 20 --records docs/measured/runs/rt.jsonl
    python recipes/compare.py --gather outputs/rt outputs/mnist docs/measured/runs/sst5.jsonl --output_dir outputs/rows

Runs the recipe once for every norm and seed, with the same options and so the same budget. Options of the recipe are
passed on. Settings of a norm are part of its name; each such variant gets its own runs. A run whose loss is not finite
is recorded as diverged, with its step, and the comparison continues. The same command resumes a stopped comparison.

With `--grid`, every norm first tries every point of the grid that applies to it, with the first seed (or the first
`--grid_seeds`) and without a test split. The point with the best mean validation score is used for all its runs, so
choose between settings with `--grid`: variants named in `--norms` are all shown with their test scores.

In `output_dir`: `report.html`, `table.md`, `curves.png` and `.svg`, `comparison.json`, `records.jsonl`; the runs in
`runs/`, those of the grid in `search/`, each with its `log.txt`.

`records.jsonl` holds one line per run that ended, without weights, texts or labels. With `--records FILE`, such a line
stands for a run of the same norm, seed, options and data, on any machine. With `--gather`, nothing is trained: the
records become the table of the paper's eight rows with differences and intervals (`rows.md`, `forest.png`).

Exit codes: 0 finished, 1 a run failed (the others are done), 2 bad input, 75 stopped by SIGTERM: start it again.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from common.options import OptionError
from comparison.choices import MOST_SEEDS, choose_recipe, recipe_options
from comparison.paper import BASELINE, COLUMNS, CONFIGS, ROWS
from comparison.variants import split


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the comparison's own options, and those for the recipe."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--config", help="YAML file of the recipe's options, for instance recipes/configs/rt.yaml")
    add("--recipe", choices=list(recipe_options()), help="by default the one that knows the options in --config")
    add("--norms", nargs="+", default=ROWS, metavar="NORM", help="NORM or NORM:SETTING=VALUE,...; by default the five")
    add("--seeds", nargs="+", type=int, default=[3], help="one number: that many, from 1; several: these seeds")
    add("--output_dir", type=Path, help="default: outputs/compare-NAME, after the config")
    add("--grid", nargs="+", default=[], metavar="OPTION=A,B", help="values to try for each norm on validation")
    add("--grid_seeds", type=int, default=1, help="try them with so many of the seeds, and choose by the mean")
    add("--launcher", help='starts a script, for instance "accelerate launch --multi_gpu"')
    add("--paper", choices=[*COLUMNS, "none"], help="column of the paper to show beside; by default after the config")
    add("--estimate", action="store_true", help="measure a few steps of every norm, print the whole cost, and stop")
    add("--records", nargs="+", type=Path, default=[], metavar="FILE", help="records that stand for finished runs")
    add("--gather", nargs="+", type=Path, metavar="FILE", help="records of runs: the tables of the paper's rows")
    add("--pages", nargs="+", type=Path, default=[], help="with --gather: Markdown pages whose sections to fill")
    add("--report_only", action="store_true", help="train nothing; report on the runs that are there")
    own, rest = parser.parse_known_args(argv)
    if own.config:
        rest = ["--config", own.config, *rest]
    if len(own.seeds) == 1 and own.seeds[0] <= MOST_SEEDS:
        own.seeds = list(range(1, own.seeds[0] + 1))
    own.seeds = list(dict.fromkeys(own.seeds))
    own.title = Path(own.config).stem if own.config else own.recipe
    own.output_dir = own.output_dir or Path("outputs", "rows" if own.gather is not None else f"compare-{own.title}")
    if own.paper in (None, "none"):
        own.paper = CONFIGS.get(own.title, (None,))[0] if own.paper is None else None
    return own, rest


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":  # help, and mistakes in the options, before torch is imported
    own_options, recipe_arguments = parse_arguments(sys.argv[1:])
    try:
        for named in own_options.norms:
            split(named)
        if own_options.gather is None:
            choose_recipe(own_options.recipe, own_options.config)
            counted = f"{len(own_options.norms)} norms x {len(own_options.seeds)} seeds"
            print(f"{own_options.title}: {counted} in {own_options.output_dir}; loading torch", flush=True)
    except OptionError as mistake:
        sys.exit(_refuse(mistake))

from common.checkpoints import lock_folder
from common.endings import EXIT_RESUME
from comparison.gather import gather
from comparison.running import Comparison, RunInterrupted


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then report."""
    argv = sys.argv[1:] if argv is None else argv
    own, rest = parse_arguments(argv)
    command = shlex.join(["recipes/compare.py", *argv])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if own.gather is not None:
            if rest:
                raise OptionError(f"--gather takes files, --output_dir and --pages alone, got {shlex.join(rest)}")
            print(gather(own.gather, own.output_dir, own.pages))
            return
        comparison = Comparison(own, rest)
        for number in before:
            signal.signal(number, comparison.stop)
        if own.estimate:
            print(comparison.estimate())
            return
        if not own.report_only:
            own.output_dir.mkdir(parents=True, exist_ok=True)
            lock_folder(own.output_dir)
        comparison.execute(comparison.search, test=False)
        comparison.plan_runs(comparison.choose())
        comparison.execute(comparison.runs)
    except OptionError as error:
        sys.exit(_refuse(error))
    except RunInterrupted:
        if comparison.runs:
            comparison.report(command)
        print(f"stopped by {comparison.stopping}; start the same command to resume", flush=True)
        sys.exit(EXIT_RESUME)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not any(run.status == "finished" for run in comparison.runs):
        print("no run finished: there is nothing to compare", file=sys.stderr)
    comparison.report(command)
    print((own.output_dir / "table.md").read_text(encoding="utf-8"))
    print(f"report: {own.output_dir / 'report.html'}", flush=True)
    if BASELINE not in own.norms:
        print(f"without {BASELINE} among --norms no differences are tested", flush=True)
    if comparison.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
