"""The joint tokenizer of both languages."""

import pytest
from transformers import AutoTokenizer

from common.endings import OptionError
from tasks.joint_bpe import train_joint_bpe


def test_text_in_tokens_already_keeps_them():
    texts = ["It 's talk , isn 't it ?"] * 3
    tokenizer = train_joint_bpe(texts, vocab_size=60, lowercase=True, max_length=50, split_punctuation=False)
    assert tokenizer.tokenize(texts[0]) == ["▁it", "▁'s", "▁talk", "▁,", "▁isn", "▁'t", "▁it", "▁?"]
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"], skip_special_tokens=True) == texts[0].lower()


def test_a_text_with_thousands_of_characters_keeps_them_all():
    characters = [chr(0x4E00 + number) for number in range(3000)]
    texts = ["".join(characters[start : start + 10]) for start in range(0, 3000, 10)]
    tokenizer = train_joint_bpe(texts, vocab_size=3100, lowercase=False, max_length=50)
    assert tokenizer.unk_token_id not in [number for text in texts for number in tokenizer(text)["input_ids"]]
    with pytest.raises(OptionError, match=r"--vocab_size 2000: the text has 3,001 different characters; .* 3,005,"):
        train_joint_bpe(texts, vocab_size=2000, lowercase=False, max_length=50)


@pytest.mark.parametrize("lowercase", [False, True])
def test_the_joint_tokenizer_gives_the_text_back_after_a_reload(tmp_path, lowercase):
    texts = ["Ein kleiner Hund, der bellt.", "A small dog that barks (loudly)!", "Một con chó nhỏ."] * 3
    tokenizer = train_joint_bpe(texts, vocab_size=150, lowercase=lowercase, max_length=50)
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        ids = reloaded(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"]
        assert ids[-1] == reloaded.eos_token_id
        assert reloaded.decode(ids, skip_special_tokens=True) == (text.lower() if lowercase else text)
    assert (reloaded.bos_token_id, reloaded.pad_token_id, reloaded.eos_token_id) == (0, 1, 2)
    assert (
        train_joint_bpe(texts, vocab_size=150, lowercase=lowercase, max_length=50).get_vocab() == reloaded.get_vocab()
    )
