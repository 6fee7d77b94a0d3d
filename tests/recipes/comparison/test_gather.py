"""The paper's rows from run records."""

import re

import pytest

import compare
from common.options import OptionError
from comparison.gather import CLAIMS, Row, fill, gather, ranges
from tests.recipes.comparison.comparison_runs import RECIPES, diverge, finish, write

SIMPLE, DETACH, ADANORM, OVER_FIT = CLAIMS
WOBBLE = {1: 0, 2: 3, 3: -3, 4: 1, 5: -1, 6: 400, 7: 400}


@pytest.fixture(scope="module")
def rt(tmp_path_factory):
    """AdaNorm is better with every seed, LayerNorm-simple is level, DetachNorm diverges; the last seeds wait."""
    folder = tmp_path_factory.mktemp("rt")
    runs = []
    for seed, wobble in WOBBLE.items():
        losses = (0.45, 0.4 - seed / 1000)
        runs += [
            finish(folder, "layernorm", seed, num_correct=550 + wobble, num_epochs=2),
            finish(folder, "adanorm", seed, num_correct=590 + wobble + seed, num_epochs=2),
            finish(folder, "layernorm-simple", seed, num_correct=550 + wobble, num_epochs=2, losses=losses),
            diverge(folder, "detachnorm", seed),
        ]
    for run in runs[3::4]:  # the options of the others
        text = (run.folder / "diverged.json").read_text(encoding="utf-8")
        (run.folder / "diverged.json").write_text(text.replace('"num_epochs": 5', '"num_epochs": 2'))
    return write(folder / "rt.jsonl", runs)


def test_scores_are_marked_next_to_the_papers(rt, tmp_path):
    text = gather([rt], tmp_path)
    ours = next(line for line in text.splitlines() if line.startswith("| **RT**"))
    assert [cell.strip() for cell in ours.split("|")[1:-1]] == [
        "**RT**, accuracy (%)",
        "-",
        "55.00 ± 0.22 (n=5)",
        "55.00 ± 0.22 (n=5)",
        "5 diverged",
        "59.30 ± 0.23 (n=5) ▲",
    ]
    assert "| *paper's RT, accuracy* | *76.85* | *77.21* | *76.66* | *76.40* | *77.50* |" in text
    assert "| *SST5, accuracy* | *38.55* |" in text
    assert (tmp_path / "rows.md").read_text(encoding="utf-8") == text
    assert (tmp_path / "forest.png").stat().st_size > 5000


def test_a_row_is_judged_by_the_seeds_of_the_latest_planned_look(rt, tmp_path):
    row = Row(rt)
    assert (row.seeds, row.waiting) == ([1, 2, 3, 4, 5], 8)
    assert "| RT | 20 | 1-5 | 8 | 0.1 | a test |" in gather([rt], tmp_path)


def test_every_claim_has_a_table_with_the_relation_of_each_row(rt, tmp_path):
    text = gather([rt], tmp_path)
    assert "AdaNorm less LayerNorm: 1 better, 0 level, 0 worse, 0 open, of 1 rows." in text
    assert re.search(r"\| RT \| \+4\.30 \| \[\+\d\.\d\d, \+\d\.\d\d\] \| (0\.\d{3}|< 0\.001) \| better \|", text)
    assert "DetachNorm less w/o Norm: 0 better, 0 level, 0 worse, 0 open, of 0 rows." in text
    assert "loss gap (nats): 1 better, 0 level" in text


def test_a_norm_that_diverged_is_worse_than_one_that_finished(tmp_path):
    runs = [finish(tmp_path, "none", seed, num_correct=500 + seed) for seed in range(1, 6)]
    runs += [diverge(tmp_path, "detachnorm", seed) for seed in range(1, 6)]
    assert Row(write(tmp_path / "rt.jsonl", runs)).relation(DETACH) == "worse"
    few = [run for run in runs if run.seed < 3]
    assert Row(write(tmp_path / "few.jsonl", few)).relation(DETACH) == "open"


def test_a_norm_is_not_judged_by_the_runs_that_it_survived(tmp_path):
    runs = [finish(tmp_path, "layernorm", seed, num_correct=500 + seed % 2) for seed in range(1, 11)]
    ours = [finish(tmp_path, "adanorm", seed, num_correct=650 + seed % 3) for seed in range(1, 10)]
    theirs = [finish(tmp_path, "layernorm-simple", seed, num_correct=350 + seed % 3) for seed in range(1, 10)]
    lost = [diverge(tmp_path, norm, 10) for norm in ("adanorm", "layernorm-simple")]
    row = Row(write(tmp_path / "rt.jsonl", [*runs, *ours, *theirs, *lost]))
    assert (row.relation(ADANORM), row.relation(SIMPLE)) == ("open", "worse")


def test_the_command_repeats_the_runs_and_names_no_folder(tmp_path):
    changes = {"num_epochs": 2, "train_file": "/data/rt/train.jsonl", "include": ["a.*"]}
    runs = [finish(tmp_path, norm, seed, num_correct=5, **changes) for norm in ("none", "adanorm") for seed in (2, 4)]
    text = gather([write(tmp_path / "rt_short.jsonl", runs)], tmp_path)
    [command] = re.findall(
        r"python recipes/compare.py --config recipes/configs/rt.yaml --norms.*?(?=\n```)", text, re.S
    )
    assert command.replace("\\\n   ", "").split()[2:] == [
        *("--config", "recipes/configs/rt.yaml", "--norms", "none", "adanorm", "--seeds", "2", "4"),
        *("--output_dir", "outputs/rt_short", "--include", "'[\"a.*\"]'", "--num_epochs", "2"),
        *("--train_file", "train.jsonl"),
    ]
    assert "**RT, short**" in text
    assert "/data" not in text


def test_data_that_stands_in_for_the_papers_is_named(rt, tmp_path):
    runs = [finish(tmp_path, "layernorm", 1, num_correct=500)]
    text = gather([rt, write(tmp_path / "ud_ewt.jsonl", runs, title="ud_ewt")], tmp_path)
    assert "| **PTB (UD English-EWT)**, accuracy (%) |" in text
    assert "| *paper's PTB, UAS* | *88.31* |" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "no such file"),
        ("empty", "no run has ended"),
        ("title", "config 'mine' matches no row of the paper"),
        ("options", "none, seed 1 has another weight_decay than layernorm, seed 1"),
        ("data", "none, seed 1 has another content than layernorm, seed 1"),
    ],
)
def test_what_cannot_be_gathered_is_refused_before_anything_is_written(change, said, rt, tmp_path):
    path = tmp_path / "in.jsonl"
    changes = {"options": {"weight_decay": 0.5}, "data": {"record": {"content": {"train_file": "xyz"}}}}
    if change in ("options", "data", "title"):
        runs = [finish(tmp_path, "layernorm", 1, num_correct=5), finish(tmp_path, "none", 1, num_correct=5)]
        runs[1] = finish(tmp_path, "none", 1, num_correct=5, **changes.get(change, {}))
        write(path, runs, title="mine" if change == "title" else "rt")
    elif change == "empty":
        path.write_text("")
    with pytest.raises(OptionError, match=said):
        gather([rt, path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_comparison_is_gathered_by_its_records(tmp_path):
    folder = tmp_path / "outputs" / "my_rt"
    folder.mkdir(parents=True)
    write(folder / "records.jsonl", [finish(tmp_path, "layernorm", 1, num_correct=500)])
    text = gather([folder], tmp_path)
    assert "| **RT**, accuracy (%) |" in text
    assert "--output_dir outputs/my_rt" in text


def test_sections_are_filled_into_pages_and_the_rest_stays(rt, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- gathered: scores -->\nold\n<!-- end -->\n\nafter\n", encoding="utf-8")
    gather([rt], tmp_path, [page])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n\n<!-- gathered: scores -->\n\n|  | w/o Norm |")
    assert text.endswith("|\n\n<!-- end -->\n\nafter\n")
    assert "old" not in text
    gather([rt], tmp_path, [page])
    assert page.read_text(encoding="utf-8") == text
    page.write_text("<!-- gathered: score -->\n<!-- end -->\n", encoding="utf-8")
    with pytest.raises(OptionError, match="no section 'score' is gathered; expected scores, differences"):
        fill(page, {"scores": "", "differences": ""})


def test_the_pages_hold_what_the_committed_records_say(tmp_path):
    docs = RECIPES.parent / "docs"
    pages = [docs / "reproduction.md", docs / "results.md"]
    before = [page.read_text(encoding="utf-8") for page in pages]
    copies = [tmp_path / page.name for page in pages]
    for copy, text in zip(copies, before, strict=True):
        copy.write_text(text, encoding="utf-8")
    gather([docs / "measured" / "runs"], tmp_path, copies)
    assert [copy.read_text(encoding="utf-8") for copy in copies] == before
    assert (tmp_path / "rows.md").read_bytes() == (docs / "measured" / "rows.md").read_bytes()


def test_seeds_are_told_as_ranges():
    assert ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"
    assert ranges([]) == ""


def test_the_command_line_gathers(rt, tmp_path, capsys):
    compare.main(["--gather", str(rt), "--output_dir", str(tmp_path)])
    assert "| **RT**, accuracy (%) |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        compare.main(["--gather", str(rt), "--learning_rate", "1"])
    assert ended.value.code == 2
    assert "--gather takes files, --output_dir and --pages alone, got --learning_rate 1" in capsys.readouterr().err
