"""The paper's rows from run records."""

import re

import pytest

import compare
from common.options import OptionError
from comparison.gather import Row, fill, gather
from tests.recipes.comparison.comparison_runs import RECIPES, diverge, finish, write

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
        "5 diverged ▼",
        "59.30 ± 0.23 (n=5) ▲",
    ]
    assert "| *paper's RT, accuracy* | *76.85* | *77.21* | *76.66* | *76.40* | *77.50* |" in text
    assert "| *SST5, accuracy* | *38.55* |" in text
    assert (tmp_path / "rows.md").read_text(encoding="utf-8") == text
    assert (tmp_path / "forest.png").stat().st_size > 5000


def test_a_row_is_judged_by_the_seeds_of_the_latest_planned_look(rt, tmp_path):
    assert Row(rt).waiting == 8
    assert "| RT | 20 | 1 2 3 4 5 | 8 | 0.1 | a test |" in gather([rt], tmp_path)


def test_a_record_that_is_added_later_does_not_change_a_look(rt):
    before = Row(rt).seeds
    lines = rt.read_text(encoding="utf-8").splitlines(keepends=True)
    added = [line.replace('"seed": 5,', '"seed": 0,') for line in lines if '"seed": 5,' in line]
    assert added
    rt.write_text("".join([*lines, *added]), encoding="utf-8")
    assert Row(rt).seeds == before


def test_every_claim_has_a_table_with_the_relation_of_each_row(rt, tmp_path):
    text = gather([rt], tmp_path)
    assert re.search(r"AdaNorm less LayerNorm \|.*\| \*\*1 better, 0 level, 0 worse, 0 open\*\* \|", text)
    assert re.search(r"\| RT \| \+4\.30 \| \[\+\d\.\d\d, \+\d\.\d\d\] \| (0\.\d{3}|< 0\.001) \| better \|", text)
    assert re.search(r"DetachNorm less w/o Norm \|.*\| \*\*0 better, 0 level, 0 worse, 0 open\*\* \|", text)
    assert re.search(r"loss gap \(nats\) \|.*\| \*\*1 better, 0 level, 0 worse, 0 open\*\* \|", text)
    assert re.search(r"\| RT \| -0\.0\d\d \| \[-0\.0\d\d, -0\.0\d\d\] \| .* \| better \|", text)


def test_p_values_are_corrected_over_the_rows_of_a_norm(tmp_path):
    paths = []
    for title, step in {"rt": 3, "sst5": 4}.items():
        runs = [finish(tmp_path, "layernorm", seed, num_correct=500) for seed in range(1, 6)]
        runs += [finish(tmp_path, "adanorm", seed, num_correct=500 + 10 * (seed - step)) for seed in range(1, 6)]
        paths.append(write(tmp_path / f"{title}.jsonl", runs, title=title))
    lines = [line for line in gather(paths, tmp_path).splitlines() if "(n=5) | AdaNorm |" in line]
    p_values = [tuple(map(float, line.split("|")[6:8])) for line in lines]
    assert p_values[0][0] == p_values[0][1] == 1.0  # the larger of two is not raised
    assert p_values[1][1] == pytest.approx(2 * p_values[1][0], abs=0.002)


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
        ("norm", "x.py:Own, seed 2 has another content than x.py:Own, seed 1"),
    ],
)
def test_what_cannot_be_gathered_is_refused_before_anything_is_written(change, said, rt, tmp_path):
    path = tmp_path / "in.jsonl"
    changes = {"options": {"weight_decay": 0.5}, "data": {"record": {"content": {"train_file": "xyz"}}}}
    if change in ("options", "data", "title"):
        runs = [finish(tmp_path, "layernorm", 1, num_correct=5), finish(tmp_path, "none", 1, num_correct=5)]
        runs[1] = finish(tmp_path, "none", 1, num_correct=5, **changes.get(change, {}))
        write(path, runs, title="mine" if change == "title" else "rt")
    elif change == "norm":
        runs = [finish(tmp_path, "layernorm", 1, num_correct=5)]
        for seed in (1, 2):
            content = {"content": {"train_file": "abc", "norm": f"hash {seed}"}}
            runs += [finish(tmp_path, "x.py:Own", seed, num_correct=5, record=content)]
        write(path, runs)
    elif change == "empty":
        path.write_text("")
    with pytest.raises(OptionError, match=said):
        gather([rt, path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_comparison_is_gathered_by_its_records(tmp_path):
    folder = tmp_path / "outputs" / "my_rt"
    folder.mkdir(parents=True)
    run = finish(tmp_path, "layernorm", 1, num_correct=500)
    write(folder / "records.jsonl", [run])
    assert "| **RT**, accuracy (%) |" in gather([folder], tmp_path)
    assert (Row(folder).stem, Row(write(tmp_path / "rt_short.jsonl", [run])).name) == ("my_rt", "RT, short")


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


def test_the_command_line_gathers(rt, tmp_path, capsys):
    compare.main(["--gather", str(rt), "--output_dir", str(tmp_path)])
    assert "| **RT**, accuracy (%) |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        compare.main(["--gather", str(rt), "--learning_rate", "1"])
    assert ended.value.code == 2
    assert "--gather takes files, --output_dir and --pages alone, got --learning_rate 1" in capsys.readouterr().err
