"""Tokenizers trained on texts."""

import pytest
from transformers import AutoTokenizer

from tasks.tokenization import train_encoder_tokenizer

TEXTS = ["A cat, a dog.", "a cat sat", "The dog sat!"] * 2


def trained(kind, **changes):
    options = {"vocab_size": 60, "min_frequency": 2, "lowercase": True, "max_length": 20, **changes}
    return train_encoder_tokenizer(TEXTS, kind=kind, **options)


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_it_comes_back_from_its_files_and_the_same_texts_give_the_same(kind, tmp_path):
    tokenizer = trained(kind)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert all(trained(kind).get_vocab() == again.get_vocab() for _ in range(8))
    one, two = again("a cat")["input_ids"], again("a cat", "the dog")["input_ids"]
    assert one == two[: len(one)]
    assert (one[0], one[-1], two[-1]) == (again.cls_token_id, again.sep_token_id, again.sep_token_id)
    assert again(["a cat sat", "a"], padding=True)["input_ids"][1][-1] == again.pad_token_id


def test_words_are_whole_and_rare_ones_unknown():
    tokenizer = trained("word", min_frequency=3)
    assert tokenizer.tokenize("A DOG, a bird") == ["a", "dog", "[UNK]", "a", "[UNK]"]
    assert trained("word", lowercase=False).tokenize("A a") == ["A", "a"]


def test_pieces_make_up_what_is_rare():
    assert "".join(trained("bpe").tokenize("dogcat")) == "dogcat"
