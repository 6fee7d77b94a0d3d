"""Trains a joint BPE tokenizer of both languages on the training data."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from common.endings import OptionError

# In fairseq's and BART's order, so that the configs' defaults (pad 1, end 2) hold for fresh models.
BOS, PAD, EOS, UNK = SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def train_joint_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int,
    lowercase: bool,
    max_length: int,
    min_frequency: int = 2,
    split_punctuation: bool = True,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer for `text </s>` whose `decode` restores plain text, saved and loaded like any other.

    A word carries a mark for the space before it; punctuation marks are never merged with letters, unless
    `split_punctuation` is off, for text that is tokenized already. The vocabulary contains every character of the
    texts. The same texts give the same vocabulary.

    Raises OptionError if the characters alone exceed `vocab_size`.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    steps = [normalizers.NFC(), normalizers.Replace(chr(160), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence([*steps, *([normalizers.Lowercase()] if lowercase else [])])
    splits = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    punctuation = [pre_tokenizers.Punctuation()] if split_punctuation else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, *punctuation])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() > vocab_size:  # the trainer keeps all characters
        raise OptionError(
            f"--vocab_size {vocab_size}: the text has {tokenizer.get_vocab_size() - len(SPECIAL):,} different "
            f"characters; give at least {tokenizer.get_vocab_size():,}, and more to merge them into words"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
