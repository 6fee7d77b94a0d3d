"""Which runs a comparison has, and which of a grid it takes; that they run is in test_compare.py."""

import dataclasses
import json

import pytest

from common.options import OptionError
from compare import parse_arguments
from comparison.records import Run
from comparison.running import Comparison


def planned(folder, *arguments):
    return Comparison(*parse_arguments(["--recipe", "classification", "--output_dir", str(folder), *arguments]))


def test_a_score_that_is_not_finite_never_wins_a_grid(tmp_path):
    comparison = planned(tmp_path / "out")
    ranks = []
    for number, accuracy in enumerate((None, 0.2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        record = {"options": {}, "validation": {"accuracy": accuracy, "loss": accuracy}}
        (folder / "results.json").write_text(json.dumps(record))
        ranks.append(comparison.rank(Run("adanorm", 1, folder)))
    assert ranks[1] > ranks[0]


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ({"1": (0.9, 0.1), "2": (0.6, 0.7), "3": (0.99, 7)}, "2"),  # the best mean of those that finished most often
        ({"1": (0.9, 7), "2": (0.6, 700), "3": (7, 700)}, "1"),  # a step of divergence is no score
        ({"1": (7, 8), "2": (9, 700), "3": (8, 9)}, "2"),  # none finished: the one that went on longest
    ],
)
def test_a_grid_is_chosen_by_the_mean_over_seeds_and_by_who_finished(found, chosen, tmp_path):
    grid = ["--grid", "C=1,2,3", "--grid_seeds", "2"]
    comparison = planned(tmp_path, "--norms", "adanorm", "--seeds", "2", *grid)
    assert [(run.choice["C"], run.seed) for run in comparison.search] == [(C, seed) for C in found for seed in (1, 2)]
    for run in comparison.search:
        run.folder.mkdir(parents=True)
        value = found[run.choice["C"]][run.seed - 1]
        scored = {"validation": {"accuracy": value}}
        name, record = ("results", scored) if value < 1 else ("diverged", {"step": value})
        (run.folder / f"{name}.json").write_text(json.dumps({"options": {}, **record}))
    assert comparison.choose() == {"adanorm": {"C": chosen}}


@pytest.mark.parametrize(("name", "values"), [("num_processes", (8, 1)), ("mixed_precision", ("bf16", "no"))])
def test_runs_that_were_launched_differently_are_not_compared(name, values, tmp_path):
    comparison = planned(tmp_path, "--norms", "layernorm", "adanorm", "--seeds", "1", "--report_only")
    comparison.plan_runs(comparison.choose())
    for run, value in zip(comparison.runs, values, strict=True):
        run.folder.mkdir(parents=True)
        options = dataclasses.asdict(comparison.options(comparison.arguments(run)))
        record = {"options": options, "test": None, "validation": {"accuracy": 0.5}, name: value}
        (run.folder / "results.json").write_text(json.dumps(record))
    with pytest.raises(OptionError, match=rf"adanorm-seed1 holds a run with {name} {values[1]}, .* with {values[0]}"):
        comparison.execute(comparison.runs)


def test_an_option_that_a_finished_run_did_not_have_was_at_its_default(tmp_path):
    comparison = planned(tmp_path, "--norms", "layernorm", "--seeds", "1", "--split_sizes", "[3, 2, 1]")
    (tmp_path / "results.json").write_text(json.dumps({"options": {}}))
    with pytest.raises(OptionError, match=r"split_sizes: None then, \[3, 2, 1\] now"):
        comparison.check_same_options(Run("layernorm", 1, tmp_path))


def folders(folder, norms, *changes):
    comparison = planned(folder, "--norms", *norms, "--seeds", "1", *changes)
    comparison.plan_runs(comparison.choose())
    return [run.folder.name for run in comparison.runs]


def test_default_settings_spelled_out_are_the_bare_name(tmp_path):
    norms = ["adanorm", "adanorm:C=1,k=0.1", "adanorm:k=0.10,C=2.0", "adanorm:C=2", "detachnorm:detach_mean=True"]
    assert folders(tmp_path, norms) == ["adanorm-seed1", "adanorm,C=2-seed1", "detachnorm-seed1"]
    # Where the grid tries values of C, a C in the name is fixed.
    assert folders(tmp_path, ["adanorm", "adanorm:C=1"], "--grid", "C=1,2")[1] == "adanorm,C=1-seed1"


def test_a_config_sets_settings_for_one_norm(tmp_path):
    config = tmp_path / "own.yaml"
    config.write_text("norm_settings: {adanorm: {C: 2}}")
    norms = ["adanorm:C=1", "adanorm:C=2", "dyt", "layernorm"]
    found = folders(tmp_path, norms, "--config", str(config))
    assert found == ["adanorm,C=1-seed1", "adanorm-seed1", "dyt-seed1", "layernorm-seed1"]


@pytest.mark.parametrize("norms", [["layernorm", "adanorm", "dyt"], ["adanorm"]])
@pytest.mark.parametrize("where", ["command", "config"])
def test_a_setting_for_no_norm_in_particular_is_refused_with_the_way_to_give_it(where, norms, tmp_path):
    config = tmp_path / "own.yaml"
    config.write_text("{norm_settings: {C: 2}}" if where == "config" else "{}")
    given = ["--C=2"] if where == "command" else []
    with pytest.raises(OptionError, match=r"--C: .*--norms adanorm:C=VALUE.*norm_settings: {adanorm: {C: VALUE}}"):
        planned(tmp_path, "--norms", *norms, "--config", str(config), *given)
