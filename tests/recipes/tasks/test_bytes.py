"""Bytes of text: windows, segments, contiguous streams, and a memory that is carried from segment to segment."""

import bz2
import gzip
import zipfile

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.options import OptionError
from tasks.bytes import Memory, Segments, StreamPlan, Windows, byte_tokenizer, check_reads_bytes, read_bytes
from tasks.data import DataError
from tests.recipes.tiny_configs import TINY_TRANSFORMER_XL, transformer_xl


def test_the_memory_of_every_micro_batch_comes_back_with_a_checkpoint(tmp_path):
    accelerator, model = Accelerator(), transformer_xl()
    memory = Memory(accelerator, model.config)
    text = torch.randint(256, (2, 2, 16))
    for number, batch in enumerate(text):
        memory.keep(number, model(input_ids=batch, **memory.inputs(number)))
    outputs = [model(input_ids=batch, **memory.inputs(number)).logits for number, batch in enumerate(text)]
    accelerator.save_state(str(tmp_path))
    memory.held = {}
    accelerator.load_state(str(tmp_path))
    again = [model(input_ids=batch, **memory.inputs(number)).logits for number, batch in enumerate(text)]
    torch.testing.assert_close(outputs, again)
    assert float((outputs[0] - model(input_ids=text[0]).logits).abs().max()) > 1e-4  # the memory matters


def test_no_more_is_kept_than_the_memory_and_none_that_is_not_finite():
    model = transformer_xl()
    memory = Memory(Accelerator(), model.config)
    for batch in torch.randint(256, (12, 2, 16)):
        memory.keep(0, model(input_ids=batch, **memory.inputs(0)))
    numbers = 2 * 128 * 2 * 16  # layers, bytes, streams, width
    assert sum(layer.untyped_storage().nbytes() for layer in memory.held[0]) == 4 * numbers
    memory.held[0][1][3, 1, 5] = float("nan")
    torch.testing.assert_close(model(input_ids=batch, **memory.inputs(0)).logits, model(input_ids=batch).logits)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
ROBERTA = {"model_type": "roberta", "is_decoder": True, "pad_token_id": 0, **SIZES}


def fresh(**fields):
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{"vocab_size": 256, **tokens, **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "bert", "is_decoder": True, **SIZES},
        ROBERTA,
        {"model_type": "llama", **SIZES},
        {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1},
        TINY_TRANSFORMER_XL,
    ],
)
def test_models_that_read_from_left_to_right_are_taken_and_left_as_they_were(fields):
    model = fresh(**fields)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_reads_bytes(model, 16)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_would_change_with_a_short_text_is_tried_out_as_a_copy():
    model = fresh(model_type="big_bird", is_decoder=True, **SIZES)
    check_reads_bytes(model, 16)
    assert model.bert.attention_type == "block_sparse"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "bert", **SIZES}, "bert sees the bytes that it is to predict: .* is_decoder: true"),
        ({"model_type": "electra", **SIZES}, "electra sees the bytes that it is to predict: .* is_decoder: true"),
        ({**TINY_TRANSFORMER_XL, "attn_type": "bi"}, "attn_type: uni"),
        ({**ROBERTA, "pad_token_id": None}, "roberta cannot be given bytes: TypeError: .* pad_tok"),
        ({**ROBERTA, "max_position_embeddings": 16}, "--sequence_length 16 is beyond the model's 15 positions"),
    ],
)
def test_models_that_cannot_score_bytes_are_refused(fields, said):
    with pytest.raises(OptionError, match=said):
        check_reads_bytes(fresh(**fields), 16)


def test_a_model_without_a_memory_is_given_none():
    memory = Memory(Accelerator(), AutoConfig.for_model("gpt2"))
    memory.keep(0, object())
    assert memory.inputs(0) == {"use_cache": False}


def test_every_row_of_a_step_goes_on_where_it_stopped():
    segments = Segments(np.arange(101, dtype=np.uint8), 4)  # 25 segments
    plan = StreamPlan(len(segments), 2, num_processes=2, accumulation=2)
    assert (plan.num_steps, plan.num_streams) == (3, 8)
    for rank in (0, 1):
        for before, after in zip(plan.steps(0), plan.steps(0)[1:], strict=False):
            pairs = zip(plan.micro_batches(before, rank), plan.micro_batches(after, rank), strict=True)
            for left, right in pairs:
                assert [segments[index][-1] for index in left] == [segments[index][0] for index in right]
    step = plan.steps(1)[0]
    assert sorted(i for rank in (0, 1) for batch in plan.micro_batches(step, rank) for i in batch) == sorted(step)
    assert plan.num_examples(step) == 8
    with pytest.raises(ValueError, match="7 training segments cannot fill 2 processes x 2 micro-batches of 2 streams"):
        StreamPlan(7, 2, num_processes=2, accumulation=2)


@given(size=st.integers(2, 60), length=st.integers(1, 5), stride=st.integers(1, 5))
def test_windows_score_every_byte_but_the_first_once_with_enough_context(size, length, stride):
    stride = min(stride, length)
    windows = Windows(np.arange(size, dtype=np.uint8), length, stride)
    scored = []
    for index in range(len(windows)):
        data, count = windows[index]
        assert len(data) == min(length + 1, size)
        assert 1 <= count <= length
        if index:
            assert length + 1 - count >= 1 + length - stride
        scored += data[-count:].tolist()
    assert scored == list(range(1, size))


@pytest.mark.parametrize("stride", [-1, 0, 6])
def test_a_stride_that_would_leave_bytes_out_is_refused(stride):
    with pytest.raises(OptionError, match=f"--stride must be between 1 and --sequence_length 5, got {stride}"):
        Windows(np.arange(20, dtype=np.uint8), 5, stride)


def test_segments_predict_consecutive_bytes():
    segments = Segments(np.arange(11, dtype=np.uint8), 5)
    assert [segment.tolist() for segment in (segments[0], segments[1])] == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]]
    assert (len(segments), len(Segments(np.arange(10, dtype=np.uint8), 5))) == (2, 1)


def test_compressed_files_hold_the_same_bytes(tmp_path):
    content = bytes(range(256)) * 3
    (tmp_path / "a.bz2").write_bytes(bz2.compress(content))
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", content)
    for name in ("a.bz2", "a.gz", "a.zip"):
        assert read_bytes(tmp_path / name, "train_file").tobytes() == content
    for name in ("b.bz2", "b.gz", "b.zip"):
        (tmp_path / name).write_bytes(b"no archive")
        with pytest.raises(DataError, match=rf"{name}: cannot be read"):
            read_bytes(tmp_path / name, "train_file")


def test_token_ids_are_the_bytes_and_come_back(tmp_path):
    tokenizer = byte_tokenizer(64)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for sample in ["a  b\n\tc", "größe ß 北京", "".join(map(chr, range(256)))]:
        assert loaded(sample)["input_ids"] == list(sample.encode())
        assert loaded.decode(list(sample.encode())) == sample
