"""Trains tokenizers on the training data, for models that start from a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.checkpoints import save_folder

PAD, UNK, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"


def trained_once(run: Any, train: Callable[[], PreTrainedTokenizerFast]) -> Any:
    """Return the tokenizer that the main process trained when the run began, from the run's folder."""
    folder = run.output_dir / "tokenizer"
    if run.is_main and not (run.resuming and folder.exists()):
        save_folder(train().save_pretrained, folder)
    run.accelerator.wait_for_everyone()
    return AutoTokenizer.from_pretrained(folder)


def train_encoder_tokenizer(
    texts: Iterable[str],
    *,
    kind: Literal["word", "bpe"],
    vocab_size: int,
    min_frequency: int,
    lowercase: bool,
    max_length: int,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer for `[CLS] text [SEP]` and `[CLS] text [SEP] pair [SEP]`, saved and loaded like any other.

    `word` keeps words and punctuation marks, `bpe` splits rare words. The same texts give the same vocabulary.
    """
    settings = {"vocab_size": vocab_size, "min_frequency": min_frequency, "show_progress": False}
    settings["special_tokens"] = [PAD, UNK, CLS, SEP]
    if kind == "word":
        tokenizer, trainer = Tokenizer(models.WordLevel(unk_token=UNK)), trainers.WordLevelTrainer(**settings)
    else:
        tokenizer, trainer = Tokenizer(models.BPE(unk_token=UNK)), trainers.BpeTrainer(**settings)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(texts, trainer)
    ids = {name: tokenizer.token_to_id(name) for name in (CLS, SEP)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B:1 {SEP}:1", special_tokens=list(ids.items())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        cls_token=CLS,
        sep_token=SEP,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
