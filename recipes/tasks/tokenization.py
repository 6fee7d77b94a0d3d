"""Trains tokenizers on the training data, for models that start from a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
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
    kind: Literal["word", "wordpiece", "bpe"],
    vocab_size: int,
    min_frequency: int,
    lowercase: bool,
    max_length: int,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer for `[CLS] text [SEP]` and `[CLS] text [SEP] pair [SEP]`, saved and loaded like any other.

    `word` keeps words and punctuation marks, the others split rare words. The same texts give the same vocabulary.
    """
    special = [PAD, UNK, CLS, SEP]
    settings = {"vocab_size": vocab_size, "min_frequency": min_frequency, "show_progress": False}
    normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
    splitter = pre_tokenizers.BertPreTokenizer()

    def trained(model: models.Model, trainer: trainers.Trainer) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer

    if kind == "word":
        trainer = trainers.WordLevelTrainer(special_tokens=special, **settings)
        tokenizer = trained(models.WordLevel(unk_token=UNK), trainer)
    elif kind == "bpe":
        tokenizer = trained(models.BPE(unk_token=UNK), trainers.BpeTrainer(special_tokens=special, **settings))
    else:
        # Its trainer numbers the letters within words in the order of a hash map, which differs between processes, and
        # breaks ties between merges by these numbers. As special tokens, the letters have fixed numbers.
        texts = list(texts)
        words = (word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
        within = sorted({f"##{letter}" for word in words for letter in word[1:]})
        trainer = trainers.WordPieceTrainer(special_tokens=[*special, *within], **settings)
        vocabulary = trained(models.WordPiece(unk_token=UNK), trainer).get_vocab()
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
        tokenizer.decoder = decoders.WordPiece()
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
