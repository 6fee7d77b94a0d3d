"""Arc-standard parsing (Nivre 2004) of many sentences at a time, on the features of Chen and Manning (2014).

A state has a stack, which starts with the artificial root, and a buffer, which starts with all words. SHIFT moves
the next word onto the stack; LEFT makes the second of the stack a dependent of the top and takes it off, RIGHT the top
one of the second. Every sentence of n words takes 2 n transitions. So a batch is parsed in lockstep, and its longest
sentences, which come first, remain.

Transition 0 is SHIFT, 2 l - 1 is LEFT with relation l, 2 l is RIGHT with it; relations count from 1.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils import cached_file

from common.progress import with_time_left
from hf_adanorm.saving import write_file
from tasks.conllu import Sentence

NULL, ROOT, UNKNOWN = 0, 1, 2  # ids of words and of tags that no word has; NULL is also that of a missing relation
NUM_WORDS, NUM_TAGS, NUM_RELATIONS = 18, 18, 12
NUM_FEATURES = NUM_WORDS + NUM_TAGS + NUM_RELATIONS
_BOTTOM = 2  # place of the root on the stack; no word lies under it


@dataclass(frozen=True)
class Encoded:
    """A sentence in numbers, each (words,); heads and relations only where the tree is known."""

    words: np.ndarray
    tags: np.ndarray
    heads: np.ndarray | None = None
    relations: np.ndarray | None = None  # 0 for one that is not known

    @property
    def has_oracle(self) -> bool:
        """Return whether transitions can build its tree: it is projective, and all its relations are known."""
        return self.heads is not None and bool(np.all(self.relations)) and is_projective(self.heads)


def is_projective(heads: Sequence[int] | np.ndarray) -> bool:
    """Return whether no two arcs of a tree cross, including that from the root (head 0) at the left."""
    heads = np.asarray(heads)
    words = np.arange(1, len(heads) + 1)
    low, high = np.minimum(heads, words), np.maximum(heads, words)
    begins_inside = (low[:, None] < low) & (low < high[:, None])
    return not bool((begins_inside & (high > high[:, None])).any())


class ParserVocabulary:
    """Words, tags and relations by number; saved with the model as `vocabulary.json`.

    Words and tags count from 3, after those of no word, of the root and of what is unknown; relations from 1.
    """

    file_name = "vocabulary.json"

    def __init__(
        self, words: Sequence[str], tags: Sequence[str], relations: Sequence[str], *, lowercase: bool = False
    ):
        self.words, self.tags, self.relations, self.lowercase = list(words), list(tags), list(relations), lowercase
        self._words, self._tags = ({name: UNKNOWN + 1 + n for n, name in enumerate(names)} for names in (words, tags))
        self._relations = {name: 1 + n for n, name in enumerate(relations)}

    @classmethod
    def of(cls, sentences: Sequence[Sentence], *, min_frequency: int, lowercase: bool) -> ParserVocabulary:
        """Build the vocabulary of a treebank, ordered by frequency, then alphabetically."""

        def counted(values: Iterable[str], least: int = 1) -> list[str]:
            counts = Counter(values)
            return sorted((name for name in counts if counts[name] >= least), key=lambda name: (-counts[name], name))

        words = (word.lower() if lowercase else word for sentence in sentences for word in sentence.forms)
        tags = (tag for sentence in sentences for tag in sentence.tags)
        relations = (relation for sentence in sentences for relation in sentence.relations)
        return cls(counted(words, min_frequency), counted(tags), counted(relations), lowercase=lowercase)

    def encode(self, sentence: Sentence) -> Encoded:
        """Return a sentence as numbers."""
        forms = [form.lower() for form in sentence.forms] if self.lowercase else sentence.forms
        return Encoded(
            np.asarray([self._words.get(form, UNKNOWN) for form in forms]),
            np.asarray([self._tags.get(tag, UNKNOWN) for tag in sentence.tags]),
            np.asarray(sentence.heads) if sentence.heads else None,
            np.asarray([self._relations.get(name, 0) for name in sentence.relations]) if sentence.heads else None,
        )

    def names(self, relations: Iterable[int]) -> list[str]:
        """Return the names of relations, given by number."""
        return [self.relations[number - 1] for number in relations]

    def transitions(self) -> list[str]:
        """Return the names of all transitions, in order."""
        return ["SHIFT", *(f"{kind}-{name}" for name in self.relations for kind in ("LEFT", "RIGHT"))]

    def sizes(self) -> dict[str, int]:
        """Return the number of words, tags and relations that a model embeds."""
        rows = {"vocab_size": len(self.words) + UNKNOWN + 1, "num_tags": len(self.tags) + UNKNOWN + 1}
        return {**rows, "num_relations": len(self.relations) + 1}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `vocabulary.json`."""
        names = ("words", "tags", "relations", "lowercase")
        text = json.dumps({name: getattr(self, name) for name in names}, ensure_ascii=False)
        write_file(Path(folder) / self.file_name, text)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> ParserVocabulary:
        """Load the vocabulary of a saved model, from a folder or the Hub. Raises OSError if there is none."""
        return cls(**json.loads(Path(cached_file(str(name), cls.file_name)).read_text(encoding="utf-8")))


class States:
    """The states of a batch of sentences, longest first.

    `heads` and `relations`, (sentences, words + 2), contain what has been parsed, at the place of each word from 1.
    """

    def __init__(self, sentences: Sequence[Encoded]):
        self.lengths = np.asarray([len(sentence.words) for sentence in sentences])
        assert (np.diff(self.lengths) <= 0).all(), "sentences must be sorted, longest first"
        self.none = int(self.lengths[0]) + 1  # place of no word: its word, tag and relation are NULL
        shape = (len(sentences), self.none + 1)
        self.words, self.tags, self.heads, self.relations = np.zeros((4, *shape), dtype=np.int32)
        for row, sentence in enumerate(sentences):
            self.words[row, 1 : len(sentence.words) + 1] = sentence.words
            self.tags[row, 1 : len(sentence.words) + 1] = sentence.tags
        self.words[:, 0] = self.tags[:, 0] = ROOT
        # The outermost and the second outermost dependents on either side; how many a word has in all.
        self.left, self.left2, self.right, self.right2 = np.full((4, *shape), self.none, dtype=np.int32)
        self.num_dependents = np.zeros(shape, dtype=np.int32)
        self.stack = np.full((len(sentences), self.none + _BOTTOM + 1), self.none, dtype=np.int32)
        self.stack[:, _BOTTOM] = 0
        self.top = np.full(len(sentences), _BOTTOM)
        self.next = np.ones(len(sentences), dtype=np.int64)
        self.rows = np.arange(len(sentences))
        self.steps_done = 0

    @property
    def num_active(self) -> int:
        """Return how many sentences, counted from the first, are not yet parsed."""
        return int(np.count_nonzero(2 * self.lengths > self.steps_done))

    def features(self) -> np.ndarray:
        """Return the 18 words, 18 tags and 12 relations, (active, 48), that determine the next transition.

        These are the first three of stack and buffer. For the first two of the stack, they are also the outermost and
        second outermost dependents on either side, the leftmost of the leftmost and the rightmost of the rightmost.
        """
        n = self.num_active
        row = self.rows[:n, None]
        stack = self.stack[row, self.top[:n, None] - np.arange(3)]
        buffer = self.next[:n, None] + np.arange(3)
        buffer = np.where(buffer <= self.lengths[:n, None], buffer, self.none)
        upper = stack[:, :2]
        left, right = self.left[row, upper], self.right[row, upper]
        dependents = [left, right, self.left2[row, upper], self.right2[row, upper]]
        dependents += [self.left[row, left], self.right[row, right]]
        places = np.concatenate([stack, buffer, *dependents], axis=1)  # (active, 18)
        relations = self.relations[row, places[:, -NUM_RELATIONS:]]
        return np.concatenate([self.words[row, places], self.tags[row, places], relations], axis=1)

    def allowed(self, *, single_root: bool) -> np.ndarray:
        """Return whether SHIFT, LEFT and RIGHT are possible, (active, 3).

        With `single_root`, the root takes its dependent last.
        """
        n = self.num_active
        shift = self.next[:n] <= self.lengths[:n]
        two = self.top[:n] > _BOTTOM + 1  # words on the stack
        right = self.top[:n] > _BOTTOM
        if single_root:
            right = right & (two | ~shift)
        return np.stack([shift, two, right], axis=1)

    def apply(self, transitions: np.ndarray) -> None:
        """Move every active sentence by its transition, (active,); each must be possible."""
        rows = np.flatnonzero(transitions == 0)
        self.top[rows] += 1
        self.stack[rows, self.top[rows]] = self.next[rows]
        self.next[rows] += 1
        for is_right, outer, second in ((False, self.left, self.left2), (True, self.right, self.right2)):
            rows = np.flatnonzero((transitions > 0) & (transitions % 2 == (not is_right)))
            top, below = self.stack[rows, self.top[rows]], self.stack[rows, self.top[rows] - 1]
            head, dependent = (below, top) if is_right else (top, below)
            self.heads[rows, dependent] = head
            self.relations[rows, dependent] = (transitions[rows] + 1) // 2
            second[rows, head] = outer[rows, head]  # dependents are added from the inside out
            outer[rows, head] = dependent
            self.num_dependents[rows, head] += 1
            self.top[rows] -= 1
            self.stack[rows, self.top[rows]] = head
        self.steps_done += 1


def oracle(states: States, sentences: Sequence[Encoded]) -> Iterator[np.ndarray]:
    """Yield the transitions, (active,), that build the projective trees of `sentences` from fresh `states`.

    Each one is applied before the next is yielded. LEFT and RIGHT come as soon as they are correct. RIGHT waits until
    the word has all its dependents.
    """
    heads, relations, num_dependents = np.zeros((3, *states.heads.shape), dtype=np.int32)
    for row, sentence in enumerate(sentences):
        assert sentence.heads is not None
        assert sentence.relations is not None
        heads[row, 1 : len(sentence.words) + 1] = sentence.heads
        relations[row, 1 : len(sentence.words) + 1] = sentence.relations
        num_dependents[row] = np.bincount(sentence.heads, minlength=states.none + 1)
    while n := states.num_active:
        rows = states.rows[:n]
        top, below = states.stack[rows, states.top[:n]], states.stack[rows, states.top[:n] - 1]
        _, left, right = states.allowed(single_root=False).T
        left = left & (heads[rows, below] == top)
        complete = states.num_dependents[rows, top] == num_dependents[rows, top]
        right = right & (heads[rows, top] == below) & complete
        transitions = np.where(left, 2 * relations[rows, below] - 1, np.where(right, 2 * relations[rows, top], 0))
        yield transitions
        states.apply(transitions)


def longest_first(sentences: Sequence[Encoded]) -> list[int]:
    """Return the order of sentences that `States` needs."""
    return sorted(range(len(sentences)), key=lambda index: -len(sentences[index].words))


def training_examples(sentences: Sequence[Encoded], batch_size: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Return features (transitions, 48) of all states that the oracle passes through, and its transitions."""
    features, transitions = [np.zeros((0, NUM_FEATURES), dtype=np.int32)], [np.zeros(0, dtype=np.int32)]
    order = longest_first(sentences)
    for start in range(0, len(order), batch_size):
        batch = [sentences[index] for index in order[start : start + batch_size]]
        states = States(batch)
        for step in oracle(states, batch):
            features.append(states.features())
            transitions.append(step)
    return np.concatenate(features), np.concatenate(transitions)


def parse(
    score: Callable[[np.ndarray], np.ndarray], sentences: Sequence[Encoded], *, single_root: bool, batch_size: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return heads and relations of the words of every sentence, by the best allowed transition in each state.

    `score` gives scores (states, classes) of features (states, 48); classes are transitions.
    """
    order = longest_first(sentences)
    heads: list[np.ndarray] = [np.zeros(0)] * len(order)
    relations = list(heads)
    for start in with_time_left(range(0, len(order), batch_size), "parsing"):
        batch = order[start : start + batch_size]
        states = States([sentences[index] for index in batch])
        while states.num_active:
            scores = score(states.features())
            allowed = states.allowed(single_root=single_root)
            pairs = (scores.shape[1] - 1) // 2
            possible = np.concatenate([allowed[:, :1], np.tile(allowed[:, 1:], pairs)], axis=1)
            states.apply(np.where(possible, scores, -np.inf).argmax(1))
        for row, index in enumerate(batch):
            length = len(sentences[index].words)
            heads[index] = states.heads[row, 1 : length + 1]
            relations[index] = states.relations[row, 1 : length + 1]
    return heads, relations


@torch.inference_mode()
def parse_sentences(
    model: torch.nn.Module, sentences: Sequence[Encoded], *, single_root: bool, batch_size: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return heads and relations, by number, of every word of every sentence. The model must be in eval mode."""
    device = next(model.parameters()).device

    def score(features: np.ndarray) -> np.ndarray:
        return model(input_ids=torch.from_numpy(features).long().to(device)).logits.float().cpu().numpy()

    heads, relations = parse(score, sentences, single_root=single_root, batch_size=batch_size)
    return [values.tolist() for values in heads], [values.tolist() for values in relations]
