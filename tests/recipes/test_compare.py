"""Comparisons of norms: the choice of runs, the statistics, and one small comparison with real runs."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

import classification
import compare
from common.endings import EXIT_RESUME
from tests.recipes.tiny_configs import TINY_CLASSIFIER

PARTIAL = "detachnorm:detach_variance=false"


def arguments_for(texts, folder, *changes, test=True):
    options = {
        "recipe": "classification",
        "output_dir": folder,
        "train_file": texts["train"],
        "validation_file": texts["validation"],
        "model_config": json.dumps(TINY_CLASSIFIER),
        "min_frequency": 1,
        "max_length": 32,
        "batch_size": 8,
        "max_steps": 30,
        "eval_steps": 10,
        "logging_steps": 5,
        "max_grad_norm": 0,
    }
    options |= {"test_file": texts["test"]} if test else {}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))] + list(changes)


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


# What is run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--seed", "3"], "--seed is set by the comparison"),
        (["--grid", "C=1,2", "nothing=1"], "'nothing' is no option of the recipe"),
        (["--seeds", "0"], "--seeds: expected how many (at most 1000) or several seeds, got []"),
        (["--learning_rat", "1"], "did you mean '--learning_rate'?"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--config", "absent.yaml"], "--config absent.yaml: no such file"),
        (["--seeds", "3000000000"], "--seeds: expected how many (at most 1000)"),
        (["--launcher", "no-such-launcher"], "--launcher 'no-such-launcher': there is no such command"),
        (["--launcher", "'open"], "--launcher 'open: No closing quotation"),
        (["--grid", "C=0,1"], "--norms adanorm: C must be a finite number > 0"),
        (["--norms", "adanorm:k=-1"], "--norms adanorm:k=-1: k must be a finite number >= 0"),
        (["--norms", "detachnorm:detach_mean=false,detach_variance=false"], "set detach_variance=True"),
        (["--norms", "adnorm"], "norm 'adnorm': expected none, layernorm"),
        (["--grid_seeds", "4"], "--grid_seeds must be in [1, 3]"),
        (["--eval_batch_size", "0"], "--eval_batch_size must be positive"),
    ],
)
def test_bad_input_ends_before_any_run(changes, said, texts, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        compare.main(arguments_for(texts, tmp_path / "out", *changes))
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# A small comparison with real runs


@pytest.fixture(scope="module")
def compared(texts, tmp_path_factory):
    """LayerNorm, AdaNorm and half a DetachNorm, one seed, a learning rate each, of a good one and a hopeless one.

    What the comparison would start as processes of its own is run here beforehand, by the same command lines, to spare
    the time of starting them; it is left the last run.
    """
    folder = tmp_path_factory.mktemp("compared") / "out"
    changes = ["--norms", "layernorm", PARTIAL, "adanorm", "--seeds", "1"]
    changes += ["--grid", "learning_rate=1e36,0.01", "--paper", "RT"]
    arguments = arguments_for(texts, folder, *changes)
    comparison = compare.Comparison(*compare.parse_arguments(arguments))
    for run in comparison.search:
        with contextlib.suppress(SystemExit):  # of a run that diverges
            classification.main(comparison.arguments(run, test=False))
    comparison.plan_runs(comparison.choose())
    for run in comparison.runs[:-1]:
        classification.main(comparison.arguments(run))
    assert comparison.runs[-1].status == "unfinished"
    compare.main(arguments)
    assert comparison.runs[-1].status == "finished"
    return folder, arguments


def test_a_contestant_with_settings_is_trained_with_them(compared):
    folder, _ = compared
    options = read(folder / "runs" / "detachnorm,detach_variance=false-seed1", "results.json")["options"]
    assert (options["norm"], options["norm_settings"]) == ("detachnorm", {"detach_variance": False})


def test_hyper_parameters_are_chosen_on_validation_and_the_test_set_is_not_read(compared):
    folder, _ = compared
    hopeless = folder / "search" / "adanorm,learning_rate=1e36"
    assert read(hopeless, "diverged.json")["step"] >= 1
    tried = read(folder / "search" / "adanorm,learning_rate=0.01", "results.json")
    assert tried["test"] is None
    assert tried["options"]["score_test"] is False
    final = read(folder / "runs" / "adanorm-seed1", "results.json")
    assert final["options"]["learning_rate"] == 0.01
    assert final["test"]["accuracy"] >= 0
    answers = read(folder / "runs" / "adanorm-seed1", "test_predictions.json")
    assert final["chance"] == max(map(answers["labels"].count, (0, 1))) / len(answers["labels"])
    losses = [[entry["loss"] for entry in run["history"]] for run in (final, tried)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_summary_compares_the_runs_with_each_other(compared):
    folder, _ = compared
    summary = read(folder, "comparison.json")
    rows = {row["norm"]: row for row in summary["rows"]}
    scores = {}
    for norm in ("layernorm", "adanorm", PARTIAL):
        answers = read(folder / "runs" / f"{norm.replace(':', ',')}-seed1", "test_predictions.json")
        scores[norm] = 100 * np.mean(np.equal(answers["predictions"], answers["labels"]))
        assert rows[norm]["mean"] == pytest.approx(scores[norm])
        assert rows[norm]["tried"] == 2
    assert rows["adanorm"]["difference"] is None  # one seed
    run = read(folder / "runs" / "adanorm-seed1", "results.json")
    losses = [entry["loss"] for entry in run["train_history"] if entry["step"] > 20]  # evaluated at 10, 20 and 30
    assert rows["adanorm"]["gaps"] == {"1": pytest.approx(run["history"][-1]["loss"] - np.mean(losses))}
    assert summary["num_test_examples"] == 23


def test_all_files_of_the_report_are_there(compared):
    folder, _ = compared
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert re.search(r"\| AdaNorm \| 77\.50 \| \d+\.\d\d \(n=1\) \|", table)
    assert "No difference was tested: that takes at least two seeds" in table
    assert len((folder / "records.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert "AdaNorm learning_rate 0.01 (of 2 tried). All else was the same for all norms." in table
    assert "<svg" in (folder / "curves.svg").read_text(encoding="utf-8")[:2000]
    assert Image.open(folder / "curves.png").width > 1500


def test_the_html_report_stands_alone(compared):
    folder, _ = compared
    text = (folder / "report.html").read_text(encoding="utf-8")
    sources, links, cells = [], [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            sources.extend(value for name, value in attributes if name == "src")
            links.extend(value for name, value in attributes if name == "href")

        def handle_data(self, data):
            cells.append(data.strip())

    Reader().feed(text)
    assert [source[:22] for source in sources] == ["data:image/png;base64,"]
    assert {folder / unquote(link) for link in links} == set((folder / "runs").iterdir())
    assert any(
        re.search(r"train\.\w+, 150 examples to train on.* updates .*, 1 seed\.", cell, re.DOTALL) for cell in cells
    )
    assert "AdaNorm" in cells
    assert any("No difference was tested" in cell for cell in cells)


def test_a_finished_comparison_is_only_reported_again(compared, capsys):
    folder, arguments = compared
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("results.json")}
    compare.main(arguments)
    assert "run 3/3: adanorm, seed 1" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("results.json")} == before
    assert len(before) == 6


def test_other_options_for_finished_runs_are_refused_by_name(compared, capsys):
    _, arguments = compared
    with pytest.raises(SystemExit) as ended:
        compare.main([*arguments, "--weight_decay", "0.5"])
    assert ended.value.code == 2
    assert "holds a run with other options or data (weight_decay: 0.0 then, 0.5 now)" in capsys.readouterr().err


def test_a_stopped_comparison_goes_on_where_it_was(texts, tmp_path, capsys):
    arguments = arguments_for(texts, tmp_path, "--norms", "adanorm", "--seeds", "1", test=False)
    arguments += ["--max_steps", "3000", "--eval_steps", "1000", "--checkpointing_steps", "20"]
    run = tmp_path / "runs" / "adanorm-seed1"

    def terminate_in_training():
        while not list(run.glob("checkpoint-*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate_in_training, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        compare.main(arguments)
    assert ended.value.code == EXIT_RESUME
    assert not (run / "results.json").exists()
    assert "not finished" in (tmp_path / "table.md").read_text(encoding="utf-8")
    [checkpoint] = run.glob("checkpoint-*")
    assert read(checkpoint, "progress.json")["step"] >= 20
    assert "stopped by SIGTERM" in capsys.readouterr().out


def test_a_run_that_fails_is_told_and_the_others_go_on(texts, tmp_path, capsys):
    launcher = f"{sys.executable} -c 'import sys; print(sys.argv[2:]); sys.exit(7)'"
    with pytest.raises(SystemExit) as ended:
        compare.main(arguments_for(texts, tmp_path, "--norms", "layernorm", "adanorm", "--launcher", launcher))
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.err.count("failed with exit code 7") == 6  # two norms, three seeds
    assert "['--train_file'" in said.err
    assert "run 6/6: adanorm, seed 3: unfinished" in said.out
    assert "no run finished" in said.err


def test_an_estimate_measures_and_trains_nothing(texts, tmp_path, capsys):
    compare.main(
        arguments_for(texts, tmp_path / "out", "--norms", "none", "--seeds", "4", "--estimate", "--max_steps", "7200")
    )
    said = capsys.readouterr().out
    assert re.search(r"none +[\d,]+ +150 +[\d,]+ +7,200 +0\.\d{3} +4 +\d+\.\d\d\n", said)
    assert "In all about" in said
    assert not (tmp_path / "out").exists()


def test_records_stand_for_runs_on_another_machine(compared, tmp_path, capsys):
    folder, arguments = compared
    elsewhere = [*arguments, "--output_dir", str(tmp_path), "--records", str(folder / "records.jsonl")]
    ran = shutil.copytree(folder / "search", tmp_path / "search")
    compare.main(elsewhere)
    assert "run 3/3: adanorm, seed 1, learning_rate 0.01: test accuracy (%)" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert ran.is_dir()
    here, there = read(folder, "comparison.json"), read(tmp_path, "comparison.json")
    for ours, theirs in zip(there["rows"], here["rows"], strict=True):
        assert ours.pop("gaps") == pytest.approx(theirs.pop("gaps"), abs=1e-6)
        assert ours == theirs
    assert (tmp_path / "records.jsonl").read_bytes() == (folder / "records.jsonl").read_bytes()


def test_records_of_other_options_or_data_are_refused(compared, texts, tmp_path, capsys):
    folder, arguments = compared
    shutil.copytree(folder / "search", tmp_path / "search")
    elsewhere = [*arguments, "--output_dir", str(tmp_path), "--records", str(folder / "records.jsonl")]
    for changes, said in (
        (["--weight_decay", "0.5"], "(weight_decay: 0.0 then, 0.5 now)"),
        (["--train_file", str(texts["test"])], "(what --train_file names has changed since"),
    ):
        with pytest.raises(SystemExit) as ended:
            compare.main([*elsewhere, "--report_only", "--grid", "learning_rate=0.01", *changes])
        assert ended.value.code == 2
        said = f"the record of layernorm, seed 1 holds a run with other options or data {said}"
        assert said in capsys.readouterr().err


def test_a_norm_of_ones_own_is_compared_and_its_file_belongs_to_the_run(texts, tmp_path, capsys):
    file = tmp_path / "my_norms.py"
    lines = ["import torch", "from torch import nn", "", "", "class Derf(nn.Module):"]
    lines += ["    def __init__(self, normalized_shape, eps=1e-5, *, alpha=0.5, device=None, dtype=None):"]
    lines += ["        super().__init__()", "        self.alpha = alpha", "", "    def forward(self, x):"]
    file.write_text("\n".join([*lines, "        return torch.erf(self.alpha * x)", ""]))
    arguments = arguments_for(texts, tmp_path / "out", "--norms", "layernorm", f"{file}:Derf:alpha=0.7")
    arguments += ["--seeds", "1", "--max_steps", "4", "--eval_steps", "2"]
    comparison = compare.Comparison(*compare.parse_arguments(arguments))
    comparison.plan_runs(comparison.choose())
    for run in comparison.runs:
        classification.main(comparison.arguments(run))
    compare.main(arguments)
    own = read(tmp_path / "out" / "runs" / "my_norms.Derf,alpha=0.7-seed1", "results.json")
    assert own["norm_modules"] == read(tmp_path / "out" / "runs" / "layernorm-seed1", "results.json")["norm_modules"]
    assert "| Derf (alpha = 0.7) | " in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    lines = (tmp_path / "out" / "records.jsonl").read_text(encoding="utf-8")
    assert '"norm": "my_norms.py:Derf:alpha=0.7"' in lines
    assert str(tmp_path) not in lines
    with open(file, "a") as stream:
        stream.write("# changed\n")
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert "what --norm names has changed since" in capsys.readouterr().err


def test_it_speaks_before_torch_is_loaded(texts, tmp_path):
    command = [sys.executable, compare.__file__, *arguments_for(texts, tmp_path), "--report_only"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        process.kill()
    assert first == f"classification: 5 norms x 3 seeds in {tmp_path}; loading torch\n"
