"""Kill runs at random, many times: nothing that stood is lost, nothing is torn, the end is the same.

    python tests/campaigns/soak.py --kills 60

Each recipe is started again and again with the same command and killed by SIGKILL: half of the times at a random
moment of its life, half of them a random moment after a checkpoint, a best model or the results began to be written.
After every kill all files under a final name must be whole, no checkpoint may be gone without a newer one, and the
next start must go on from the newest. A run that reaches its end must have the weights of an undisturbed run, bit for
bit; then a new one begins. Ends with code 1 and the reason when one of these does not hold.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

from tests.recipes.fault_runs import STEPS, arguments, write_data  # noqa: E402
from tests.recipes.recipe_process import (  # noqa: E402
    RECIPES,
    check_whole,
    resumed_from,
    same_weights,
    start,
    wait,
)

LAST = f"checkpoint-{STEPS}"


def soak(recipe: str, kills: int, draw: random.Random, folder: Path) -> Counter[str]:
    """Counts of what was done and seen. Raises AssertionError when something was lost."""
    data = folder / "data"
    data.mkdir()
    write_data(data)
    whole, run, log = folder / "whole", folder / "run", folder / "log"
    assert wait(start(recipe, arguments(recipe, data, whole), log)) == 0, log.read_text()
    began = time.monotonic()  # once more, now that everything is cached
    assert wait(start(recipe, arguments(recipe, data, whole, overwrite_output_dir=True), log)) == 0, log.read_text()
    lasts = time.monotonic() - began
    counts: Counter[str] = Counter({"kills": 0})
    newest = 0
    while counts["kills"] < kills:
        log.unlink()
        process = start(recipe, arguments(recipe, data, run), log)
        counts["starts"] += 1
        while_writing = draw.random() < 0.5
        deadline = time.monotonic() + draw.uniform(0, 0.8 * lasts)
        to_pass = draw.randrange(4)  # so many writings before the one that is interrupted
        seen = set(run.glob(".tmp-*"))
        while process.is_alive() and time.monotonic() < deadline:
            if while_writing and (new := set(run.glob(".tmp-[!d]*")) - seen):
                seen |= new
                deadline += 0.2 * lasts
                if not to_pass:
                    time.sleep(draw.uniform(0, 0.03))
                    break
                to_pass -= 1
            time.sleep(0.0005)
        process.kill()
        code = wait(process)
        assert code in (0, -signal.SIGKILL), log.read_text()
        left = check_whole(run)
        log.touch()  # it may have been killed before its first breath
        resumed = resumed_from(log)
        if code == -signal.SIGKILL:
            counts["kills"] += 1
            counts["kills with a half-written file or folder left"] += run.is_dir() and any(run.glob(".tmp-*"))
            counts["kills before the first checkpoint"] += left == 0
        assert resumed in (0, newest), f"resumed from {resumed}, the newest checkpoint was {newest}"
        counts["starts that resumed"] += resumed > 0
        assert left >= newest, f"checkpoint {newest} was lost: the newest is {left}"
        newest = left
        if (run / "results.json").exists():
            assert same_weights(run / LAST, whole / LAST), "other weights than the undisturbed run"
            counts["runs that ended with the same weights"] += 1
            shutil.rmtree(run)
            newest = 0
    if run.exists():
        assert wait(start(recipe, arguments(recipe, data, run), log)) == 0, log.read_text()
        assert same_weights(run / LAST, whole / LAST), "other weights than the undisturbed run"
        counts["runs that ended with the same weights"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="over all recipes")
    parser.add_argument("--recipe", choices=RECIPES, help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    recipes = [args.recipe] if args.recipe else list(RECIPES)
    for index, recipe in enumerate(recipes):
        kills = args.kills // len(recipes) + (index < args.kills % len(recipes))
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            counts = soak(recipe, kills, draw, Path(folder))
        print(f"{recipe}: nothing lost, nothing torn ({time.monotonic() - began:.0f} s)")
        for what, count in counts.items():
            print(f"  {count:4d} {what}", flush=True)


if __name__ == "__main__":
    main()
