"""Arc-standard transitions: the oracle, features, what is possible, parsing in batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.arc_standard import NULL, ROOT, Encoded, States, is_projective, oracle, parse, training_examples

SHIFT = 0


def encoded(heads, relations=None):
    words = np.arange(10, 10 + len(heads))
    relations = np.asarray(relations if relations is not None else [1 + n % 3 for n in range(len(heads))])
    return Encoded(words, words + 100, np.asarray(heads), relations)


@st.composite
def projective_heads(draw, max_words=12):
    """Heads of a random projective tree, with one root or several: by merging neighboring parts at random."""
    length = draw(st.integers(1, max_words))
    heads = [0] * length
    parts = list(range(1, length + 1))  # heads of parts, left to right
    for _ in range(draw(st.integers(0, length - 1))):
        left = draw(st.integers(0, len(parts) - 2))
        keeps_left = draw(st.booleans())
        dependent = parts.pop(left + keeps_left)
        heads[dependent - 1] = parts[left]
    return heads


def any_heads(draw, length):
    """Heads of a random tree, mostly not projective."""
    order = draw.permutation(np.arange(1, length + 1))
    heads = [0] * length
    for position, word in enumerate(order):
        heads[word - 1] = int(draw.choice([0, *order[:position]]))
    return heads


@given(st.lists(projective_heads(), min_size=1, max_size=6))
def test_the_oracle_rebuilds_every_projective_tree(trees):
    trees = sorted(trees, key=len, reverse=True)
    sentences = [encoded(heads) for heads in trees]
    states = States(sentences)
    for transitions in oracle(states, sentences):
        allowed = states.allowed(single_root=all(heads.count(0) == 1 for heads in trees))
        kind = np.where(transitions == 0, 0, 2 - transitions % 2)
        assert allowed[np.arange(len(kind)), kind].all()
    for row, sentence in enumerate(sentences):
        assert sentence.has_oracle
        length = len(sentence.words)
        assert states.heads[row, 1 : length + 1].tolist() == sentence.heads.tolist()
        assert states.relations[row, 1 : length + 1].tolist() == sentence.relations.tolist()


def test_a_tree_is_projective_when_no_arcs_cross():
    draw = np.random.default_rng(0)
    found = set()
    for _ in range(200):
        heads = any_heads(draw, 6)
        arcs = [tuple(sorted(arc)) for arc in enumerate(heads, start=1)]
        crossing = any(a < c < b < d for a, b in arcs for c, d in arcs)
        assert is_projective(heads) == (not crossing)
        found.add(crossing)
    assert found == {True, False}
    assert not encoded([0, 4, 1, 1]).has_oracle
    assert not encoded([0, 1], [1, 0]).has_oracle


def steps(sentence):
    states = States([sentence])
    return [int(transitions[0]) for transitions in oracle(states, [sentence])]


@pytest.mark.parametrize(
    ("heads", "relations", "expected"),
    [
        ([0], [1], [SHIFT, 2]),
        # He(1) saw(2) me(3): subject 1, object 3, root 2
        ([2, 0, 2], [1, 2, 3], [SHIFT, SHIFT, 1, SHIFT, 6, 4]),
        # a right dependent waits for its own: saw(1) men(2) here(3), here depends on men
        ([0, 1, 2], [1, 2, 3], [SHIFT, SHIFT, SHIFT, 6, 4, 2]),
        # two roots
        ([0, 0], [1, 1], [SHIFT, 2, SHIFT, 2]),
    ],
)
def test_the_oracle_of_trees_made_by_hand(heads, relations, expected):
    assert steps(encoded(heads, relations)) == expected


def test_features_are_those_of_chen_and_manning():
    # 1 and 2 depend on 3, 4 on 5, 5 on 3: after all but the last arcs, 3 has two left and one right dependent.
    sentence = encoded([3, 3, 0, 5, 3, 3], [1, 2, 1, 3, 2, 1])
    states = States([sentence])
    for _, _ in zip(range(9), oracle(states, [sentence]), strict=False):
        pass
    states.apply(np.asarray([2 * 2]))  # 5 becomes the right dependent of 3; 6 is still in the buffer
    words, tags, relations = np.split(states.features()[0], [18, 36])
    none = NULL
    # stack: 3, root; buffer: 6
    stack_and_buffer = [12, ROOT, none, 15, none, none]
    first_dependents = [10, none, 14, none]  # leftmost and rightmost of 3 and of the root
    second_dependents = [11, none, none, none]
    grandchildren = [none, none, none, none]  # leftmost of 1; rightmost of 5
    assert words.tolist() == [*stack_and_buffer, *first_dependents, *second_dependents, *grandchildren]
    assert tags.tolist() == [word + 100 if word >= 10 else word for word in words]
    assert relations.tolist() == [1, 0, 2, 0, 2, 0, 0, 0, 0, 0, 0, 0]


def test_dependents_of_dependents_are_features():
    sentence = encoded([2, 3, 0, 3, 4], [1, 2, 1, 2, 3])
    states = States([sentence])
    for _, _ in zip(range(9), oracle(states, [sentence]), strict=False):
        pass
    states.apply(np.asarray([2 * 2]))
    words = states.features()[0][:18]
    assert words[[0, 6, 8, 14, 16]].tolist() == [12, 11, 13, 10, 14]


def test_examples_are_all_states_of_all_trees_whatever_the_batch():
    sentences = [encoded(heads) for heads in ([0], [2, 0, 2], [0, 1, 2, 3], [2, 0])]
    features, transitions = training_examples(sentences)
    assert features.shape == (2 * (1 + 3 + 4 + 2), 48)
    alone, apart = training_examples(sentences, batch_size=1)
    both = (np.column_stack([a, b]) for a, b in ((features, transitions), (alone, apart)))
    assert sorted(next(both).tolist()) == sorted(next(both).tolist())


@pytest.mark.parametrize("single_root", [True, False])
def test_parsing_gives_a_projective_tree_whatever_the_scores_and_the_batch(single_root):
    draw = np.random.default_rng(0)
    table = draw.normal(size=(48, 7))

    def score(features):
        return np.sin(features @ table)

    sentences = [encoded([0] * length) for length in (3, 9, 1, 5, 9)]
    heads, relations = parse(score, sentences, single_root=single_root, batch_size=2)
    alone = [parse(score, [sentence], single_root=single_root, batch_size=1) for sentence in sentences]
    for tree, labels, (same_tree, same_labels) in zip(heads, relations, alone, strict=True):
        assert tree.tolist() == same_tree[0].tolist()
        assert labels.tolist() == same_labels[0].tolist()
        assert encoded(tree, labels).has_oracle
        assert not single_root or tree.tolist().count(0) == 1


def test_a_perfect_score_gives_the_tree_back():
    sentence = encoded([3, 3, 0, 5, 3, 3], [1, 2, 1, 3, 2, 1])
    given_states = iter(steps(sentence))

    def score(features):
        return np.eye(7)[[next(given_states)]]

    heads, relations = parse(score, [sentence], single_root=True, batch_size=1)
    assert heads[0].tolist() == sentence.heads.tolist()
    assert relations[0].tolist() == sentence.relations.tolist()
