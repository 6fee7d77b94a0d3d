"""patch_model, unpatch_model, inspect_model and is_patched on models in memory."""

from __future__ import annotations

import copy
import io
import pickle
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel, DebertaConfig, DebertaModel

from hf_adanorm import (
    AdaNorm,
    DetachNorm,
    LayerNormSimple,
    NoNorm,
    inspect_model,
    is_patched,
    patch_model,
    unpatch_model,
)
from tests.zoo.round_trip import CASES, SWAPS, build, difference, inputs, norms, run

pytestmark = pytest.mark.filterwarnings("ignore:the trained gains and biases:UserWarning")


def tiny(**fields: Any) -> BertForMaskedLM:
    config = CASES["bert"].config()
    for key, value in fields.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return BertForMaskedLM(config).eval()


def snapshot(model: nn.Module) -> Any:
    """Everything that a failed call must leave alone: modules, tensors, hooks, configs."""
    return (
        [
            (name, id(module), type(module), module.training, id(module._forward_hooks))
            for name, module in model.named_modules()
        ],
        {name: (id(t), t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers()) if not t.is_meta},
        [(id(m.config), m.config.to_dict()) for m in model.modules() if hasattr(m, "config")],
    )


def assert_same(before: Any, after: Any) -> None:
    assert before[0] == after[0]
    assert before[2] == after[2]
    assert before[1].keys() == after[1].keys()
    for name, (key, tensor) in before[1].items():
        assert key == after[1][name][0]
        assert torch.equal(tensor, after[1][name][1])


# -------------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize(
    ("norm", "cls"),
    {"adanorm": AdaNorm, "layernorm-simple": LayerNormSimple, "detachnorm": DetachNorm, "none": NoNorm}.items(),
)
def test_every_norm_swaps_every_layernorm_and_returns_the_model(norm: str, cls: type) -> None:
    model = tiny()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    assert patch_model(model, norm) is model
    found = {name: module for name, module in model.named_modules() if isinstance(module, cls)}
    assert list(found) == names
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert {(m.normalized_shape, m.eps) for m in found.values()} == {((32,), 1e-12)}
    assert is_patched(model)


def test_patched_model_computes_what_its_formula_says() -> None:
    """Against the same model with each LayerNorm's output computed by the paper's formula in a hook."""
    model = build("bert")
    expected = copy.deepcopy(model)

    def formula(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = args[0]
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        return 1.3 * (1 - 0.07 * y.detach()) * y

    for module in expected.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(formula)
    patch_model(model, **SWAPS["adanorm"])
    assert difference(run(model, inputs("bert")), run(expected, inputs("bert"))) < 1e-5


def test_settings_reach_every_norm() -> None:
    model = patch_model(tiny(), "adanorm", C=1.3, k=0.07, eps=1e-3)
    assert {(m.C, m.k, m.eps) for m in model.modules() if isinstance(m, AdaNorm)} == {(1.3, 0.07, 1e-3)}
    model = patch_model(tiny(), "detachnorm", detach_variance=False)
    flags = {(m.detach_mean, m.detach_variance) for m in model.modules() if isinstance(m, DetachNorm)}
    assert flags == {(True, False)}


def test_second_call_changes_only_what_it_matches() -> None:
    model = patch_model(tiny(), "adanorm", C=1.3)
    untouched = {
        name: module for name, module in model.named_modules() if isinstance(module, AdaNorm) and ".0." not in name
    }
    patch_model(model, "detachnorm", layers=[0])
    assert {name for name, m in model.named_modules() if isinstance(m, DetachNorm)} == {
        "bert.encoder.layer.0.attention.output.LayerNorm",
        "bert.encoder.layer.0.output.LayerNorm",
    }
    for name, module in untouched.items():
        assert model.get_submodule(name) is module


def test_same_call_twice_changes_nothing() -> None:
    model = patch_model(tiny(), **SWAPS["adanorm"])
    before, spec = norms(model), model.config.adanorm
    modules = [id(m) for m in model.modules()]
    patch_model(model, **SWAPS["adanorm"])
    assert [id(m) for m in model.modules()] == modules
    assert (norms(model), model.config.adanorm) == (before, spec)


def test_second_call_keeps_eps_of_the_swapped_norm_unless_told() -> None:
    model = patch_model(tiny(), "adanorm", eps=1e-3)
    patch_model(model, "layernorm-simple")
    assert {m.eps for m in model.modules() if isinstance(m, LayerNormSimple)} == {1e-3}


def test_a_call_with_another_value_changes_it() -> None:
    model = patch_model(tiny(), "adanorm", C=1.3)
    patch_model(model, "adanorm", C=1.5)
    assert {m.C for m in model.modules() if isinstance(m, AdaNorm)} == {1.5}
    assert {group["C"] for group in model.config.adanorm["groups"]} == {1.5}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(SWAPS)), st.sampled_from([0, 1, -1, None])), min_size=1, max_size=4))
def test_any_sequence_of_patches_is_undone_bit_for_bit(calls: list[tuple[str, int | None]]) -> None:
    model = build("bert")
    stock = build("bert")
    for swap, layer in calls:
        patch_model(model, **SWAPS[swap], layers=layer)
    last = {layer: swap for swap, layer in calls}
    if None in last:
        assert len(norms(model)) == 6
    unpatch_model(model)
    assert norms(model) == {}
    old, new = stock.state_dict(), model.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    assert torch.equal(model(**inputs("bert")).logits, stock(**inputs("bert")).logits)
    assert getattr(model.config, "adanorm", None) is None


# --------------------------------------------------------------------------------------------------- what carries over


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_carries_over(dtype: torch.dtype) -> None:
    model = patch_model(tiny().to(dtype))
    assert {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()} == {dtype}


def test_training_flag_carries_over() -> None:
    model = tiny().train()
    model.bert.embeddings.eval()
    patch_model(model)
    assert not model.bert.embeddings.LayerNorm.training
    assert model.bert.encoder.layer[0].output.LayerNorm.training


def test_hooks_carry_over_there_and_back_and_their_handles_work() -> None:
    model = tiny()
    seen: list[str] = []
    name = "bert.encoder.layer.1.output.LayerNorm"
    norm = model.get_submodule(name)
    handles = [
        norm.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__)),
        norm.register_forward_pre_hook(lambda m, args, kwargs: seen.append("pre"), with_kwargs=True),
        norm.register_full_backward_hook(lambda m, gin, gout: seen.append("backward")),
    ]
    patch_model(model)
    model(**inputs("bert")).logits.sum().backward()
    assert sorted(seen) == ["AdaNorm", "backward", "pre"]
    seen.clear()
    handles[0].remove()
    model(**inputs("bert"))
    assert seen == ["pre"]
    model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append("late"))
    unpatch_model(model)
    seen.clear()
    model(**inputs("bert"))
    assert seen == ["pre", "late"]


def test_meta_device() -> None:
    with torch.device("meta"):
        model = tiny()
    patch_model(model, C=1.3)
    assert len(norms(model)) == 6
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()) if t.numel() == 1)
    assert unpatch_model(model).bert.embeddings.LayerNorm.weight.is_meta


def test_device_follows_the_model_for_norms_without_tensors() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.LayerNorm(4, elementwise_affine=False))
    patch_model(model)
    assert model[1].weight.dtype == torch.bfloat16


def test_moving_a_patched_model_moves_its_norms() -> None:
    model = patch_model(tiny()).to(torch.bfloat16)
    assert model.bert.embeddings.LayerNorm.weight.dtype == torch.bfloat16
    restored = unpatch_model(model).bert.embeddings.LayerNorm
    assert restored.weight.dtype == torch.bfloat16


def test_parameters_go_and_nothing_else() -> None:
    model = tiny()
    before = {name: id(p) for name, p in model.named_parameters()}
    patch_model(model)
    after = {name: id(p) for name, p in model.named_parameters()}
    assert after == {name: key for name, key in before.items() if "LayerNorm" not in name}
    buffers = {name: tuple(b.shape) for name, b in model.named_buffers() if "LayerNorm" in name}
    assert len(buffers) == 6
    assert set(buffers.values()) == {(1,)}
    assert {name for name in model.state_dict() if "LayerNorm" in name} == set(buffers)


@pytest.mark.parametrize("norm", SWAPS)
def test_readers_of_a_norms_attributes_keep_working(norm: str) -> None:
    with torch.no_grad():
        model = patch_model(
            DebertaModel(
                DebertaConfig(
                    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9
                )
            ),
            norm,
        )
    found = model.embeddings.LayerNorm
    assert found.weight.dtype == torch.float32
    assert found.weight.device == torch.device("cpu")
    assert found.bias is None
    assert found.normalized_shape == (16,)
    assert found.eps == found.variance_epsilon == 1e-7
    assert found.elementwise_affine is False


def test_ddp_is_told_not_to_broadcast_the_buffers() -> None:
    model = tiny()
    model._ddp_params_and_buffers_to_ignore = ["bert.theirs"]
    patch_model(model)
    assert set(model._ddp_params_and_buffers_to_ignore) == {
        "bert.theirs",
        *(f"{name}.weight" for name in norms(model)),
    }
    unpatch_model(model)
    assert model._ddp_params_and_buffers_to_ignore == ["bert.theirs"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_what_ddp_is_told_follows_what_is_there(duplicate: Callable[..., Any]) -> None:
    original = patch_model(tiny())
    model = duplicate(original)
    unpatch_model(model.bert.encoder.layer[0])
    model.bert.encoder.layer[1].output.LayerNorm = nn.LayerNorm(model.config.hidden_size)
    swapped = {name for name, shown in norms(model).items() if shown.startswith("AdaNorm")}
    assert len(swapped) == len(norms(original)) - 3
    assert set(model._ddp_params_and_buffers_to_ignore) == {f"{name}.weight" for name in swapped}
    assert set(original._ddp_params_and_buffers_to_ignore) == {f"{name}.weight" for name in norms(original)}


# ------------------------------------------------------------------------------------------------- siblings and copies


def test_models_from_one_config_object_do_not_share_a_patch() -> None:
    config = CASES["bert"].config()
    one, other = BertForMaskedLM(config), BertForMaskedLM(config)
    patch_model(one)
    assert not is_patched(other)
    assert getattr(other.config, "adanorm", None) is None
    assert getattr(config, "adanorm", None) is None
    assert not is_patched(BertForMaskedLM(config))
    assert one.config is one.bert.config
    assert one.config is not other.config


def test_a_deep_copy_is_independent_and_can_be_unpatched() -> None:
    stock = build("bert")
    model = patch_model(build("bert"), **SWAPS["adanorm"])
    twin = copy.deepcopy(model)
    unpatch_model(twin)
    assert is_patched(model)
    assert not is_patched(twin)
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), twin.state_dict().values(), strict=True))
    unpatch_model(model)
    assert all(
        torch.equal(a, b) for a, b in zip(stock.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_teacher_made_by_deepcopy_before_the_patch_stays_stock() -> None:
    model = build("bert")
    teacher = copy.deepcopy(model)
    patch_model(model)
    assert not is_patched(teacher)
    assert getattr(teacher.config, "adanorm", None) is None


def test_shared_norm_instance_stays_shared() -> None:
    norm = nn.LayerNorm(4)
    model = nn.ModuleDict({"a": nn.Sequential(norm), "b": nn.Sequential(nn.Linear(4, 4), norm)})
    patch_model(model)
    assert isinstance(model["a"][0], AdaNorm)
    assert model["a"][0] is model["b"][1]
    unpatch_model(model)
    assert model["a"][0] is model["b"][1] is norm


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickle_and_torch_save(how: str) -> None:
    model = patch_model(build("bert"), **SWAPS["adanorm"])
    buffer = io.BytesIO()
    if how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    assert norms(again) == norms(model)
    assert torch.equal(again(**inputs("bert")).logits, model(**inputs("bert")).logits)
    with pytest.warns(UserWarning, match="6 of 6 norms.*gain 1 and bias 0"):
        unpatch_model(again)
    assert torch.equal(again.bert.embeddings.LayerNorm.weight, torch.ones(32))
    assert torch.equal(again.bert.embeddings.LayerNorm.bias, torch.zeros(32))


def test_pickle_holds_no_tensors_of_the_replaced_norms() -> None:
    model = nn.Sequential(nn.LayerNorm(100_000))
    assert len(pickle.dumps(patch_model(model))) < 20_000


def test_pickling_leaves_the_model_ready_to_be_unpatched() -> None:
    model = patch_model(build("bert"))
    pickle.dumps(model)
    unpatch_model(model)
    assert torch.equal(model.bert.embeddings.LayerNorm.weight, build("bert").bert.embeddings.LayerNorm.weight)


# ---------------------------------------------------------------------------------------------------------- unpatching


def test_unpatch_gives_back_the_very_modules_and_tensors() -> None:
    model = tiny()
    before = snapshot(model)
    patch_model(model)
    unpatch_model(model)
    after = snapshot(model)
    assert before[0] == after[0]
    assert {name: key for name, (key, _) in before[1].items()} == {name: key for name, (key, _) in after[1].items()}
    assert [config for _, config in before[2]] == [config for _, config in after[2]]


def test_unpatch_after_reload_warns_once_and_gives_gain_1_bias_0(tmp_path: Any) -> None:
    patch_model(build("bert"), eps=1e-3).save_pretrained(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="gain 1 and bias 0") as caught:
        unpatch_model(model)
    assert len(caught) == 1
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones(32))
            assert torch.equal(module.bias, torch.zeros(32))
            assert module.weight.requires_grad
    assert torch.isfinite(model(**inputs("bert")).logits).all()


def test_unpatch_of_a_stock_model_raises() -> None:
    with pytest.raises(ValueError, match="no swapped norm"):
        unpatch_model(tiny())


def test_training_in_between_leaves_the_kept_gains_alone() -> None:
    model, stock = build("bert").train(), build("bert")
    patch_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(**inputs("bert"), labels=inputs("bert")["input_ids"]).loss.backward()
    optimizer.step()
    unpatch_model(model)
    for name, module in stock.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert torch.equal(model.get_submodule(name).weight, module.weight)


# ------------------------------------------------------------------------------------------------------ all or nothing


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class DeepSpeedEngine(Wrapper):
    """Has the class name that DeepSpeed's engine has, and like it holds the model as `module`."""


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def with_compiled_layer(model: Any) -> nn.Module:
    model.bert.encoder.layer[0].compile()
    return model


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (nn.DataParallel, "DataParallel"),
        (DeepSpeedEngine, "DeepSpeedEngine"),
        (compiled, "OptimizedModule"),
        (compiled_in_place, "torch.compile"),
        (with_compiled_layer, "torch.compile"),
    ],
)
@pytest.mark.parametrize("call", [patch_model, unpatch_model])
def test_wrapped_models_are_refused(call: Callable[..., Any], wrap: Callable[..., nn.Module], named: str) -> None:
    model = tiny() if call is patch_model else patch_model(tiny())
    wrapped = wrap(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{named}.*before"):
        call(wrapped)
    assert_same(before, snapshot(model))


@pytest.fixture
def one_process_group(tmp_path: Any) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_ddp_and_fsdp2_models_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny()
    with pytest.raises(ValueError, match=r"DistributedDataParallel.*before"):
        patch_model(nn.parallel.DistributedDataParallel(model))
    assert not is_patched(model)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    with pytest.raises(ValueError, match=r"FSDP.*before"):
        patch_model(model)
    assert not is_patched(model)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"C": 0.0}, ValueError, "C must be"),
        ({"C": float("nan")}, ValueError, "C must be"),
        ({"C": "1"}, TypeError, "C must be"),
        ({"k": -0.1}, ValueError, "k must be"),
        ({"eps": -1e-5}, ValueError, "eps must be"),
        ({"norm": "rmsnorm"}, ValueError, "norm must be one of"),
        ({"norm": 3}, TypeError, "norm must be one of"),
        ({"norm": "detachnorm", "detach_mean": False, "detach_variance": False}, ValueError, "detach_mean=False"),
        ({"detach_mean": 1}, TypeError, "detach_mean"),
        ({"centered": "no"}, TypeError, "centered"),
        ({"include": "nothing"}, ValueError, "include"),
        ({"exclude": ["nothing"]}, ValueError, "exclude"),
        ({"layers": [7]}, ValueError, "layers"),
        ({"targets": "rmsnorm"}, ValueError, "no norm to swap"),
    ],
)
@pytest.mark.parametrize("already", [False, True])
def test_failing_call_leaves_the_model_as_it_was(
    options: dict[str, Any], error: type[Exception], says: str, already: bool
) -> None:
    model = patch_model(tiny(), "adanorm", layers=[0]) if already else tiny()
    before = snapshot(model)
    with pytest.raises(error, match=says):
        patch_model(model, **options)
    assert_same(before, snapshot(model))


def test_not_a_module_raises() -> None:
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got dict"):  # noqa: RUF043
        patch_model({})  # type: ignore[type-var]


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def test_parametrized_norm_is_refused_before_anything_moved() -> None:
    model = tiny()
    parametrize.register_parametrization(model.bert.encoder.layer[1].output.LayerNorm, "weight", Half())
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"layer\.1\.output\.LayerNorm is under torch\.nn\.utils\.parametrize.*exclude"
    ):
        patch_model(model)
    assert_same(before, snapshot(model))
    patch_model(model, exclude=["layer.1.output.LayerNorm"])
    assert len(norms(model)) == 5


def test_weight_normed_norm_is_left_alone_with_a_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4))
    parametrize.register_parametrization(model[2], "weight", Half())
    parametrize.remove_parametrizations(model[2], "weight", leave_parametrized=True)
    patch_model(model)
    assert set(norms(model)) == {"1", "2"}


# ---------------------------------------------------------------------------------------------------- plain nn.Modules


def test_plain_module_is_patched_and_its_state_dict_restores_it() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))

    model = patch_model(make(), C=1.3)
    again = patch_model(make(), C=1.3)
    again.load_state_dict(model.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(model(x), again(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        make().load_state_dict(model.state_dict(), strict=False)


def test_a_model_that_is_a_norm_itself_raises() -> None:
    with pytest.raises(ValueError, match="is the norm itself"):
        patch_model(nn.LayerNorm(4))


@pytest.mark.parametrize("norm", SWAPS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_fast_path_of_torchs_encoder_gives_what_the_slow_one_gives(norm: str, norm_first: bool) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that norm_first rules nested tensors out
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
        model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16))
    patch_model(model, **SWAPS[norm])
    x, mask = torch.randn(3, 5, 16), torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 2 + [True] * 3])
    slow = model.train()(x, src_key_padding_mask=mask)
    model.eval()
    with torch.no_grad():  # what may take the fused path
        fast = model(x, src_key_padding_mask=mask)
    assert torch.allclose(fast[~mask], slow[~mask], atol=1e-5)


def test_unpatched_encoder_may_take_the_fast_path_again() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    flags = [(m.activation_relu_or_gelu) for m in model.layers], model.use_nested_tensor
    unpatch_model(patch_model(model))
    assert ([(m.activation_relu_or_gelu) for m in model.layers], model.use_nested_tensor) == flags


# ------------------------------------------------------------------------------------------------------------ warnings


def test_dropping_trained_gains_warns_with_their_number_and_the_alternatives() -> None:
    with pytest.warns(UserWarning, match=r'of 6 norms are dropped.*affine="fold".*calibrate_k') as caught:
        patch_model(build("bert"))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_trained_bias_alone_counts() -> None:
    model = tiny()
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias[3] = 1e-3
    with pytest.warns(UserWarning, match="of 1 norm are dropped"):
        patch_model(model)


def test_fresh_model_patches_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(tiny())


def test_patching_again_does_not_warn_of_gains_that_are_gone() -> None:
    model = patch_model(build("bert"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(model, "detachnorm")


def test_inspecting_changes_nothing() -> None:
    model = tiny()
    before = snapshot(model)
    inspect_model(model)
    assert_same(before, snapshot(model))


# --------------------------------------------------------------------------------------------------------------- speed


def test_patching_bert_large_takes_well_under_a_second() -> None:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        model = BertModel(BertConfig(**sizes))
    for module in model.modules():  # real norms, the rest would only take time to make
        if isinstance(module, nn.LayerNorm):
            module.to_empty(device="cpu").reset_parameters()
    start = time.perf_counter()
    patch_model(model)
    seconds = time.perf_counter() - start
    print(f"patching the {len(norms(model))} norms of BERT-large: {seconds * 1000:.0f} ms")
    assert len(norms(model)) == 49
    assert seconds < 5
