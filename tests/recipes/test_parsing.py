"""The parsing recipe as users run it: a tiny treebank, real runs, a model that parses raw files."""

import json
import random

import pytest
from transformers import AutoModelForSequenceClassification

import parsing
import predict
from tasks.conllu import attachment_scores, attachments, read_conllu, write_conllu
from tasks.data import DataError
from tasks.options import PUNCTUATION_TAGS
from tests.recipes.fault_runs import assert_refused, flags, norms_of
from tests.recipes.recipe_process import read_results
from tests.recipes.tiny_configs import TINY_PARSER
from tests.recipes.treebanks import CROSSING, tree

SCORES = [f"{kind}_{which}_punctuation" for which in ("with", "without") for kind in ("uas", "las")]


def noun_phrase(draw, head, first):
    """Words of a noun phrase that begins at place `first`; its noun depends on `head`."""
    adjectives = draw.randrange(3)
    noun = first + 1 + adjectives
    words = [("the", "DT", noun, "det")]
    words += [(draw.choice(["old", "red", "big"]), "JJ", noun, "amod") for _ in range(adjectives)]
    return [*words, (draw.choice(["dog", "cat", "man", "house"]), "NN", head, "nsubj" if first == 1 else "obj")]


def some_sentence(draw):
    subject = noun_phrase(draw, 0, 1)
    verb = len(subject) + 1
    subject[-1] = (*subject[-1][:2], verb, "nsubj")
    words = [*subject, (draw.choice(["sees", "likes"]), "VBZ", 0, "root")]
    words += noun_phrase(draw, verb, verb + 1) if draw.random() < 0.7 else []
    return tree(*words, (".", ".", verb, "punct"))


@pytest.fixture(scope="module")
def treebank(tmp_path_factory):
    """Sentences of a small grammar; one tree in the training file is not projective."""
    folder, draw, files = tmp_path_factory.mktemp("treebank"), random.Random(0), {}
    for split, size in {"train": 60, "validation": 21}.items():
        files[split] = folder / f"{split}.conllu"
        files[split].write_text("".join(some_sentence(draw) for _ in range(size)), encoding="utf-8")
    with open(files["train"], "a", encoding="utf-8") as file:
        file.write(CROSSING)
    return files


def arguments_for(treebank, folder, **changes):
    options = {
        "train_file": treebank["train"],
        "validation_file": treebank["validation"],
        "model_config": json.dumps({**TINY_PARSER, "hidden_size": 32, "dropout": 0.1}),
        "batch_size": 32,
        "eval_batch_size": 8,
        "max_steps": 60,
        "eval_steps": 30,
        "learning_rate": 0.01,
        "output_dir": folder,
        **changes,
    }
    return flags(options)


def run(treebank, folder, **changes):
    parsing.main(arguments_for(treebank, folder, **changes))
    return read_results(folder)


@pytest.fixture(scope="module")
def trained(treebank, tmp_path_factory):
    """A run that is tested on its own validation file: both scores must agree."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(treebank, folder, k=0.07, test_file=treebank["validation"])


def test_it_learns_and_scores_the_same_in_a_fresh_process(trained):
    _, results = trained
    assert results["norm_modules"] == 2
    assert results["left_out"] == {"train": 1, "validation": 0}
    assert results["validation"]["las_with_punctuation"] > 90
    assert results["test"] == {name: results["validation"][name] for name in SCORES}
    assert results["sentences_per_second"] > 0


def test_what_a_score_is_made_of_adds_up_to_it(trained):
    folder, results = trained
    statistics, score = parsing.ParsingTask.outcomes(folder, results), parsing.ParsingTask.score_of
    assert statistics.shape == (21, 2)
    assert score(statistics.sum(0, keepdims=True)).tolist() == [results["test"]["uas_without_punctuation"]]


def test_the_saved_model_parses_a_raw_file(trained, treebank, tmp_path):
    folder, results = trained
    gold = read_conllu(treebank["validation"])
    blank = [["_"] * len(sentence.forms) for sentence in gold]
    raw, parsed = tmp_path / "raw.conllu", tmp_path / "parsed.conllu"
    raw.write_text(write_conllu(gold, blank, blank), encoding="utf-8")
    parsed.write_text(predict.parse_file(str(folder / "best"), str(raw), 8, "no"), encoding="utf-8")
    trees = read_conllu(parsed)
    counts = attachments(gold, [t.heads for t in trees], [t.relations for t in trees], PUNCTUATION_TAGS)
    assert attachment_scores(counts.sum(0)) == results["test"]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "best")
    assert norms_of(model) == [("adanorm", {"C": 1.0, "k": 0.07})] * 2
    assert model.config.single_root


def test_a_raw_file_without_the_tags_that_the_model_reads_is_refused(trained, tmp_path):
    raw = tmp_path / "raw.conllu"
    raw.write_text("1\tdogs\t_\tNOUN\t_\t_\t_\t_\t_\t_\n")
    with pytest.raises(DataError, match=r"raw\.conllu: no word has a tag in column 5 \(XPOS\)"):
        predict.parse_file(str(trained[0] / "best"), str(raw), 8, "no")


def test_a_trained_parser_is_trained_further(trained, treebank, tmp_path):
    folder, before = trained
    changes = {"model_config": "{}", "model_name_or_path": folder / "best", "learning_rate": 1e-9, "max_steps": 1}
    after = run(treebank, tmp_path, k=0.07, **changes)
    assert {name: after["validation"][name] for name in SCORES} == before["test"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_file": "absent.conllu"}, "absent.conllu: no such file"),
        ({"model_config": json.dumps({**TINY_PARSER, "hidden_size": 0})}, "hidden_size must be positive, got 0"),
    ],
)
def test_bad_input_ends_in_one_line(changes, said, treebank, tmp_path, capsys):
    assert_refused(parsing.main, arguments_for(treebank, tmp_path, **changes), said, capsys)
