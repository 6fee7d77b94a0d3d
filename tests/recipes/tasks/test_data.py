import csv
import gzip
import io
import json
import os
from types import SimpleNamespace

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.data import DataError, DataOptions, check_text_column, data_content, load_file, load_splits, resolve_labels
from tasks.options import TextOptions

ROWS = [{"text": "a b", "label": 0}, {"text": "c", "label": 1}]


def write_rows(path, rows=ROWS):
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
        return str(path)
    buffer = io.StringIO(newline="")
    if kind in ("csv", "tsv"):
        writer = csv.DictWriter(buffer, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    else:
        buffer.write(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    raw = buffer.getvalue().encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r\n\x85\u2028\u2029"), min_size=1, max_size=30)
TEXTS |= st.sampled_from(["👩\u200d👩\u200d👧 ok", "مرحبا", "tab\tin", 'a "quoted" text', "a, b", "None", "1984"])


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet"])
@settings(max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, min_size=2, max_size=5), classes=st.sampled_from([[0, 1], ["bad", "good"]]))
def test_every_format_gives_the_same_rows(name, tmp_path, texts, classes):
    rows = [{"text": f"x{text}", "label": classes[number % 2]} for number, text in enumerate(texts)]
    loaded = load_file(write_rows(tmp_path / name, rows), text_columns=["text"])
    assert loaded.to_list() == rows
    check_text_column({"train": loaded}, "text", "text_column")


def test_cells_that_look_like_something_else_stay_text(tmp_path):
    texts = ["None", "NA", "null", "nan", "1984", "True", "2020-01-01", "a\u2028b", "c\xa0d"]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *(f"{text},{text}" for text in texts)]), encoding="utf-8")
    data = load_file(tmp_path / "a.csv", text_columns=["text", "absent"])
    assert data["text"][:] == data["label"][:] == texts
    (tmp_path / "b.csv").write_text("text,label\n007,3\n,4\n")
    assert load_file(tmp_path / "b.csv", text_columns=["text"]).to_list() == [
        {"text": "007", "label": 3},
        {"text": None, "label": 4},
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.json"])
def test_marks_and_line_ends_of_windows_are_no_part_of_the_rows(name, tmp_path):
    text = {"csv": "text,label\r\na b,0\r\nc,1", "json": json.dumps(ROWS)}.get(
        name.split(".")[1], "\r\n".join(map(json.dumps, ROWS))
    )
    if name == "a.json" and tuple(map(int, datasets.__version__.split(".")[:2])) < (5, 2):
        pytest.skip("datasets before 5.2 refuses the mark before a JSON array")
    raw = text.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert load_file(tmp_path / name).to_list() == ROWS


def test_a_quotation_mark_that_swallows_rows_of_a_tsv_is_named(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\nfine\t0\n"open\t1\nb\t0\nc "x"\t1\n')
    with pytest.raises(DataError, match=r"a.tsv, row 2, column 'text': the quotation mark before 'open"):
        load_file(tmp_path / "a.tsv")


@pytest.mark.parametrize("as_folder", [False, True])
def test_other_content_of_the_same_age_is_read_anew(as_folder, tmp_path):
    path = tmp_path / "data" / "train.csv"
    path.parent.mkdir()

    def text(word):
        path.write_text(f"text,label\n{word},0\n")
        os.utime(path, (10**9, 10**9))
        if not as_folder:
            return load_file(path)[0]["text"]
        folder = {"dataset_name": str(path.parent), "validation_split": "train", "test_split": None}
        return load_splits(DataOptions(**folder))["train"][0]["text"]

    assert [text("one"), text("two")] == ["one", "two"]


def test_the_content_of_local_data_is_known_by_option(tmp_path):
    for lang in ("de", "en"):
        (tmp_path / f"a.{lang}").write_text(lang)
    train, validation = write_rows(tmp_path / "t.jsonl"), write_rows(tmp_path / "v.jsonl")
    names = {"train_file": train, "validation_file": validation, "test_file": str(tmp_path / "absent.csv")}
    before = data_content(DataOptions(**names))
    assert before["train_file"] == before["validation_file"]  # the same rows
    assert before.keys() == {"train_file", "validation_file"}
    write_rows(tmp_path / "v.jsonl", ROWS[::-1])
    after = data_content(DataOptions(**names))
    assert [name for name in after if after[name] != before[name]] == ["validation_file"]
    pairs = SimpleNamespace(train_file=f"{tmp_path}/a.{{lang}}", source_lang="de", target_lang="en")
    before = data_content(pairs)
    (tmp_path / "a.en").write_text("EN")
    assert data_content(pairs) != before


@pytest.mark.parametrize(
    ("name", "table"), [("t.jsonl", '{"image": "a.png", "label": 0}\n'), ("t.csv", "image,label\na.png,0\n")]
)
def test_the_content_of_images_is_that_of_the_files_named(name, table, tmp_path):
    (tmp_path / name).write_text(table)
    options = SimpleNamespace(task="image", image_column="image", train_file=str(tmp_path / name))
    contents = []
    for pixels in (b"one", b"two"):
        (tmp_path / "a.png").write_bytes(pixels)
        contents.append(data_content(options)["train_file"])
    assert contents[0] != contents[1]


def test_missing_file_names_it_and_the_nearest(tmp_path):
    write_rows(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"--train_file .*trian.jsonl: no such file; did you mean train.jsonl\?"):
        load_file(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="a folder, not a file"):
        load_file(tmp_path)


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.xlsx", b"x", "a.xlsx: cannot tell its format from '.xlsx'; known are .json"),
        ("a.jsonl", b'{"text": "a"\n{{{\n', "a.jsonl: cannot be read as json: "),
        ("a.jsonl", b'{"text": "gr\xf6\xdfer"}\n', "a.jsonl: cannot be read as json: "),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read as json: "),
        ("a.parquet", bytes(100), "a.parquet: cannot be read as parquet: "),
        ("a.csv", b"", "the train split is empty ("),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(name, raw, said, tmp_path):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError) as raised:
        load_file(tmp_path / name)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_empty_split_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="validation split is empty"):
        load_splits(DataOptions(train_file=write_rows(tmp_path / "b.csv"), validation_file=str(tmp_path / "a.csv")))


def test_local_files_need_a_validation_file_and_win_over_the_hub(tmp_path):
    good = write_rows(tmp_path / "good.csv")
    with pytest.raises(DataError, match="--validation_file is missing"):
        load_splits(DataOptions(train_file=good))
    with pytest.raises(DataError, match="--train_file and --validation_file, or --dataset_name"):
        load_splits(DataOptions())
    splits = load_splits(DataOptions(dataset_name="no/such", train_file=good, validation_file=good))
    assert set(splits) == {"train", "validation"}


def test_sample_limits_cut_the_splits(tmp_path):
    good = write_rows(tmp_path / "good.csv")
    splits = load_splits(DataOptions(train_file=good, validation_file=good, max_train_samples=1))
    assert (len(splits["train"]), len(splits["validation"])) == (1, 2)


def split_by(sizes, tmp_path, **changes):
    files = {}
    for split, texts in {"train": "abcd", "validation": "ef", "test": "ghi"}.items():
        rows = [{"text": text, "label": 0} for text in texts]
        files[f"{split}_file"] = write_rows(tmp_path / f"{split}.jsonl", rows)
    splits = load_splits(TextOptions(**{**files, "split_sizes": sizes, **changes}))
    return {split: data["text"][:] for split, data in splits.items()}


def test_all_examples_are_divided_anew_at_random_and_always_alike(tmp_path):
    splits = split_by([2, 3, 4], tmp_path)
    assert {split: len(texts) for split, texts in splits.items()} == {"train": 2, "validation": 3, "test": 4}
    assert sorted(text for texts in splits.values() for text in texts) == list("abcdefghi")
    assert splits == split_by([2, 3, 4], tmp_path)
    assert split_by([2, 3, 4], tmp_path, score_test=False) == {s: splits[s] for s in ("train", "validation")}


def test_two_sizes_leave_the_test_split_as_it_is(tmp_path):
    splits = split_by([3, 1], tmp_path, validation_file=None)
    assert splits["test"] == list("ghi")
    assert sorted(splits["train"] + splits["validation"]) == list("abcd")


@pytest.mark.parametrize("sizes", [[10], [9, 1], [5, 5], [0, 2], [1, 1, 8]])
def test_sizes_that_the_data_cannot_fill_are_refused(sizes, tmp_path):
    with pytest.raises(DataError, match=r"--split_sizes \[.*\]: expected 2 or 3 positive sizes of [69] examples"):
        split_by(sizes, tmp_path)


def test_missing_column_names_the_nearest():
    splits = {"train": Dataset.from_list(ROWS)}
    with pytest.raises(DataError, match=r"--text_column 'txt': .* only 'text', 'label'; did you mean 'text'"):
        check_text_column(splits, "txt", "text_column")
    with pytest.raises(DataError, match=r"--label_column 'stars': .* only 'text', 'label'$"):
        resolve_labels(splits, "stars")


@pytest.mark.parametrize(("name", "sep"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_cells_beyond_the_header_are_refused_and_a_trailing_delimiter_shifts_nothing(name, sep, tmp_path):
    def write(*rows):
        text = "".join(sep.join(row) + "\n" for row in rows)
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        return load_file(tmp_path / name, text_columns=["text"])

    assert write(("text", "label"), ("a b", "0", ""), ("c", "1", "")).to_list() == ROWS
    with pytest.raises(DataError, match=r"row 2 \(line 3\): 3 cells, but the header has 2; put quotes"):
        write(("text", "label"), ("a", "0"), ("c", "d", "1"))
    with pytest.raises(DataError, match=r"row 1 \(line 2\): 3 cells"):
        write(("text", "label"), ("a", "0", "x"), ("c", "d", "1"))


@pytest.mark.parametrize("value", [None, 3])
def test_row_without_text_is_named(value):
    data = Dataset.from_dict({"text": [value, value] if value else ["a", None]})
    with pytest.raises(DataError, match=r"dev.csv, column 'text'(: no text in row 2|, row 1: expected text, got 3)"):
        check_text_column({"validation": data}, "text", "text_column", {"validation": "dev.csv"})


def test_texts_and_numbers_in_one_column_are_refused(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"column 'text'.*expected text|cannot be read as json"):
        check_text_column({"train": load_file(path)}, "text", "text_column")


def labels_of(train, validation, names=None):
    splits = {"train": Dataset.from_dict({"label": train}), "validation": Dataset.from_dict({"label": validation})}
    return resolve_labels(splits, "label", names)


def labels_in(tmp_path, suffix, train, validation, names=None):
    """Return the classes and the labels, by name, of two files that hold these labels."""
    files = {}
    for split, labels in (("train", train), ("validation", validation)):
        files[f"{split}_file"] = str(tmp_path / f"{split}{suffix}")
        write_rows(tmp_path / f"{split}{suffix}", [{"text": "a", "label": label} for label in labels])
    options = TextOptions(**files)
    names, labels = resolve_labels(load_splits(options), "label", names)
    return names, [[names[number] for number in labels[split]] for split in ("train", "validation")]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("train", "validation", "names", "classes"),
    [
        ([1, 0, 1], [0], None, ["0", "1"]),
        ([1, 5, 2, 10], [2], None, ["1", "2", "5", "10"]),  # none for the numbers in between
        ([-1, 1], [1], None, ["-1", "1"]),
        ([1, 0, 1], [0], ["1", "0"], ["1", "0"]),  # the names are the labels
        (["01", "02", "1"], ["02"], None, ["01", "02", "1"]),
        (["1", "2", "unknown"], ["1", "2"], None, ["1", "2", "unknown"]),
        (["True", "False"], ["True"], None, ["False", "True"]),
        (["b", "a"], ["b"], ["b", "a"], ["b", "a"]),
    ],
)
def test_the_rule_for_labels_is_the_same_in_every_format(suffix, train, validation, names, classes, tmp_path):
    found = labels_in(tmp_path, suffix, train, validation, names)
    assert found == (classes, [list(map(str, train)), list(map(str, validation))])


def test_numbers_are_places_among_names_that_none_of_them_is_and_booleans_json():
    assert labels_of([1, 0], [1], ["bad", "good"])[1] == {"train": [1, 0], "validation": [1]}
    assert labels_of([True, False], [True]) == (["false", "true"], {"train": [1, 0], "validation": [1]})


@pytest.mark.parametrize(
    ("train", "validation", "names", "said"),
    [
        ([0, 1], [0, 2], None, "dev.csv, column 'label', row 2: the label '2' is not one of the 2 classes ['0', '1']"),
        ([0, 5], [0], ["no", "yes"], "the label '5' is not a number from 0 to 1"),
        (["a", "b"], ["c", "a", "c"], None, "dev.csv, column 'label', rows 1, 3: the label 'c' is not one of the 2"),
        ([0.5, 1.0], [0.5], None, "train split, column 'label', row 1: expected a label as text or a whole number"),
        (["a", None, "b", None], ["a"], None, "train split, column 'label': no label in rows 2, 4"),
        (["a", *[None] * 12], ["a"], None, "rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more"),
        (list(range(1001)), [0], None, "--label_column label: 1,001 different labels in 1,001 training examples"),
        ([0, 0], [0], None, "single class"),
        (["a", "b"], ["a"], ["a", "a"], "a name twice"),
        (["a", "b", "a "], ["a"], None, "the labels 'a' and 'a ' differ in spaces only"),
        (["a", "b"], [" b"], None, "' b' is not one of the 2 classes ['a', 'b']; it differs from 'b' in spaces only"),
    ],
)
def test_bad_labels_are_named_with_their_place(train, validation, names, said):
    splits = {"train": Dataset.from_dict({"label": train}), "validation": Dataset.from_dict({"label": validation})}
    with pytest.raises(DataError) as raised:
        resolve_labels(splits, "label", names, {"validation": "dev.csv"})
    assert said in str(raised.value)


def test_spaces_around_a_label_are_pointed_out_and_may_be_meant():
    with pytest.warns(UserWarning, match="the label ' b' has spaces around it"):
        assert labels_of(["a", " b"], ["a"])[0] == [" b", "a"]
    assert labels_of(["a", "a "], ["a"], ["a", "a "])[1]["train"] == [0, 1]


def test_class_names_of_the_data_set_are_used():
    features = Features({"label": ClassLabel(names=["neg", "pos"]), "text": Value("string")})
    data = Dataset.from_dict({"label": [1, 0], "text": ["a", "b"]}, features=features)
    assert resolve_labels({"train": data}, "label") == (["neg", "pos"], {"train": [1, 0]})
    assert resolve_labels({"train": data}, "label", ["bad", "good"]) == (["bad", "good"], {"train": [1, 0]})
    assert resolve_labels({"train": data}, "label", ["pos", "neg"]) == (["pos", "neg"], {"train": [0, 1]})


def test_part_of_a_split_is_a_split_of_a_data_set(tmp_path):
    Dataset.from_dict({"text": list("abcdefgh"), "label": [0, 1] * 4}).to_parquet(tmp_path / "train.parquet")
    assert len(load_dataset(str(tmp_path))["train"]) == 8
    options = DataOptions(
        dataset_name=str(tmp_path), train_split="train[:-3]", validation_split="train[-3:]", test_split=None
    )
    splits = load_splits(options)
    assert splits["train"]["text"][:] == list("abcde")
    assert splits["validation"]["text"][:] == list("fgh")
    with pytest.raises(DataError, match="--validation_split is missing"):
        load_splits(DataOptions(dataset_name=str(tmp_path), validation_split=None, test_split=None))
