"""Translation: from the options to tokenized splits, a collate function and a model."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from sacrebleu.metrics import BLEU
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedModel,
)

from common.evaluation import main_first
from common.loop import Run
from common.options import OptionError
from common.setup import calibration_rows
from common.task import Task
from common.token_batches import TokenPlan
from tasks.bleu import moses_detokenize, moses_tokenize
from tasks.data import USE, DataError
from tasks.joint_bpe import train_joint_bpe
from tasks.models import build_fresh, check_model_source, fresh_config, load_pretrained
from tasks.parallel_text import REFERENCE, SOURCE, TARGET, load_pairs
from tasks.tokenization import trained_once

IGNORED = -100  # the label of padding
SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


@dataclass(kw_only=True)
class TranslationTask(Task):
    """Sentence pairs.

    `raw` contains the text columns of every split, `splits` their `input_ids` and `labels`, `lengths` the numbers of
    tokens of sources and of targets. `restore` turns decoded text into plain text.
    """

    score = "bleu_tokenized_lowercase"
    label = "BLEU (Moses tokens, lower case)"
    unit = "target tokens/s"
    without_test: ClassVar[dict[str, str]] = {"test_file": "null", "test_split": "null"}

    raw: dict[str, Dataset]
    splits: dict[str, Dataset]
    lengths: dict[str, tuple[list[int], list[int]]]
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    restore: Callable[[list[str]], list[str]]
    use: str

    @classmethod
    def outcomes(cls, folder: Path, record: Mapping[str, Any]) -> np.ndarray:
        """Return the n-gram matches and totals and the two lengths of each test sentence."""
        lines = (folder / "test_translations.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
        rows, lang = [json.loads(line) for line in lines], record["options"]["target_lang"]  # lines may contain U+2028
        hypotheses = moses_tokenize([row["translation"] for row in rows], lang)
        references = moses_tokenize([row["reference"] for row in rows], lang)
        # sacreBLEU requires effective_order on single sentences. It does not change the counts used here.
        metric = BLEU(lowercase=True, tokenize="none", force=True, effective_order=True)
        counts = []
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            result = metric.sentence_score(hypothesis, [reference])
            counts.append([*result.counts, *result.totals, result.sys_len, result.ref_len])
        return np.asarray(counts)

    @classmethod
    def score_of(cls, sums: np.ndarray) -> np.ndarray:
        """Return BLEU."""
        rows = sums.astype(int).tolist()
        return np.asarray([BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9]).score for row in rows])


def prepare_translation(run: Run) -> TranslationTask:
    """Load and check the data, train or load the tokenizer, tokenize. Raises DataError or OptionError on bad input."""
    options, accelerator = run.options, run.accelerator
    check_model_source(options)
    if options.model_name_or_path and options.initialization != "model":
        raise OptionError(f"--initialization {options.initialization} is for fresh models; leave it out")
    if options.average_checkpoints == 1:
        raise OptionError("--average_checkpoints must be 0 or at least 2, got 1")
    if options.average_checkpoints and accelerator.distributed_type in SHARDED:
        raise OptionError("--average_checkpoints does not go with FSDP or DeepSpeed; give --average_checkpoints 0")
    raw = main_first(accelerator, lambda: load_pairs(options))
    for split in raw.keys() - {"train"}:
        references(raw[split], split)
    tokenizer = _tokenizer(raw["train"], run)
    tokenizer.model_max_length = options.max_source_length  # saved with it, for the test as for the training
    tokenize = partial(_tokenize, tokenizer=tokenizer, options=options)
    splits = main_first(accelerator, lambda: {split: tokenize(data) for split, data in raw.items()})
    lengths = {split: (data["source_length"][:], data["target_length"][:]) for split, data in splits.items()}
    splits = {split: data.select_columns(["input_ids", "labels"]) for split, data in splits.items()}
    plan = TokenPlan(*lengths["train"], options.max_tokens, **run.division)
    # It recommends __call__ over pad. But texts are tokenized once and padded in every batch.
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return dict(collator(rows))

    def calibration_batch(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        batch = collate(calibration_rows(splits["train"]))
        return {**batch, "decoder_input_ids": decoder_inputs(model, batch.pop("labels"))}

    def restore(texts: list[str]) -> list[str]:
        texts = [" ".join(text.split()) for text in texts]
        return moses_detokenize(texts, options.target_lang) if options.text_preparation == "moses" else texts

    sizes = ", ".join(f"{len(data):,} to {USE[split]}" for split, data in splits.items())
    return TranslationTask(
        pipeline="translation",
        auto_class=AutoModelForSeq2SeqLM,
        processor=tokenizer,
        train_data=splits["train"],
        train_collate=lambda epoch: collate,
        plan=plan,
        count=plan.target_tokens,
        build_model=lambda: _build_model(options, tokenizer),
        calibration_batch=calibration_batch,
        summary=f"sentence pairs: {sizes}; {sum(lengths['train'][1]):,} target tokens to train on",
        raw=raw,
        splits=splits,
        lengths=lengths,
        collate=collate,
        restore=restore,
        use=_use(options),
    )


def translate_arguments(options: Any) -> dict[str, str]:
    """Return the options of `translate.py` that make it read texts as the training did."""
    names = ("source_lang_code", "source_prefix")
    return {name: value for name in names if (value := getattr(options, name))}


def _use(options: Any) -> str:
    said = "".join(f" --{name}={shlex.quote(value)}" for name, value in translate_arguments(options).items())
    said = said.replace("{", "{{").replace("}", "}}")
    moses = " (in and out in Moses's tokens)" if options.text_preparation == "moses" else ""
    return f"python recipes/translate.py --model {{model}} --input SENTENCES --output TRANSLATIONS{said}{moses}"


# ------------------------------------------------------------------------------------------------------ tokens


def _tokenizer(data: Dataset, run: Run) -> Any:
    options = run.options
    if options.model_name_or_path:
        tokenizer = main_first(run.accelerator, lambda: load_pretrained(AutoTokenizer, options.model_name_or_path))
        for attribute, name in (("src_lang", "source_lang_code"), ("tgt_lang", "target_lang_code")):
            code = getattr(options, name)
            if code is None:
                if hasattr(type(tokenizer), "src_lang"):
                    raise OptionError(f"--{name} is missing: {options.model_name_or_path} translates many languages")
                continue
            lang_token_id(tokenizer, code)
            setattr(tokenizer, attribute, code)
        return tokenizer
    return trained_once(
        run,
        lambda: train_joint_bpe(
            itertools.chain(data[SOURCE], data[TARGET]),
            vocab_size=options.vocab_size,
            lowercase=options.lowercase,
            max_length=max(options.max_source_length, options.max_target_length),
            split_punctuation=options.text_preparation != "moses",
        ),
    )


def lang_token_id(tokenizer: Any, code: str) -> int:
    """Return the id of a language's token. Raises OptionError, naming the known codes, if the tokenizer has none."""
    if hasattr(tokenizer, "get_lang_id") and code in getattr(tokenizer, "lang_code_to_token", {}):
        return tokenizer.get_lang_id(code)  # M2M100: `de` is written `__de__`
    number = tokenizer.convert_tokens_to_ids(code)
    if number is None or number == tokenizer.unk_token_id:
        known = sorted(getattr(tokenizer, "lang_code_to_token", None) or getattr(tokenizer, "lang_code_to_id", {}))
        known = known or list(tokenizer.all_special_tokens)
        raise OptionError(f"unknown language code {code!r}; the tokenizer has {', '.join(map(str, known[:60]))}")
    return number


def _tokenize(data: Dataset, tokenizer: Any, options: Any) -> Dataset:
    """Return `input_ids`, `labels` and their lengths, cached on disk for all runs on the same text."""

    def tokenize(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        texts = [options.source_prefix + text for text in rows[SOURCE]]
        source = tokenizer(texts, truncation=True, max_length=options.max_source_length)["input_ids"]
        target = tokenizer(text_target=rows[TARGET], truncation=True, max_length=options.max_target_length)[
            "input_ids"
        ]
        lengths = {"source_length": list(map(len, source)), "target_length": list(map(len, target))}
        return {"input_ids": source, "labels": target, **lengths}

    key = hashlib.sha256()
    for text in itertools.chain(data[SOURCE], data[TARGET]):
        key.update(f"{len(text)}:{text}".encode())
    written = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    names = ("source_prefix", "max_source_length", "max_target_length", "source_lang_code", "target_lang_code")
    key.update(json.dumps([written, [getattr(options, name) for name in names]]).encode())
    name = key.hexdigest()[:32]
    folder = Path(options.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "adanorm-translation")
    folder.mkdir(parents=True, exist_ok=True)
    return data.map(
        tokenize,
        batched=True,
        remove_columns=data.column_names,
        num_proc=options.preprocessing_workers,
        cache_file_name=str(folder / f"{name}.arrow"),
        new_fingerprint=name,
        load_from_cache_file=True,
        desc="Tokenizing",
    )


def decoder_inputs(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """Return what the decoder reads to predict `labels` (batch, length): its start token and the shifted labels."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    shifted = torch.roll(labels, 1, dims=1)
    shifted[:, 0] = model.config.decoder_start_token_id
    return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id)


# ------------------------------------------------------------------------------------------------------- model


def _build_model(options: Any, tokenizer: Any) -> PreTrainedModel:
    names = ("dropout", "attention_dropout", "activation_dropout")
    dropouts = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.model_name_or_path:
        config = _with_dropouts(load_pretrained(AutoConfig, options.model_name_or_path), dropouts)
        model = load_pretrained(AutoModelForSeq2SeqLM, options.model_name_or_path, config=config)
    else:
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        special |= {"decoder_start_token_id": tokenizer.eos_token_id, "forced_eos_token_id": None}
        special["vocab_size"] = len(tokenizer)
        if options.model_config.get("model_type") == "marian":
            special |= {"decoder_vocab_size": len(tokenizer)}
        config = _with_dropouts(fresh_config(options, **special), dropouts)
        model = build_fresh(AutoModelForSeq2SeqLM, config)
        model.generation_config = GenerationConfig.from_model_config(model.config)
        if options.initialization != "model":
            initialize(model, options.initialization)
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = max(options.max_source_length, options.max_target_length)
    if positions is not None and positions < longest and model.config.model_type != "m2m_100":
        raise OptionError(f"a length of {longest} tokens is beyond the model's {positions} positions")
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    settings = model.generation_config
    settings.num_beams, settings.length_penalty = options.num_beams, options.length_penalty
    settings.max_length = options.max_target_length
    if options.target_lang_code is not None:
        target = lang_token_id(tokenizer, options.target_lang_code)
        example = tokenizer(text_target="a")["input_ids"]
        if example[-1] == target:  # mBART-25: the language is what the decoder starts with
            model.config.decoder_start_token_id = settings.decoder_start_token_id = target
        elif example[0] == target:  # the others: it is the first token of every translation
            settings.forced_bos_token_id = target
    if model.config.decoder_start_token_id is None:
        raise OptionError("the model has no decoder_start_token_id; give --target_lang_code")
    return model


def _with_dropouts(config: Any, dropouts: dict[str, float]) -> Any:
    for name, value in dropouts.items():
        field_name = {"dropout": "dropout_rate"}.get(name, name) if not hasattr(config, name) else name
        if not hasattr(config, field_name):
            raise OptionError(f"--{name}: {config.model_type} has no such dropout")
        setattr(config, field_name, value)
    return config


@torch.no_grad()
def initialize(model: PreTrainedModel, kind: Literal["xavier", "kaiming"]) -> None:
    """Initialize all linear and embedding weights as the paper's runs do; set biases to 0.

    Linear layers: Xavier uniform; queries, keys and values as one matrix of three times the height. Embeddings: normal
    with standard deviation width^-1/2. `kaiming` draws the attention's four matrices from U(-width^-1/2, width^-1/2),
    which is Kaiming uniform with a = sqrt(5).

    Raises OptionError for a model without q_proj, k_proj and v_proj.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = 0
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Embedding):
            if not module.weight.requires_grad:  # sinusoidal positions
                continue
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.Linear) and id(module.weight) not in embeddings:
            projection = leaf in {"q_proj", "k_proj", "v_proj"}
            found += projection
            if kind == "kaiming" and (projection or leaf == "out_proj"):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            else:
                nn.init.xavier_uniform_(module.weight, gain=2**-0.5 if projection else 1.0)
            if module.bias is not None:
                module.bias.zero_()
    if not found:
        raise OptionError(f"--initialization {kind}: {type(model).__name__} has no q_proj, k_proj and v_proj")


def references(data: Dataset, split: str = "") -> list[str]:
    """Return the reference translations of a split with spaces normalized. Raises DataError if all are empty."""
    found = [" ".join(text.split()) for text in data[REFERENCE]]
    if not any(found):
        raise DataError(f"all references of the {split} split are empty")
    return found
