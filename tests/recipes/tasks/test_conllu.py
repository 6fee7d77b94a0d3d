"""Reading, checking, writing and scoring of dependency trees."""

import gzip
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.conllu import attachment_scores, attachments, read_conllu, write_conllu
from tasks.data import DataError
from tasks.options import PUNCTUATION_TAGS

CONLLU = """# sent_id = 1
# text = I can't go.
1\tI\tI\tPRON\tPRP\t_\t4\tnsubj\t4:nsubj\t_
2-3\tcan't\t_\t_\t_\t_\t_\t_\t_\t_
2\tca\tcan\tAUX\tMD\t_\t4\taux\t4:aux\t_
3\tn't\tnot\tPART\tRB\t_\t4\tadvmod\t4:advmod\t_
4\tgo\tgo\tVERB\tVB\t_\t0\troot\t0:root\tSpaceAfter=No
4.1\thome\thome\tNOUN\tNN\t_\t_\t_\t4:obl\t_
5\t.\t.\tPUNCT\t.\t_\t4\tpunct\t4:punct\t_
"""
CONLLX = "1\tGo\t_\tVB\tVB\t_\t0\tROOT\t_\t_\n2\t#\t_\t#\t#\t_\t1\tdobj\t_\t_\n"
CIRCLE = CONLLX + "3\tb\t_\tX\tX\t_\t4\tx\t_\t_\n4\tc\t_\tX\tX\t_\t3\tx\t_\t_\n"


def read(tmp_path, text, **options):
    path = tmp_path / "trees.conllu"
    path.write_text(text, encoding="utf-8")
    return read_conllu(path, **options)


def test_multi_word_tokens_empty_nodes_and_comments_are_no_words(tmp_path):
    (sentence,) = read(tmp_path, CONLLU)
    assert sentence.forms == ["I", "ca", "n't", "go", "."]
    assert sentence.tags == ["PRP", "MD", "RB", "VB", "."]
    assert sentence.coarse_tags == ["PRON", "AUX", "PART", "VERB", "PUNCT"]
    assert sentence.heads == [4, 4, 4, 0, 4]
    assert sentence.relations == ["nsubj", "aux", "advmod", "root", "punct"]
    assert read(tmp_path, CONLLU, tag_column="upos")[0].tags == sentence.coarse_tags


def test_conll_x_several_sentences_and_a_file_without_a_last_empty_line(tmp_path):
    first, second = read(tmp_path, f"\n{CONLLX}\r\n\n{CONLLX.rstrip()}")
    assert first.forms == second.forms == ["Go", "#"]
    assert second.heads == [0, 1]


def test_a_gzipped_file_reads_like_a_plain_one(tmp_path):
    (tmp_path / "trees.conllu.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + CONLLU.encode()))
    assert read_conllu(tmp_path / "trees.conllu.gz") == read(tmp_path, CONLLU)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (CONLLU, CIRCLE, "line 3: the heads from word 3 on go round in a circle"),
        ("1\tI\tI\tPRON\tPRP\t_\t4", "1\tI\tI\tPRON\tPRP\t_\tfour", "line 3: the head must be a number, got 'four'"),
        ("\t4:nsubj\t_", "\t4:nsubj\t_\textra", "line 3: expected 8 to 10 columns divided by tabs, got 11"),
        ("1\tI\tI\tPRON", "1 I I PRON", "line 3: expected 8 to 10 columns divided by tabs, got 7"),
        ("3\tn't", "4\tn't", "line 6: expected the word 3, got '4'"),
        ("2-3\t", "3-4\t", "line 4: the multi-word token '3-4' should begin at 2"),
        ("2-3\t", "2-2\t", "line 4: the multi-word token '2-2' should begin at 2 and end after it"),
        ("4.1\t", "3.1\t", "line 8: the empty node '3.1' should be of word 4"),
        ("\t_\t4\taux", "\t_\t9\taux", "line 5: the head of word 2 of 5 is 9"),
        ("\t_\t4\taux", "\t_\t2\taux", "line 5: the head of word 2 of 5 is 2"),
        ("\t_\t0\troot", "\t_\t3\troot", "line 3: no word of the sentence has the head 0"),
        ("1\tI\t", "1\t\t", "line 3: a word without a form"),
        ("\tnsubj\t", "\t_\t", "line 3: a word without a relation"),
        ("4.1\t", "# late\n4.1\t", "line 8: a comment within a sentence"),
        (CONLLU, "# nothing\n\n", "there is no sentence in it"),
        (CONLLU, "1-2\tcan't\t_\t_\t_\t_\t_\t_\t_\t_\n", "line 1: a sentence without words"),
    ],
)
def test_broken_files_are_refused_with_the_line(old, new, said, tmp_path):
    assert old in CONLLU
    with pytest.raises(DataError, match=r"trees\.conllu") as raised:
        read(tmp_path, CONLLU.replace(old, new, 1))
    assert said in str(raised.value)


def test_a_comment_may_hold_tabs_and_stand_apart(tmp_path):
    text = f"# a\tb\n\n# c\n{CONLLX}"
    (sentence,) = read(tmp_path, text)
    assert write_conllu([sentence], [sentence.heads], [sentence.relations]) == f"# a\tb\n# c\n{CONLLX}\n"
    with pytest.raises(DataError, match="line 5: the head of word 2 of 2 is 3"):
        read(tmp_path, text.replace("\t1\tdobj", "\t3\tdobj"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(CONLLU)), st.integers(0, 9), st.binary(max_size=6) | st.sampled_from([b"\t", b"\n", b"0"]))
def test_a_spoilt_file_is_read_or_refused_with_its_line(tmp_path, at, cut, inserted):
    data = CONLLU.encode()
    path = tmp_path / "spoilt.conllu"
    path.write_bytes(data[:at] + inserted + data[at + cut :])
    sentences, said = [], ""
    try:
        sentences = read_conllu(path)
    except DataError as error:
        said = str(error)
    assert bool(sentences) != bool(re.search(r"spoilt\.conllu(, line \d+)?: ", said))
    assert all(len(sentence.heads) == len(sentence.forms) > 0 for sentence in sentences)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.conllu: no such file"):
        read_conllu(tmp_path / "none.conllu")
    (tmp_path / "latin.conllu").write_bytes(CONLLX.replace("Go", "\xe9").encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.conllu, line 1: not UTF-8"):
        read_conllu(tmp_path / "latin.conllu")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(CONLLU.encode())[:-12])
    with pytest.raises(DataError, match=r"cut\.gz: cannot be read"):
        read_conllu(tmp_path / "cut.gz")


def test_what_is_written_differs_in_heads_relations_and_graphs_alone(tmp_path):
    blind = CONLLU.replace("\t4\tnsubj\t", "\t_\t_\t")
    (sentence,) = read(tmp_path, blind, trees=False)
    text = write_conllu([sentence], [[4, 4, 4, 0, 4]], [["nsubj", "aux", "advmod", "root", "punct"]])
    graphs = ["4:nsubj", "4:aux", "4:advmod", "0:root", "4:punct"]
    expected = CONLLU
    for graph in graphs:
        expected = expected.replace(f"\t{graph}\t", "\t_\t")
    assert text == expected + "\n"


def test_attachment_scores_with_and_without_punctuation(tmp_path):
    gold = read(tmp_path, f"{CONLLU}\n{CONLLX}")
    heads = [[4, 4, 2, 0, 2], [0, 1]]
    relations = [["nsubj", "x", "advmod", "root", "punct"], ["ROOT", "dobj"]]
    counts = attachments(gold, heads, relations, PUNCTUATION_TAGS)
    assert counts.tolist() == [[[5, 3, 2], [4, 3, 2]], [[2, 2, 2], [2, 2, 2]]]
    assert attachment_scores(counts.sum(0)) == {
        "uas_with_punctuation": 500 / 7,
        "las_with_punctuation": 400 / 7,
        "uas_without_punctuation": 500 / 6,
        "las_without_punctuation": 400 / 6,
    }
