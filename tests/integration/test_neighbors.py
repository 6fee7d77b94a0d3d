"""Patched models in the libraries around transformers, each test on the real package."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)

from hf_adanorm import is_patched, patch_model, unpatch_model
from tests.zoo.round_trip import CASES, ROUNDING, SWAPS, auto_class, build, difference, inputs, norms, run
from tests.zoo.tiny_text import TEXTS, make_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:the trained gains and biases:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def patched(case: str, swap: str = "adanorm") -> PreTrainedModel:
    return patch_model(build(case), **SWAPS[swap])


# ---------------------------------------------------------------------------------------------- compilation and export


@pytest.mark.parametrize("swap", ["adanorm", "detachnorm"])
def test_compiled_model_equals_eager(swap: str) -> None:
    """aot_eager traces forward and backward as the default backend does, without a C++ compiler for each kernel."""
    torch._dynamo.reset()
    model = patched("bert", swap)
    expected = run(model, inputs("bert"))
    ids = inputs("bert")["input_ids"]
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(inputs_embeds=embeddings).logits
    assert float((logits - expected["output"]).abs().max()) <= 1e-5 * float(expected["output"].abs().max())
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * weights).sum().backward()
    eager = embeddings.detach().requires_grad_()
    (model(inputs_embeds=eager).logits * weights).sum().backward()
    assert torch.allclose(embeddings.grad, eager.grad, rtol=1e-4, atol=1e-5 * float(eager.grad.abs().max()))


@pytest.mark.parametrize("swap", ["adanorm", "detachnorm"])
def test_torch_export(swap: str) -> None:
    model = patched("bert", swap)
    ids = inputs("bert")["input_ids"]
    rows = torch.export.Dim("rows", min=2, max=8)
    program = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes={"input_ids": {0: rows}})
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    again = torch.export.load(buffer).module()
    more = torch.cat([ids, ids.flip(0)])
    with torch.no_grad():
        assert torch.allclose(again(input_ids=more).logits, model(input_ids=more).logits, rtol=1e-5, atol=1e-5)


class LogitsOnly(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids).logits
        return logits


@pytest.mark.parametrize("swap", ["adanorm", "detachnorm"])
def test_onnx_export_gives_equal_outputs(swap: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = LogitsOnly(patched("bert", swap)).eval()
    ids = inputs("bert")["input_ids"]
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (ids,), path, dynamo=True, verbose=False, input_names=["input_ids"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"input_ids": ids.numpy()})
    with torch.no_grad():
        expected = model(ids)
    assert float((torch.from_numpy(got) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("swap", ["adanorm", "detachnorm"])
def test_gradient_checkpointing_gives_the_same_gradients(swap: str, reentrant: bool) -> None:
    def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        batch = inputs("bert")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(patched("bert", swap))
    model = patched("bert", swap)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(model)
    assert got.keys() == plain.keys()
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in plain.items():
        assert torch.allclose(got[name], gradient, rtol=1e-5, atol=1e-6 * largest), name


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


def test_device_map_auto(tmp_path: Path) -> None:
    model = patched("bert")
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path, device_map="auto")
    assert norms(again) == norms(model)
    assert difference(run(again, inputs("bert")), run(model, inputs("bert"))) <= ROUNDING


DISK = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "disk", "bert.encoder.layer.1": "cpu", "cls": "cpu"}


def test_patched_model_loads_with_layers_offloaded_to_disk(tmp_path: Path) -> None:
    model = patched("bert")
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "model", device_map=DISK, offload_folder=str(tmp_path / "offload")
    )
    assert again.bert.encoder.layer[0].output.dense.weight.is_meta
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
