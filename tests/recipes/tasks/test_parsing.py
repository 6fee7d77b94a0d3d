"""From a treebank to transitions, a vocabulary and a model."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch

from common.options import OptionError
from tasks.arc_standard import ParserVocabulary, parse_sentences
from tasks.conllu import Sentence
from tasks.data import DataError
from tasks.options import ParsingOptions
from tasks.parsing import collate_transitions, prepare_parsing
from tests.recipes.tiny_configs import TINY_PARSER
from tests.recipes.treebanks import CROSSING, tree

PROJECTIVE = tree(("Dogs", "NN", 2, "nsubj"), ("bark", "VB", 0, "root"), (".", ".", 2, "punct"))
UNKNOWN = tree(("Dogs", "NN", 2, "iobj"), ("bark", "VB", 0, "root"))


@pytest.fixture
def prepare(tmp_path):
    def prepared(train, validation=PROJECTIVE, **changes):
        files = {}
        for split, text in {"train": train, "validation": validation}.items():
            (tmp_path / split).write_text(text, encoding="utf-8")
            files[f"{split}_file"] = str(tmp_path / split)
        options = ParsingOptions(**{"min_frequency": 1, "model_config": TINY_PARSER, **files, **changes})
        return prepare_parsing(SimpleNamespace(options=options, division={"seed": 1}))

    return prepared


def test_trees_that_no_transitions_build_are_left_out_of_training_and_counted(prepare):
    task = prepare(PROJECTIVE + CROSSING + PROJECTIVE, PROJECTIVE + UNKNOWN)
    assert task.left_out == {"train": 1, "validation": 1}
    assert {split: len(examples) for split, examples in task.examples.items()} == {"train": 12, "validation": 6}
    assert [len(sentence.words) for sentence in task.encoded["validation"]] == [3, 2]  # both are parsed and scored
    batch = collate_transitions(task.examples["train"].__getitems__([0, 5]))
    assert batch["input_ids"].shape == (2, 48)
    assert batch["labels"].tolist() == [0, int(task.examples["train"].transitions[5])]


def test_the_model_has_the_sizes_and_the_names_of_the_treebank(prepare):
    task = prepare(PROJECTIVE + CROSSING)
    assert task.vocabulary.relations == ["dep", "root", "nsubj", "punct"]
    config = task.build_model().config
    assert (config.vocab_size, config.num_tags, config.num_relations) == (3 + 7, 3 + 4, 1 + 4)
    assert [config.id2label[n] for n in (0, 1, 2, 8)] == ["SHIFT", "LEFT-dep", "RIGHT-dep", "RIGHT-punct"]
    assert config.single_root
    two_roots = PROJECTIVE.replace("\t2\tpunct", "\t0\tpunct")
    assert not prepare(two_roots).build_model().config.single_root


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"train": CROSSING}, DataError, "none of 1 trees is projective"),
        (
            {"train": PROJECTIVE, "validation_file": None},
            DataError,
            "--validation_file is missing: a treebank to valid",
        ),
        ({"train": PROJECTIVE, "train_file": None}, DataError, "--train_file is missing: a treebank to train on"),
        ({"train": PROJECTIVE, "model_config": {}}, OptionError, "give either --model_name_or_path or model_config"),
        ({"train": PROJECTIVE, "test_file": "none.conllu"}, DataError, "none.conllu: no such file"),
    ],
)
def test_what_would_stop_the_training_is_refused(changes, error, said, prepare):
    with pytest.raises(error) as raised:
        prepare(**changes)
    assert said in str(raised.value)


@pytest.fixture
def saved(prepare, tmp_path):
    """A parser in lower case, of universal tags."""
    task = prepare(PROJECTIVE, tag_column="upos", lowercase=True)
    for part in (task.build_model(), task.vocabulary):
        part.save_pretrained(tmp_path / "saved")
    return {"model_config": {}, "model_name_or_path": str(tmp_path / "saved")}


@pytest.mark.parametrize(("wrong", "right"), [({"tag_column": "xpos"}, "upos"), ({"lowercase": False}, "true")])
def test_a_saved_parser_goes_on_reading_as_it_was_trained_to(wrong, right, saved, prepare):
    [name] = wrong
    right_options = {"tag_column": "upos", "lowercase": True, **saved}
    with pytest.raises(OptionError, match=f"saved: trained with --{name} {right}: give it"):
        prepare(PROJECTIVE, **{**right_options, **wrong})
    two_roots = PROJECTIVE.replace("\t2\tpunct", "\t0\tpunct")  # it now builds trees like these
    assert prepare(two_roots, two_roots, **right_options).build_model().config.single_root is False


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_treebank_without_tags_is_refused(split, prepare):
    blank = PROJECTIVE.replace("\tNN\tNN", "\tNN\t_").replace("\tVB\tVB", "\tVB\t_").replace("\t.\t.\t", "\t.\t_\t")
    texts = {"train": PROJECTIVE, "validation": PROJECTIVE, split: blank}
    with pytest.raises(DataError, match=rf"{split}: no word has a tag in column 5 \(XPOS\): .* --tag_column upos"):
        prepare(**texts)
    assert prepare(**texts, tag_column="upos").vocabulary.tags == [".", "NN", "VB"]


def test_a_treebank_whose_words_were_removed_is_refused(prepare):
    blank = re.sub(r"^(\d+)\t\S+", r"\1\t_", PROJECTIVE, flags=re.MULTILINE)
    with pytest.raises(DataError, match=r"train: (\d+) of \1 words are '_': the text was removed from this treebank"):
        prepare(blank, PROJECTIVE)


def test_scores_that_know_no_punctuation_are_warned_of(prepare):
    german = PROJECTIVE.replace("\t.\t.\t", "\t$.\t$.\t")
    with pytest.warns(
        UserWarning, match=r"validation: column 4 holds none of --punctuation_tags .*; it holds \$\., NN, VB"
    ):
        prepare(german, german)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(german, german, punctuation_tags=["$."])


def test_another_model_is_refused(prepare):
    with pytest.raises(OptionError, match="a parser's model_type is transition_parser"):
        prepare(PROJECTIVE, model_config={"model_type": "bert"}).build_model()


def test_the_vocabulary_numbers_words_tags_and_relations_and_is_saved(tmp_path):
    sentence = Sentence(["b", "A", "b"], ["Y", "X", "X"], ["Y", "X", "X"], [0, 1, 1], ["root", "dep", "dep"])
    vocabulary = ParserVocabulary.of([sentence], min_frequency=2, lowercase=True)
    assert (vocabulary.words, vocabulary.tags, vocabulary.relations) == (["b"], ["X", "Y"], ["dep", "root"])
    vocabulary.save_pretrained(tmp_path)
    again = ParserVocabulary.from_pretrained(tmp_path)
    encoded = again.encode(Sentence(["B", "a"], ["X", "Z"], ["X", "Z"], [2, 0], ["nsubj", "root"]))
    assert encoded.words.tolist() == [3, 2]
    assert encoded.tags.tolist() == [3, 2]
    assert encoded.relations.tolist() == [0, 2]
    assert again.names([2, 1]) == ["root", "dep"]


def test_a_model_that_has_learned_its_sentences_parses_them(prepare):
    train = PROJECTIVE + CROSSING + tree(("Go", "VB", 0, "root"), ("!", ".", 1, "punct"))
    task = prepare(train, model_config={**TINY_PARSER, "hidden_size": 64, "dropout": 0.0})
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batch = collate_transitions(task.examples["train"].__getitems__(list(range(len(task.examples["train"])))))
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    learnable = [sentence for sentence in task.encoded["train"] if sentence.has_oracle]
    heads, relations = parse_sentences(model.eval(), learnable, single_root=True, batch_size=1)
    assert heads == [sentence.heads.tolist() for sentence in learnable]
    assert relations == [sentence.relations.tolist() for sentence in learnable]
