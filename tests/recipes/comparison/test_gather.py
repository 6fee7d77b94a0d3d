"""The paper's rows from finished comparisons."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import compare
from classification import TASK
from common.checkpoints import write_json
from common.options import OptionError, parse_options
from comparison.gather import gather, shown_command
from comparison.runs import Run, summarize
from tasks.options import ClassificationOptions

RECIPES = Path(compare.__file__).parent


def finish(folder, norm, seed, *, num_correct, losses=(0.5, 0.4), config="rt", launched=None, choice=None, **changes):
    """A run of classification that ended, of 1,000 test examples, with its validation and its training loss."""
    options = parse_options(ClassificationOptions, ["--config", str(RECIPES / "configs" / f"{config}.yaml")])
    score = {"accuracy": num_correct / 1000}
    record = {
        "options": {**dataclasses.asdict(options), **changes},
        "validation": score,
        "test": score,
        "parameters": 7,
        "steps": 20,
        "train_samples": 8608,
        "history": [{"step": 20, "loss": losses[0]}],
        "train_history": [{"step": 20, "loss": losses[1]}],
        **(launched or {}),
    }
    run = Run(norm, seed, folder / f"{norm}-{seed}".replace(":", ","), choice or {})
    run.folder.mkdir(parents=True)
    write_json(run.folder / "results.json", record)
    # Norms agree on as many examples as they can: those before num_correct are right.
    answers = {"labels": [1] * 1000, "predictions": [int(number < num_correct) for number in range(1000)]}
    write_json(run.folder / "test_predictions.json", answers)
    return run


def compared(folder, runs, *, search=(), title="rt", column="RT", command="recipes/compare.py --config rt.yaml"):
    """The `comparison.json` of these runs."""
    summary = summarize(runs, search, TASK, title=title, column=column, command=command, num_resamples=200)
    write_json(folder / "comparison.json", summary)
    return folder


@pytest.fixture(scope="module")
def rt(tmp_path_factory):
    """AdaNorm is right on 10 examples more with every seed; LayerNorm-simple differs from seed to seed, and its
    validation loss is nearer to that in training."""
    folder = tmp_path_factory.mktemp("rt")
    runs = []
    for seed, wobble in ((1, 0), (2, 3), (3, -3)):
        runs += [
            finish(folder, "layernorm", seed, num_correct=770 + wobble, num_epochs=2),
            finish(folder, "adanorm", seed, num_correct=790 + wobble + seed, losses=(0.6 + seed / 100, 0.4)),
            finish(folder, "layernorm-simple", seed, num_correct=770 - wobble, losses=(0.45, 0.4 - seed / 1000)),
            finish(folder, "adanorm:C=2", seed, num_correct=760 + seed),
        ]
    data = "/data/rt/train.jsonl"
    options = f"--train_file {data} --test_file={data} --output_dir /tmp/rt --report_only"
    command = f"recipes/compare.py --config recipes/configs/rt.yaml {options}"
    return compared(folder, runs, command=command)


def test_scores_stand_beside_the_papers_and_are_marked(rt, tmp_path):
    text = gather([rt], tmp_path)
    ours = next(line for line in text.splitlines() if line.startswith("| **RT**"))
    cells = [cell.strip() for cell in ours.split("|")[1:-1]]
    assert cells == [
        "**RT**, accuracy (%)",
        "-",
        "77.00 ± 0.30 (n=3)",
        "77.00 ± 0.30 (n=3)",
        "-",
        "79.20 ± 0.26 (n=3) †‡",
        "76.20 ± 0.10 (n=3) ‡",
    ]
    assert "| *paper's RT, accuracy* | *76.85* | *77.21* | *76.66* | *76.40* | *77.50* |" in text
    assert "| *SST5, accuracy* | *38.55* |" in text
    assert (tmp_path / "rows.md").read_text(encoding="utf-8") == text
    assert r"RT, accuracy (\%) & - & 77.00 $\pm$ 0.30" in (tmp_path / "rows.tex").read_text(encoding="utf-8")


def test_gaps_and_their_differences_are_shown(rt, tmp_path):
    text = gather([rt], tmp_path)
    [row] = re.findall(r"^\| RT \|.*$", text, re.MULTILINE)
    assert row.startswith("| RT | 0.100 ± 0.000 | 0.052 ± 0.001 (-0.048 [-0.050, -0.046], p < 0.001) |")
    assert "| 0.220 ± 0.010 (+0.120 [+0.095, +0.145], p 0.002) |" in row


def test_departures_come_from_the_runs(rt, tmp_path):
    text = gather([rt], tmp_path)
    assert "- RT: 20 updates a run, 8,608 training examples; num_epochs 2 (5).\n" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"on_nonfinite": "skip"}, "on_nonfinite skip (stop)"),
        ({"train_file": ["/data/imdb.jsonl"]}, "from imdb.jsonl; 20 updates"),
        ({"launched": {"num_processes": 8}}, "processes x gradient_accumulation_steps 8 (1)"),
        ({"launched": {"mixed_precision": "bf16"}}, "mixed_precision bf16 (no)"),
        (  # the same batches in another way
            {"launched": {"num_processes": 1}, "gradient_accumulation_steps": 8, "title": "wmt14_en_de"},
            "mixed_precision no (bf16)",
        ),
        (
            {"title": "mine", "dataset_name": "me/rt"},
            "RT: the data of mine in place of the row's data; from me/rt; 20",
        ),
        ({"title": "mine"}, "RT: 20 updates"),
    ],
)
def test_departures_tell(changes, said, tmp_path):
    title, launched = changes.pop("title", "rt"), changes.pop("launched", None)
    runs = [finish(tmp_path, "layernorm", 1, num_correct=500, launched=launched, **changes)]
    column = "En-De" if title == "wmt14_en_de" else "RT"
    text = gather([compared(tmp_path, runs, title=title, column=column)], tmp_path)
    [line] = re.findall(rf"^- {column}: .*updates.*$", text, re.MULTILINE)
    assert said in line
    assert ("gradient_accumulation_steps" in line) == ("gradient_accumulation_steps" in said)
    assert ("no other departure" in line) == (said.endswith(("20", "updates")))


def test_what_a_grid_chose_is_a_departure_and_its_loss_gaps_are_not_compared(tmp_path):
    choices = {"layernorm": {"learning_rate": "0.1"}, "adanorm": {"learning_rate": "0.01"}}
    runs = [
        finish(tmp_path, norm, seed, num_correct=500 + seed, losses=(seed, 0), choice=choice)
        for norm, choice in choices.items()
        for seed in (1, 2)
    ]
    search = [Run(norm, 1, tmp_path, {**choice, "batch_size": "32"}) for norm, choice in choices.items()]
    compared(tmp_path, runs, search=search)
    text = gather([tmp_path], tmp_path)
    assert "learning_rate chosen on validation: LayerNorm 0.1, AdaNorm 0.01 (0.0005)." in text  # batch_size was not
    assert "| RT | 1.500 ± 0.707 | 1.500 ± 0.707 |" in text


def test_a_grid_of_one_point_is_an_option(tmp_path):
    runs = [finish(tmp_path, "layernorm", 1, num_correct=500, choice={"learning_rate": "1e-1"})]
    assert "; learning_rate 0.1 (0.0005).\n" in gather([compared(tmp_path, runs)], tmp_path)


def test_commands_name_no_folder_of_this_machine(rt, tmp_path):
    text = gather([rt], tmp_path)
    [command] = re.findall(
        r"python recipes/compare.py --config recipes/configs/rt.yaml (.*?--output_dir \S+)", text, re.S
    )
    assert command.replace("\\\n   ", "").split() == [
        *("--train_file", "train.jsonl", "--test_file=train.jsonl", "--output_dir", "outputs/rt"),
    ]
    assert "/data" not in text
    assert "--report_only" not in text
    command = "recipes/compare.py --config /home/me/recipes/configs/rt.yaml --output_dir=/tmp/x"
    command += " --launcher 'accelerate launch --config_file /home/me/mine.yaml'"
    assert shown_command({"title": "rt", "command": command}).replace("\\\n   ", "").split() == [
        *("python", "recipes/compare.py", "--config", "recipes/configs/rt.yaml", "--output_dir=outputs/rt"),
        *("--launcher", "'accelerate", "launch", "--config_file", "mine.yaml'"),
    ]
    long = {"title": "rt", "command": "recipes/compare.py " + " ".join(f"--option_{n} value" for n in range(9))}
    assert max(map(len, shown_command(long).splitlines())) <= 110


def test_a_substitute_is_named_and_the_row_itself_stays_to_be_run(rt, tmp_path):
    folder = tmp_path / "multi30k"
    runs = [finish(folder, "layernorm", 1, num_correct=500)]
    compared(folder, runs, title="ud_ewt", column="PTB")
    text = gather([rt, folder], tmp_path)
    assert "**PTB (UD English-EWT)**, " in text
    assert (
        "- PTB: UD English-EWT in place of the row's data; from cornell-movie-review-data/rotten_tomatoes; 20 updates"
        in text
    )
    assert "- PTB: the Penn Treebank" in text
    assert "- RT: RT, from the Hub" not in text
    assert "recipes/configs/ptb.yaml --train_file 02-21.conllx" in text


@pytest.mark.parametrize("change", ["missing", "broken", "old", "of no row", "unfinished", "twice"])
def test_what_cannot_be_gathered_is_refused_before_anything_is_written(change, rt, tmp_path):
    folder, said = tmp_path / "in", "there is no comparison.json"
    folder.mkdir()
    text = (rt / "comparison.json").read_text(encoding="utf-8")
    if change == "broken":
        text, said = text[:50], "cannot be read"
    elif change == "old":
        text, said = (
            text.replace('"grid": {},', ""),
            r"report again: python recipes/compare.py .*--report_only",
        )
    elif change == "of no row":
        text, said = text.replace('"column": "RT"', '"column": null'), r"report again with --paper En-De\|De-En"
    elif change == "unfinished":
        text, said = json.dumps({**json.loads(text), "options": None}), "no run of this comparison has finished"
    elif change == "twice":
        said = "another folder has the row RT"
    if change != "missing":
        (folder / "comparison.json").write_text(text, encoding="utf-8")
    with pytest.raises(OptionError, match=said):
        gather([rt, folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_gathers(rt, tmp_path, capsys):
    compare.main(["--gather", str(rt), "--output_dir", str(tmp_path)])
    assert "| **RT**, accuracy (%) |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        compare.main(["--gather", str(rt), "--learning_rate", "1"])
    assert ended.value.code == 2
    assert "--gather takes folders and --output_dir alone, got --learning_rate 1" in capsys.readouterr().err
