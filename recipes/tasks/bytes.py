"""Text as a stream of bytes: splits of a file, segments to train on, windows to score, a tokenizer of bytes."""

from __future__ import annotations

import bz2
import gzip
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from common.batches import Plan, StepPlan
from common.loop import Run
from common.options import OptionError
from common.progress import with_time_left
from common.setup import calibration_rows
from common.task import Task
from tasks.data import USE, DataError
from tasks.models import (
    build_fresh,
    check_model_source,
    check_positions,
    fresh_config,
    load_model,
    load_pretrained,
    try_out,
)
from tasks.options import ByteDataOptions

NUM_BYTES = 256
# Parameters of an XLNet that reading one text does not use: DDP would wait for their gradients.
UNUSED = ("mask_emb", "seg_embed", "r_s_bias")


def read_bytes(file: str | Path, option_name: str) -> np.ndarray:
    """Return the bytes of a file, decompressed by its ending, as uint8. Raises DataError naming option and file."""
    path = Path(file)
    if not path.is_file():
        raise DataError(f"--{option_name} {file}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if len(names) != 1:
                    raise DataError(f"{file}: expected an archive of one file, it contains {len(names)}")
                data = archive.read(names[0])
        elif path.suffix in {".gz", ".bz2"}:
            data = {".gz": gzip, ".bz2": bz2}[path.suffix].decompress(path.read_bytes())
        else:
            data = path.read_bytes()
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    return np.frombuffer(data, dtype=np.uint8)


def load_byte_splits(options: ByteDataOptions) -> dict[str, np.ndarray]:
    """Return the splits `train`, `validation` and, if there is one, `test`.

    The end of the train file is the test split, preceded by validation, unless they have their own files. Raises
    DataError for a missing or unreadable file, and for splits too short for a window.
    """
    if options.train_file is None:
        raise DataError("--train_file is missing: the text to train on")
    train = read_bytes(options.train_file, "train_file")
    splits = {}
    for split in ("test", "validation"):
        file, length = getattr(options, f"{split}_file"), getattr(options, f"{split}_characters")
        if file is not None:
            splits[split] = read_bytes(file, f"{split}_file")
        elif length:
            if not 0 < length < len(train):
                raise DataError(
                    f"--{split}_characters {length:,}: {options.train_file} has only {len(train):,} bytes to divide; "
                    "give fewer, so that some are left to train on"
                )
            splits[split], train = train[-length:], train[:-length]
    if "validation" not in splits:
        raise DataError("no validation data: give --validation_characters or --validation_file")
    splits["train"] = train[: options.max_train_characters]
    for split, data in splits.items():
        if len(data) <= options.sequence_length:
            raise DataError(
                f"the {split} split has {len(data):,} bytes: too few for a sequence of {options.sequence_length} and "
                "the byte after it"
            )
    return splits


class Segments:
    """Consecutive segments of `length` inputs, each with the byte that follows as its last target."""

    def __init__(self, data: np.ndarray, length: int):
        self.data, self.length = data, length

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.length

    def __getitem__(self, index: int) -> np.ndarray:
        """Return `length + 1` bytes."""
        start = index * self.length
        return self.data[start : start + self.length + 1]


class StreamPlan:
    """Steps that read the text as contiguous streams, for models with a memory; a `common.batches.Plan` of `Segments`.

    The text is cut into as many streams as a step has rows. Each row continues where it stopped in the step before.
    Nothing is shuffled, and an incomplete last step is skipped. Raises ValueError if the text is too short for a step.
    """

    def __init__(
        self, num_segments: int, batch_size: int, *, num_processes: int = 1, accumulation: int = 1, seed: int = 0
    ):
        self.shape = (accumulation, num_processes, batch_size)
        self.num_streams = accumulation * num_processes * batch_size
        self.num_steps = num_segments // self.num_streams
        if self.num_steps == 0:
            raise ValueError(
                f"{num_segments} training segments cannot fill {num_processes} processes x {accumulation} "
                f"micro-batches of {batch_size} streams: lower --batch_size"
            )

    def steps(self, epoch: int) -> list[np.ndarray]:
        """Return the segments of every step, the same in each epoch."""
        return list(np.arange(self.num_streams) * self.num_steps + np.arange(self.num_steps)[:, None])

    def micro_batches(self, step: np.ndarray, rank: int) -> list[list[int]]:
        """Return one process's micro-batches of a step; a stream has the same place in each step."""
        return step.reshape(self.shape)[:, rank].tolist()

    def num_examples(self, step: np.ndarray) -> int:
        """Return the number of segments of a step over all micro-batches and processes."""
        return len(step)


class Memory:
    """What a model with a memory keeps of the earlier text, for each micro-batch of a step by number.

    The memory of every process is part of the checkpoints of `accelerator`.
    """

    def __init__(self, accelerator: Any, config: PreTrainedConfig):
        self.used = has_memory(config)
        self.held: dict[int, list[torch.Tensor]] = {}
        name = f"memory_{accelerator.process_index}.bin"

        def load(_: Any, folder: str) -> None:
            self.held = torch.load(Path(folder) / name, map_location=accelerator.device)

        def save(_: Any, __: Any, folder: str) -> None:
            torch.save(self.held, Path(folder) / name)

        if self.used:
            accelerator.register_save_state_pre_hook(save)
            accelerator.register_load_state_pre_hook(load)

    def inputs(self, number: int) -> dict[str, Any]:
        """Return what the model is given in addition to the text.

        A memory that is not finite, from a skipped step, is emptied: it would spoil the following steps. The memory of
        a skipped spike is kept, because the weights that made it are.
        """
        if not self.used:
            return {"use_cache": False}
        memory = self.held.get(number)
        if memory and not torch.stack([layer.isfinite().all() for layer in memory]).all():
            memory = None
        return {"mems": memory, "use_mems": True}

    def keep(self, number: int, output: Any) -> None:
        """Take over what the model returned."""
        if self.used:
            self.held[number] = [layer.clone() for layer in output.mems]  # they are views of larger tensors


def has_memory(config: PreTrainedConfig) -> bool:
    """Return whether a model carries a memory from segment to segment, as Transformer-XL does."""
    return bool(getattr(config, "mem_len", None))


class Windows:
    """Windows that together score every byte but the first exactly once.

    The first window scores all of its bytes, the others their last `stride`, with at least `length - stride` bytes of
    context. Raises OptionError, naming the option, for a stride that would skip bytes.
    """

    def __init__(self, data: np.ndarray, length: int, stride: int, option_name: str = "stride"):
        if not 1 <= stride <= length:
            raise OptionError(f"--{option_name} must be between 1 and --sequence_length {length}, got {stride}")
        self.data, self.length, self.stride = data, length, stride

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self.data) - 1 - self.length) // self.stride))

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return `length + 1` bytes, fewer of a shorter text, and how many of them, at the end, are scored."""
        first = 1 if index == 0 else 1 + self.length + (index - 1) * self.stride
        last = min(1 + self.length + index * self.stride, len(self.data))
        return self.data[max(last - 1 - self.length, 0) : last], last - first


def collate_windows(rows: Sequence[tuple[np.ndarray, int]]) -> dict[str, torch.Tensor]:
    """Return inputs, targets, and which targets are scored, each (batch, length)."""
    data = torch.from_numpy(np.stack([row[0] for row in rows]).astype(np.int64))  # (batch, length + 1)
    scored = torch.zeros(len(rows), data.shape[1] - 1, dtype=torch.bool)
    for row, (_, count) in zip(scored, rows, strict=True):
        row[-count:] = True
    return {"input_ids": data[:, :-1], "targets": data[:, 1:], "scored": scored}


def window_bits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the bits of each window's scored bytes, (batch,)."""
    # Without an attention mask: nothing is padded.
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits.float()  # (batch, length, bytes)
    nats = F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none")  # (batch, length)
    return (nats * batch["scored"]).sum(1) / math.log(2)


@torch.no_grad()
def stream_bits(
    model: torch.nn.Module,
    data: np.ndarray,
    length: int,
    num_streams: int,
    *,
    rank: int = 0,
    num_processes: int = 1,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[list[int], list[tuple[float, int]]]:
    """Return segments by number, and for each its bits under a model with a memory and its number of bytes.

    Every byte but the first is scored once. The text is cut into `num_streams` contiguous streams, which are read
    together, segment by segment. Their memory starts empty and is carried along. A process reads every
    `num_processes`-th stream, in as many steps as the others, and calls `before_each` before each step.
    """
    device = next(model.parameters()).device
    num_segments = -(-(len(data) - 1) // length)
    streams = np.array_split(np.arange(num_segments), min(num_streams, num_segments))
    own = streams[rank::num_processes]
    indices, outputs, memory = [], [], None
    for position in with_time_left(range(len(streams[0])), "scoring", shown=rank == 0):
        before_each()
        segments = [int(stream[position]) for stream in own if position < len(stream)]  # the longest streams are first
        rows = [data[segment * length : (segment + 1) * length + 1] for segment in segments or [0]]
        padded = np.zeros((len(rows), length + 1), dtype=np.int64)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = row
        batch = torch.from_numpy(padded).to(device)
        memory = memory and [layer[:, : len(rows)] for layer in memory]
        output = model(input_ids=batch[:, :-1], mems=memory, use_mems=True)
        memory = [layer.clone() for layer in output.mems]
        nats = F.cross_entropy(output.logits.float().transpose(1, 2), batch[:, 1:], reduction="none")  # (rows, length)
        for segment, row, its_nats in zip(segments, rows, nats, strict=False):
            indices.append(segment)
            outputs.append((its_nats[: len(row) - 1].sum().item() / math.log(2), len(row) - 1))
    return indices, outputs


@dataclass(kw_only=True)
class ByteTask(Task):
    """A text as bytes: `splits`, and `windows` to validate on."""

    score = "bits_per_character"
    label = "bits per character"
    decimals = 3
    higher_is_better = False
    unit = "characters/s"

    splits: dict[str, np.ndarray]
    windows: Windows | None  # None for a model with a memory, which reads streams

    @classmethod
    def outcomes(cls, folder: Path, record: Mapping[str, Any]) -> np.ndarray:
        """Return the bits and the characters of each segment of the test text."""
        bits = json.loads((folder / "test_bits.json").read_text(encoding="utf-8"))
        return np.asarray([bits["bits"], bits["characters"]]).T

    @classmethod
    def score_of(cls, sums: np.ndarray) -> np.ndarray:
        """Return bits per character."""
        return sums[:, 0] / sums[:, 1]


def collate_segments(rows: Sequence[np.ndarray]) -> torch.Tensor:
    """Return segments (batch, sequence_length + 1) as token ids."""
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def prepare_bytes(run: Run) -> ByteTask:
    """Load and check the text. Raises DataError or OptionError on bad input."""
    options = run.options
    check_model_source(options)
    if options.model_name_or_path:
        config = load_pretrained(AutoConfig, options.model_name_or_path)
    else:
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        config = fresh_config(options, vocab_size=NUM_BYTES, **tokens)
    splits = load_byte_splits(options)
    segments = Segments(splits["train"], options.sequence_length)
    if has_memory(config):
        plan: Plan = StreamPlan(len(segments), options.batch_size, **run.division)
        windows = None
    else:
        plan = StepPlan([1] * len(segments), options.batch_size, **run.division)
        windows = Windows(splits["validation"], options.sequence_length, options.eval_stride, "eval_stride")
    return ByteTask(
        pipeline="text-generation",
        auto_class=AutoModelForCausalLM,
        processor=byte_tokenizer(options.sequence_length),
        train_data=segments,
        train_collate=lambda epoch: collate_segments,
        plan=plan,
        count=lambda step: plan.num_examples(step) * options.sequence_length,
        build_model=lambda: _build_model(options, config),
        calibration_batch=lambda model: {"input_ids": collate_segments(calibration_rows(segments))[:, :-1]},
        summary="bytes: " + ", ".join(f"{len(data):,} to {USE[split]}" for split, data in splits.items()),
        splits=splits,
        windows=windows,
    )


def _build_model(options: Any, config: PreTrainedConfig) -> PreTrainedModel:
    if options.model_name_or_path:
        model = load_model(AutoModelForCausalLM, options.model_name_or_path)
    else:
        model = build_fresh(AutoModelForCausalLM, config)
    check_reads_bytes(model, options.sequence_length)
    for name, parameter in model.named_parameters():
        if name.endswith(UNUSED):
            parameter.requires_grad_(False)
    return model


def check_reads_bytes(model: PreTrainedModel, length: int) -> None:
    """Raise OptionError unless a model takes `length` bytes and reads them from left to right."""
    config = model.config
    if config.vocab_size != NUM_BYTES:
        raise OptionError(f"the model has {config.vocab_size} tokens; a model of bytes has {NUM_BYTES}")
    check_positions(model, length, "sequence_length")
    if getattr(config, "attn_type", "uni") != "uni" or getattr(config, "bi_data", False):
        raise OptionError("model_config: a model that reads from left to right has attn_type: uni and bi_data: false")
    # Two texts that differ in their last byte alone.
    texts = torch.arange(97, 97 + min(length, 8), device=next(model.parameters()).device).repeat(2, 1)
    texts[1, -1] = 32
    logits = try_out(model, "bytes", input_ids=texts, use_cache=False).logits  # (2, bytes of a text, 256)
    scale, rounding = logits.float().abs().max(), max(1e-4, 4 * torch.finfo(logits.dtype).eps)
    if ((logits[0] - logits[1])[:-1].abs() > rounding * scale).any():
        hint = "" if getattr(config, "is_decoder", True) else ": it needs is_decoder: true in its config"
        raise OptionError(f"{config.model_type} sees the bytes that it is to predict{hint}")


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are the bytes of the text, saved with the model for stock pipelines."""
    letters = bytes_to_unicode()  # GPT-2's table
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in letters.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, clean_up_tokenization_spaces=False
    )
