"""Patched models in the libraries around transformers, each test on the real package."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from hf_adanorm import is_patched, patch_model, unpatch_model
from tests.zoo.round_trip import CASES, ROUNDING, SWAPS, auto_class, build, difference, inputs, norms, run
from tests.zoo.tiny_text import TEXTS, make_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:the trained gains and biases:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def patched(case: str) -> PreTrainedModel:
    return patch_model(build(case), **SWAPS["adanorm"])


def test_compiled_model_equals_eager() -> None:
    """aot_eager traces forward and backward as the default backend does, without a C++ compiler for each kernel."""
    torch._dynamo.reset()
    model, ids = patched("bert"), inputs("bert")["input_ids"]
    found = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = forward(inputs_embeds=embeddings).logits
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
        found.append((logits.detach(), embeddings.grad))
    for eager, compiled in zip(*found, strict=True):
        assert float((compiled - eager).abs().max()) <= 1e-4 * float(eager.abs().max())


@pytest.mark.parametrize("case", ["bert", "gpt2", "marian"])
def test_tied_weights_stay_tied(case: str, tmp_path: Path) -> None:
    model = patched(case)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = auto_class(CASES[case].auto_class).from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    unpatch_model(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_generation_with_a_cache_equals_generation_without(tmp_path: Path) -> None:
    patched("gpt2").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = inputs("gpt2")["input_ids"]
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, **arguments, use_cache=False))


# -------------------------------------------------------------------------------------------- devices and quantization


DISK = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "disk", "bert.encoder.layer.1": "cpu", "cls": "cpu"}


@pytest.mark.parametrize("device_map", ["auto", DISK], ids=["auto", "disk"])
def test_patched_model_loads_with_a_device_map(device_map: str | dict[str, str], tmp_path: Path) -> None:
    model = patched("bert")
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert again.bert.encoder.layer[0].output.dense.weight.is_meta == (device_map == DISK)
    assert norms(again).keys() == norms(model).keys()
    with torch.no_grad():
        assert torch.allclose(again(**inputs("bert")).logits, model(**inputs("bert")).logits, atol=ROUNDING)


def test_patch_of_a_model_with_layers_offloaded_to_disk(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path / "model")
    model = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "model", device_map=DISK, offload_folder=str(tmp_path / "offload")
    )
    patch_model(model, **SWAPS["adanorm"])
    expected = patched("bert")
    with torch.no_grad():
        assert torch.allclose(model(**inputs("bert")).logits, expected(**inputs("bert")).logits, atol=ROUNDING)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "again")
    assert difference(run(again, inputs("bert")), run(expected, inputs("bert"))) <= ROUNDING
    unpatch_model(model)
    with torch.no_grad():
        assert torch.allclose(model(**inputs("bert")).logits, build("bert")(**inputs("bert")).logits, atol=ROUNDING)


def test_accelerate_saves_and_loads_the_whole_state(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = patched("bert")
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    accelerator.save_state(str(tmp_path))
    prepared(**inputs("bert"), labels=inputs("bert")["input_ids"]).loss.backward()
    optimizer.step()
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_model_is_patched_after_loading_and_saved(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    build("bert").save_pretrained(tmp_path / "stock")
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "stock", quantization_config=config)
    stock = model(**inputs("bert")).logits
    linear = type(model.bert.encoder.layer[0].output.dense)
    assert linear.__module__.startswith("bitsandbytes")
    patch_model(model, **SWAPS["adanorm"])
    expected = model(**inputs("bert")).logits
    assert not torch.allclose(expected, stock, rtol=0.1, atol=0.1)
    model.save_pretrained(tmp_path / "patched")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "patched")
    assert type(again.bert.encoder.layer[0].output.dense) is linear
    assert norms(again) == norms(model)
    torch.testing.assert_close(again(**inputs("bert")).logits, expected)
    unpatch_model(model)
    torch.testing.assert_close(model(**inputs("bert")).logits, stock)


# ----------------------------------------------------------------------------------------------- sentence-transformers


def test_sentence_transformers_save_and_load(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    build("bert").bert.save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    # A folder of a plain model gets mean pooling on top.
    model = library.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    sentences = TEXTS[:2]
    stock = model.encode(sentences)
    assert patch_model(model, **SWAPS["adanorm"]) is model
    expected = model.encode(sentences)
    assert abs(expected - stock).max() > 1e-2
    model.save(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert is_patched(again)
    assert abs(again.encode(sentences) - expected).max() <= ROUNDING
    unpatch_model(model)
    assert abs(model.encode(sentences) - stock).max() <= ROUNDING


# -------------------------------------------------------------------------------------------------------------- others


def test_functional_call_and_vmap_over_an_ensemble() -> None:
    """torch.func stacks the tensors of several models, the one-element buffers included."""
    from torch.func import functional_call, stack_module_state

    members = [patch_model(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), C=1.3) for _ in range(3)]
    parameters, buffers = stack_module_state(members)
    skeleton = copy.deepcopy(members[0]).to("meta")
    x = torch.randn(5, 4)
    got = torch.vmap(lambda p, b: functional_call(skeleton, (p, b), (x,)))(parameters, buffers)
    expected = torch.stack([member(x) for member in members])
    assert torch.allclose(got, expected, atol=ROUNDING)


def test_exponential_moving_average_of_a_patched_model() -> None:
    model = patched("bert")
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    torch.testing.assert_close(average(**inputs("bert")).logits, model(**inputs("bert")).logits)


def test_student_and_teacher_in_one_module_stay_apart(tmp_path: Path) -> None:
    """Only the one that was patched changes, and only it saves as patched."""
    pair = nn.ModuleDict({"student": build("bert"), "teacher": build("bert")})
    patch_model(pair["student"])
    pair["student"].save_pretrained(tmp_path / "student")
    pair["teacher"].save_pretrained(tmp_path / "teacher")
    assert is_patched(AutoModel.from_pretrained(tmp_path / "student"))
    assert not is_patched(AutoModel.from_pretrained(tmp_path / "teacher"))
