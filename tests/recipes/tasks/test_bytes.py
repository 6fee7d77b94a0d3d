"""Transformer-XL: contiguous streams, and a memory that is carried from segment to segment."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from score_bytes import stream_bits
from transformers import AutoConfig, AutoModelForCausalLM

from hf_adanorm import patch_model
from tasks.bytes import Memory, Segments, StreamPlan
from tests.recipes.tiny_configs import TINY_TRANSFORMER_XL

SIZES = {"n_layer": 2, "mem_len": 128, "vocab_size": 256}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**TINY_TRANSFORMER_XL, **SIZES}))
    patch_model(model, "adanorm")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def some_bytes(length):
    return np.random.default_rng(0).integers(256, size=length).astype(np.uint8)


@torch.no_grad()
def whole_bits(model, data):
    """The bits of every byte but the first, read at once."""
    ids = torch.from_numpy(data.astype(np.int64))[None]
    logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits[0], ids[0, 1:], reduction="none") / np.log(2)


@torch.no_grad()
def test_with_memory_a_stream_costs_what_it_costs_at_once(model):
    data = some_bytes(90)
    indices, outputs = stream_bits(model, data, length=16, num_streams=1)
    expected = [part.sum().item() for part in whole_bits(model, data).split(16)]
    assert indices == list(range(6))
    assert [characters for _, characters in outputs] == [16] * 5 + [9]
    assert [bits for bits, _ in outputs] == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_beyond_its_length_the_memory_forgets(model):
    model.config.mem_len = model.transformer.mem_len = 16
    data = some_bytes(81)
    _, outputs = stream_bits(model, data, length=16, num_streams=1)
    expected = [part.sum().item() for part in whole_bits(model, data).split(16)]
    assert [bits for bits, _ in outputs][:2] == pytest.approx(expected[:2], rel=1e-5)
    assert outputs[3][0] != pytest.approx(expected[3], rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_every_byte_is_scored_once_by_whichever_process(model, num_processes):
    data = some_bytes(150)  # 10 segments, the last of 5 bytes, in 4 streams of 3, 3, 2 and 2
    found = {}
    for rank in range(num_processes):
        share = stream_bits(model, data, length=16, num_streams=4, rank=rank, num_processes=num_processes)
        found |= dict(zip(*share, strict=True))
    assert sorted(found) == list(range(10))
    assert [found[segment][1] for segment in range(10)] == [16] * 9 + [5]
    starts, ends = [0, 48, 96, 128], [49, 97, 129, 150]
    expected = [whole_bits(model, data[start:end]).sum().item() for start, end in zip(starts, ends, strict=True)]
    sums = [sum(found[s][0] for s in segments) for segments in ([0, 1, 2], [3, 4, 5], [6, 7], [8, 9])]
    assert sums == pytest.approx(expected, rel=1e-5)


def test_the_memory_of_every_micro_batch_comes_back_with_a_checkpoint(model, tmp_path):
    accelerator = Accelerator()
    memory = Memory(accelerator, model.config)
    text = torch.from_numpy(some_bytes(64).astype(np.int64)).view(2, 2, 16)
    for number, batch in enumerate(text):
        memory.keep(number, model(input_ids=batch, **memory.inputs(number)))
    outputs = [model(input_ids=batch, **memory.inputs(number)).logits for number, batch in enumerate(text)]
    accelerator.save_state(str(tmp_path))
    memory.held = {}
    accelerator.load_state(str(tmp_path))
    again = [model(input_ids=batch, **memory.inputs(number)).logits for number, batch in enumerate(text)]
    assert all(torch.equal(left, right) for left, right in zip(outputs, again, strict=True))
    assert not torch.equal(outputs[0], model(input_ids=text[0]).logits)


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
