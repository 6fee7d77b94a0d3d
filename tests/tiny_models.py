"""Tiny random models of any model type in transformers, with inputs their forward accepts.

`attempts(model_type)` yields ways to shrink the default config, most drastic first: every width the same, or every
width divided by a factor (which keeps ratios and divisibility), or only fewer layers. What cannot be guessed from
the names of a config's fields stands in OVERRIDES. `build` draws weights, gains and biases that are far from the
trivial ones (so that a lost gain or a lost norm shows in the output), `inputs` makes the forward's arguments.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCAB = 160
LENGTH = 7

# The order in which a type's class is looked for; the bare model first.
_MAPPINGS = [
    "MODEL",
    "MODEL_FOR_PRETRAINING",
    "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
]
_MAPPINGS += [
    name.removesuffix("_MAPPING_NAMES")
    for name in sorted(vars(modeling_auto))
    if name.endswith("_MAPPING_NAMES") and name.removesuffix("_MAPPING_NAMES") not in _MAPPINGS
]


class Unsupported(Exception):
    """The type has no model of its own to build; the message says why."""


def model_types() -> list[str]:
    return sorted(CONFIG_MAPPING.keys())


# --- which class -----------------------------------------------------------------------------------------------------


def model_classes(model_type: str, config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """Classes that build this type, the preferred one first."""
    import transformers

    names: list[str] = []
    for mapping in _MAPPINGS:
        value = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").get(model_type)
        if value is not None:
            names += [value] if isinstance(value, str) else list(value)
    found = [getattr(transformers, name, None) for name in dict.fromkeys(names)]
    classes = [cls for cls in found if isinstance(cls, type) and issubclass(cls, PreTrainedModel)]
    classes += [cls for cls in _classes_of_config(config) if cls not in classes]
    return classes


def _classes_of_config(config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """Model classes next to the config's own file that name it as their config_class."""
    import importlib

    package = type(config).__module__.rpartition(".")[0]
    name = type(config).__module__.rpartition(".")[2].replace("configuration_", "modeling_")
    try:
        module = importlib.import_module(f"{package}.{name}")
    except ImportError:
        return []
    return [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == module.__name__
        and getattr(cls, "config_class", None) is type(config)
        and cls.forward is not nn.Module.forward
        and "PreTrained" not in cls.__name__
    ]


# --- shrinking a config ----------------------------------------------------------------------------------------------

_LAYERS = re.compile(
    r"^(n_layers?|depth|num_layers|num_blocks|encoder_layers|decoder_layers|layers|.*num_hidden_layers.*|num_\w*_layers"
    r"|\w+_num_layers|\w+_depth|num_encoder_blocks_?|encoder_num_layers|num_block_records)$"
)
_KEEP_LAYERS = re.compile(r"feat_extract|adapter_layers|num_kv_shared|conv_layers|feature_layer|multi_level|iou_head")
_HEADS = re.compile(r"^(n_heads?|num_heads|attention_heads|\w*attention_heads|num_\w*_heads|\w+_heads|\w+_n_heads)$")
_WIDTH = re.compile(
    r"hidden|dim|embd|embed|width|channel|d_model|d_ff|d_kv|ffn|inner|feature_size|filters|rank|planes"
)
_ALSO_WIDTH = re.compile(
    r"^(intermediate_size|\w*intermediate_size\w*|projection_size|pooler_output_size|output_size|embedding_size"
    r"|conv_\w*dim|mlp_size|memory_size|feed_forward_size|bottleneck\w*|decoder_size|\w*ffn_size|state_size)$"
)
_NOT_WIDTH = re.compile(
    r"vocab|num_hidden|max_|kernel|stride|layer|pos_embed|num_embed|token|image_size|patch_size|act$|_dims?_index|"
    r"num_channels|in_channels$|in_chans|out_channels$|audio_channels|position|dropout|groups|lookahead|expan|ratio|"
    r"codebook_size|num_codevec|rel_|embeddings$|num_positional|hidden_act|channel_multiplier|group_size|freq|window"
)
_EXPERTS = {"n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "n_group": 1,
            "topk_group": 1, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "num_zero_experts": 2,
            "n_shared_experts": 1, "zero_expert_num": 2, "top_k_experts": 2, "num_selected_experts": 2,
            "moe_num_shared_experts": 1}  # fmt: skip
_CAPS = {"max_position_embeddings": 128, "n_positions": 128, "max_source_positions": 64, "max_target_positions": 64,
         "n_ctx": 128, "block_size": 64, "codebook_size": 64, "num_queries": 12, "num_query_tokens": 4,
         "entity_vocab_size": 60, "max_text_len": 16, "two_stage_num_proposals": 12, "num_denoising": 4,
         "train_num_points": 16, "max_2d_position_embeddings": 64, "num_latents": 6, "d_latents": 32, "num_codevectors_per_group": 8,
         "index_topk": 4, "max_seq_len": 128, "context_length": 32, "image_seq_length": 16, "num_labels": 3,
         "shape_vocab_size": 40, "pronunciation_vocab_size": 40}  # fmt: skip


_STAGES = ("depths", "hidden_sizes", "embed_dims", "stage_dims")


def _sub_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield value


def _whole(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The config and all configs in it, inner ones first."""
    inner = [c for sub in _sub_configs(config) for c in _whole(sub)]
    return [*inner, config]


def _set(config: PreTrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a read-only or validated field: it stays as it is
        pass


def shrink(config: PreTrainedConfig, width: int | None, factor: int | None, layers: int = 2) -> None:
    """Make `config` small in place: widths all equal to `width`, or all divided by `factor`."""
    for part in _whole(config):
        _shrink_part(part, width, factor, layers)
        _fit_rope(part)


def _width(name: str, value: int, width: int | None, factor: int | None) -> int:
    if value < 24:
        return value
    if width is not None:
        if name in ("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "attention_head_dim"):
            return width // 4
        if name == "qk_head_dim":
            return width // 2
        if "head_dim" in name:
            return width // 4
        return width
    if factor is not None:
        return max(1, value // factor) if value % factor == 0 else max(2, round(value / factor))
    return value


def _shrink_part(config: PreTrainedConfig, width: int | None, factor: int | None, layers: int) -> None:
    old = dict(vars(config))
    depth = next(
        (old[k] for k in ("num_hidden_layers", "n_layer", "num_layers", "depth") if isinstance(old.get(k), int)), None
    )
    if any(isinstance(old.get(k), (list, tuple)) and len(old[k]) == depth for k in _STAGES):
        depth = None  # it counts stages: lists of that length must keep it
    wanted = old.get("_out_indices") or ()
    if "stage_names" in old and depth is not None:
        layers = max(layers, len(wanted))  # a backbone that hands out several layers needs that many
    special: dict[str, int] = {}
    next_id = 0
    for name, value in old.items():
        if name.startswith("_") or isinstance(value, (bool, str, PreTrainedConfig)) or value is None:
            continue
        if re.search(r"(token_ids?|token_index|token_id_\w+|_idx)$", name) and isinstance(value, int):
            if value >= 100:
                special[name] = value
            continue
        if isinstance(value, int):
            _set(config, name, _shrink_int(name, value, width, factor, layers, old))
        elif isinstance(value, (list, tuple)) and value:
            _set(config, name, _shrink_list(name, value, width, factor, layers, depth))
    for name in special:  # ids of special tokens move below the vocabulary's new end, all different
        _set(config, name, VOCAB - 10 - next_id)
        next_id += 1
    if "stage_names" in old and depth is not None:
        names = list(old["stage_names"])[: layers + 1]
        count = max(1, len(wanted))
        config.stage_names = names
        config._out_features, config._out_indices = names[-count:], list(range(len(names)))[-count:]
    if isinstance(old.get("eos_token_id"), (list, tuple)):
        _set(config, "eos_token_id", 2)


def _shrink_int(name: str, value: int, width: int | None, factor: int | None, layers: int, old: dict[str, Any]) -> int:
    if name in _EXPERTS:
        return min(value, _EXPERTS[name])
    if name in _CAPS:
        return min(value, _CAPS[name])
    if re.fullmatch(r"(\w+_)?vocab_size\w*|vocabulary_size|n_tokens", name):
        return min(value, VOCAB)
    if _LAYERS.match(name) and not _KEEP_LAYERS.search(name):
        stages = [old[k] for k in _STAGES if isinstance(old.get(k), (list, tuple))]
        return value if any(len(stage) == value for stage in stages) else min(value, layers)
    if name == "first_k_dense_replace":
        return min(value, 1)
    if _HEADS.match(name):
        if width is None:
            return value
        if name == "num_key_value_heads" and value == old.get("num_attention_heads"):
            return min(value, 4)
        return min(value, 2 if "key_value" in name or "kv" in name else 4)
    if name == "image_size":
        return _image_size(value, old)
    if name == "image_embedding_size":
        return 4
    if name == "num_kv_shared_layers":
        return 0
    if name == "upsample_groups":
        return _width(name, value, width, factor)
    if name == "window_size" and "depths" in old:
        return 2  # windows must tile every stage of the smaller image
    if (_WIDTH.search(name) or _ALSO_WIDTH.match(name)) and not _NOT_WIDTH.search(name):
        return _width(name, value, width, factor)
    return value


def _image_size(value: int, old: dict[str, Any]) -> int:
    patch = old.get("patch_size")
    if isinstance(patch, int) and patch > 4:
        return min(value, 4 * patch)
    return min(value, 64)


def _shrink_list(name: str, value: Any, width: int | None, factor: int | None, layers: int, depth: int | None) -> Any:
    kind = type(value)
    if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        if name in ("depths", "layers", "num_blocks", "layer_depths", "stage_num_blocks"):
            return kind(min(v, 1) for v in value)
        if name == "image_size":
            return kind(min(v, 64) for v in value)
        if depth is not None and len(value) == depth and depth > layers:
            value = value[:layers]
        if _HEADS.match(name):
            return kind(min(v, 2) for v in value) if width is not None else kind(value)
        if (_WIDTH.search(name) or _ALSO_WIDTH.match(name)) and not _NOT_WIDTH.search(name):
            return kind(_width(name, v, width, factor) for v in value)
        if re.search(r"index|layer|out_features|out_indices", name) and depth is not None and max(value) >= layers:
            return kind(dict.fromkeys(min(v, layers - 1) for v in value))
        return kind(value)
    if depth is not None and len(value) == depth and depth > layers:
        kinds = list(dict.fromkeys(map(str, value)))
        if len(kinds) > 1:  # keep one layer of each kind, as far as they go
            firsts = [next(v for v in value if str(v) == k) for k in kinds[:layers]]
            return kind(firsts + list(value[len(firsts) : layers]))
        return kind(value[:layers])
    return value


def _fit_rope(config: PreTrainedConfig) -> None:
    """Where the model's code reads an `mrope_section`, make it add up to half the rotated part of a head."""
    rope, heads, hidden = (_get(config, name) for name in ("rope_parameters", "num_attention_heads", "hidden_size"))
    if not isinstance(rope, dict) or not isinstance(heads, int) or not isinstance(hidden, int):
        return
    head_dim = _get(config, "head_dim") or hidden // heads
    if not isinstance(head_dim, int):
        return
    for part in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        for key in ("mrope_section", "xdrope_section"):
            if key in part or (key in _source(type(config)) and part is rope):
                count = len(part.get(key) or (0, 0, 0))
                half = int(head_dim * part.get("partial_rotary_factor", 1.0)) // 2
                part[key] = [half // count + (1 if i < half % count else 0) for i in range(count)]


@functools.cache
def _source(config_class: type) -> str:
    """Text of the model file that stands next to the config's."""
    path = Path(inspect.getfile(config_class))
    model_file = path.with_name(path.name.replace("configuration_", "modeling_"))
    return model_file.read_text() if model_file.exists() else ""


# --- what names do not tell ------------------------------------------------------------------------------------------

_SERIES = {"prediction_length": 4, "context_length": 12}
_RESNET = {"use_timm_backbone": False, "use_pretrained_backbone": False}
_HIERA = {
    "vision_config.backbone_config.window_size_per_stage": [2, 2, 2, 1],
    "vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "time_series_transformer": _SERIES,
    "informer": _SERIES,
    "autoformer": _SERIES,
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3},
    "align": {"vision_config.width_coefficient": 0.25, "vision_config.depth_coefficient": 0.3},
    "align_vision_model": {"width_coefficient": 0.25, "depth_coefficient": 0.3},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "seggpt": {"image_size": [64, 32], "patch_size": 8, "pretrain_image_size": 32},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "oneformer": {"task_seq_len": LENGTH, "max_seq_len": LENGTH},
    "vitmatte": {"convstream_hidden_sizes": [8, 16, 32], "fusion_hidden_sizes": [32, 32, 32, 32]},
    "chameleon": {"vocabulary_map": {"<image>": VOCAB - 1, "IMGIMGA": 5}},
    "emu3": {"vocabulary_map": {"<image>": VOCAB - 1, "<|extra_200|>": 4, "<|visual token 0|>": 5}},
    "sam2": _HIERA,
    "sam2_vision_model": {k.removeprefix("vision_config."): v for k, v in _HIERA.items() if k.startswith("vision_")},
    "sam2_hiera_det_model": {"window_size_per_stage": [2, 2, 2, 1]},
    "blip-2": {"image_token_index": VOCAB - 1},
    "instructblip": {"image_token_index": VOCAB - 1},
    "instructblipvideo": {"video_token_index": VOCAB - 1},
    "dbrx": {
        "attn_config.rope_theta": 10000.0,
        "ffn_config.ffn_hidden_size": 32,
        "attn_config.kv_n_heads": 2,
        "attn_config.clip_qkv": 8.0,
    },
    "depth_pro": {
        "patch_size": 32,
        "image_model_config.image_size": 32,
        "fov_model_config.image_size": 32,
        "patch_model_config.image_size": 32,
        "image_model_config.patch_size": 8,
        "fov_model_config.patch_size": 8,
        "patch_model_config.patch_size": 8,
    },
    "videomae": {"num_frames": 4},
    "vivit": {"num_frames": 4, "image_size": 32},
}
"""Fields to set after shrinking, by type; dotted names reach into sub-configs."""

COMPOSED: dict[str, Callable[[], PreTrainedConfig]] = {}
"""Types whose config needs others to be built from."""


def _tiny(model_type: str, **fields: Any) -> PreTrainedConfig:
    config = CONFIG_MAPPING[model_type]()
    shrink(config, width=32, factor=None)
    for name, value in {**OVERRIDES.get(model_type, {}), **fields}.items():
        _assign(config, name, value)
    return config


def _assign(config: Any, name: str, value: Any) -> None:
    *path, last = name.split(".")
    for key in path:
        config = getattr(config, key) if not isinstance(config, dict) else config[key]
    if isinstance(config, dict):
        config[last] = value
    else:
        setattr(config, last, value)


def _encoder_decoder(model_type: str, encoder: str, decoder: str = "bert") -> Callable[[], PreTrainedConfig]:
    def make() -> PreTrainedConfig:
        inner = _tiny(decoder, is_decoder=True, add_cross_attention=True)
        config = type(CONFIG_MAPPING[encoder]()) and CONFIG_MAPPING[model_type].from_encoder_decoder_configs(
            _tiny(encoder), inner
        )
        config.pad_token_id, config.decoder_start_token_id = 0, 1
        return config

    return make


COMPOSED["encoder-decoder"] = _encoder_decoder("encoder-decoder", "bert")
COMPOSED["vision-encoder-decoder"] = _encoder_decoder("vision-encoder-decoder", "vit")
COMPOSED["speech-encoder-decoder"] = _encoder_decoder("speech-encoder-decoder", "wav2vec2")
COMPOSED["vision-text-dual-encoder"] = lambda: CONFIG_MAPPING["vision-text-dual-encoder"].from_vision_text_configs(
    _tiny("vit"), _tiny("bert"), projection_dim=32
)
COMPOSED["musicgen"] = lambda: CONFIG_MAPPING["musicgen"](
    text_encoder=_tiny("t5").to_dict(),
    audio_encoder=_tiny("encodec").to_dict(),
    decoder=_tiny("musicgen_decoder").to_dict(),
)
COMPOSED["musicgen_melody"] = lambda: CONFIG_MAPPING["musicgen_melody"](
    text_encoder=_tiny("t5").to_dict(), audio_encoder=_tiny("encodec").to_dict(),
    decoder=_tiny("musicgen_melody_decoder").to_dict(),
)  # fmt: skip
COMPOSED["rag"] = lambda: CONFIG_MAPPING["rag"].from_question_encoder_generator_configs(_tiny("dpr"), _tiny("bart"))


def configs(model_type: str) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Ways to a tiny config, each with the name of the way."""
    if model_type in COMPOSED:
        yield "composed", COMPOSED[model_type]()
        return
    ways: dict[str, tuple[int | None, int | None, bool]] = {
        "width 32": (32, None, False),
        "width 32, unset fields filled": (32, None, True),
        "width 64": (64, None, False),
        "widths / 8": (None, 8, False),
        "widths / 4": (None, 4, False),
        "fewer layers": (None, None, False),
    }
    for way, (width, factor, fill) in ways.items():
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception as error:
            raise Unsupported(f"its config has no defaults: {type(error).__name__}: {str(error)[:150]}") from error
        shrink(config, width, factor)
        if fill:
            for part in _whole(config):
                _fill(part)
        for name, value in OVERRIDES.get(model_type, {}).items():
            _assign(config, name, value)
        yield way, config


_FILL = {"vocab_size": VOCAB, "num_experts_per_tok": 2, "n_routed_experts": 4, "num_experts": 4, "top_k_experts": 2,
         "n_shared_experts": 1, "topk_group": 1, "n_group": 1, "moe_intermediate_size": 32, "sliding_window": 8,
         "initializer_range": 0.02, "dropout_rate": 0.0, "dropout": 0.0, "shared_expert_intermediate_size": 32,
         "moe_layer_freq": 1, "pad_token_id": 0, "prediction_length": 4}  # fmt: skip


def _get(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception as error:  # fields that differ by layer refuse to be read
        return error


def _fill(config: PreTrainedConfig) -> None:
    """Give values to fields that default configs leave at None (or do not have) though the model cannot do without."""
    for name, value in _FILL.items():
        if _get(config, name) is None:
            _set(config, name, value)
    heads, hidden = _get(config, "num_attention_heads"), _get(config, "hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int):
        for name, number in (("num_key_value_heads", heads), ("head_dim", hidden // heads)):
            if _get(config, name) is None:
                _set(config, name, number)
    depth = _get(config, "num_hidden_layers")
    if isinstance(depth, int):
        for name, kind in (("layer_types", "full_attention"), ("mlp_layer_types", "sparse")):
            if hasattr(type(config), name) and _get(config, name) is None:
                _set(config, name, [kind] * depth)
    rope = _get(config, "rope_parameters")
    if rope is None or (isinstance(rope, dict) and rope.get("rope_theta", 0) is None):
        _set(config, "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})


# --- weights ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights large enough to matter, gains in 0.5 .. 1.5 (minus the offset where 1 + w is applied), biases in +-0.5."""
    from hf_adanorm.detection import iter_norms

    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(like.shape, generator=generator) * (high - low) + low).to(like)

    done = set()
    for _, module, info in iter_norms(model):
        own = dict(module.named_parameters(recurse=False))
        for key, parameter in own.items():
            if info.kind == "other" and parameter.ndim > 2:
                continue
            low = -0.5 if "bias" in key or key == info.bias_name or info.gain_offset else 0.5
            parameter.copy_(uniform(parameter, low, low + 1))
            done.add(id(parameter))
    for parameter in model.parameters():
        if id(parameter) in done or not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        if not bool(torch.isfinite(parameter).all()):  # some classes leave parameters uninitialised
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        if parameter.ndim >= 2:
            fan_in = math.prod(parameter.shape[1:])
            parameter += (torch.randn(parameter.shape, generator=generator) * 0.5 / math.sqrt(fan_in)).to(parameter)
        elif bool((parameter == parameter.flatten()[0]).all()) and float(parameter.abs().max()) < 1e-2:
            parameter.copy_(uniform(parameter, 0.1, 0.4))  # layer scales of 1e-6 would hide everything behind them


def build(cls: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode, eager attention, float32, with random state drawn from `seed`."""
    torch.manual_seed(seed)
    model = cls._from_config(config, attn_implementation="eager", dtype=torch.float32)
    model = model.float().eval()
    randomise(model, seed)
    return model


def num_parameters(cls: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        model = cls._from_config(copy.deepcopy(config), attn_implementation="eager")
    return sum(p.numel() for p in model.parameters())


# --- inputs ----------------------------------------------------------------------------------------------------------


def _first(config: Any, *names: str, default: Any = None, within: str = "") -> Any:
    """The first of `names` that the config or any config in it has, parts whose field matches `within` first."""
    parts: list[Any] = []

    def collect(c: Any, near: bool) -> None:
        parts.append((0 if near else 1, len(parts), c))
        for key, value in vars(c).items():
            if isinstance(value, PreTrainedConfig):
                collect(value, near or bool(within and re.search(within, key)))

    collect(config, not within)
    for _, _, part in sorted(parts, key=lambda p: p[:2]):
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


class _Maker:
    """Makes inputs by the names of forward's arguments."""

    def __init__(self, model: PreTrainedModel, rows: int = 2, seed: int = 0) -> None:
        self.model, self.config, self.rows = model, model.config, rows
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = inspect.signature(model.forward).parameters

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def ids(self, length: int = LENGTH, vocab: int | None = None) -> Tensor:
        vocab = vocab or int(_first(self.config, "vocab_size", within="text|llm|decoder", default=VOCAB))
        high = max(4, min(vocab, VOCAB) - 32)  # the end of the vocabulary is for special tokens
        return torch.randint(3, high, (self.rows, length), generator=self.generator)

    def image_shape(self) -> tuple[int, int, int]:
        size = _first(
            self.config, "image_size", "img_size", "input_size", "crop_size", within="vision|image|vit", default=64
        )
        if isinstance(size, dict):
            size = (size.get("height", 64), size.get("width", 64))
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        channels = _first(
            self.config,
            "num_channels",
            "in_channels",
            "in_chans",
            "image_channels",
            within="vision|image|vit",
            default=3,
        )
        return int(channels) if isinstance(channels, int) else 3, int(height), int(width)

    def make(self, name: str) -> Any:
        """A value for the argument `name`, None if its name says nothing."""
        config = self.config
        if name == "inputs" and _first(config, "conv_kernel", default=None):
            return self.sound()
        if "musicgen" in config.model_type and name in ("input_ids", "decoder_input_ids"):
            books = int(_first(config, "num_codebooks", default=4))
            is_text = name == "input_ids" and config.model_type in ("musicgen", "musicgen_melody")
            return self.ids() if is_text else self.ids().repeat(books, 1)
        if name in ("input_ids", "decoder_input_ids", "text_input_ids", "inputs"):
            return self.ids()
        if name == "merge_sizes":
            return torch.full((self.rows,), 2)
        if name == "pixel_values":
            return self.floats(self.rows, *self.image_shape())
        if name in ("pixel_values_videos", "videos", "video_values"):
            frames = int(_first(config, "num_frames", "frames_per_clip", default=2))
            channels, height, width = self.image_shape()
            return self.floats(self.rows, frames, channels, height, width)
        if name in ("attention_mask", "pixel_mask", "bool_masked_pos", "labels"):
            return None
        if name in ("input_values", "audio_values", "audio", "waveform"):
            return self.sound()
        if name in ("input_features", "audio_features", "audio_input_features", "spectrogram"):
            return self.features()
        if name in ("bbox",):
            box = torch.randint(0, 20, (self.rows, LENGTH, 4), generator=self.generator).sort(-1).values
            return box[..., [0, 1, 2, 3]]
        if name in (
            "hidden_states",
            "inputs_embeds",
            "encoder_hidden_states",
            "query_embeds",
            "features",
            "hidden_state",
        ):
            width = _first(config, "hidden_size", "d_model", "embed_dim", "dim", default=32)
            width = width if isinstance(width, int) else int(width[0])
            return self.floats(self.rows, LENGTH, width)
        if name == "past_values":
            length = int(_first(config, "context_length", default=16))
            lags = _first(config, "lags_sequence", default=None)
            length += max(lags) if lags else 0
            channels = int(_first(config, "num_input_channels", "input_size", default=1))
            return (
                self.floats(self.rows, length, channels)
                if channels > 1 or not lags
                else self.floats(self.rows, length)
            )
        if name in ("past_time_features", "future_time_features", "past_observed_mask", "future_values"):
            length = int(_first(config, "context_length", default=16))
            lags = _first(config, "lags_sequence", default=None)
            past = length + (max(lags) if lags else 0)
            steps = past if name.startswith("past") else int(_first(config, "prediction_length", default=4) or 4)
            features = int(_first(config, "num_time_features", default=0))
            return (
                torch.ones(self.rows, past)
                if name.endswith("mask")
                else (
                    self.floats(self.rows, steps)
                    if name == "future_values"
                    else self.floats(self.rows, steps, features)
                )
            )
        if name in ("grid_thw", "image_grid_thw"):
            return torch.tensor([[1, 4, 4]] * self.rows)
        if name in ("image_grid_hws", "grid_hws", "spatial_shapes", "tgt_sizes", "target_sizes"):
            return torch.tensor([[4, 4]] * self.rows)
        if name in ("qformer_input_ids", "task_inputs"):
            return self.ids()
        if name in ("image", "prompt_pixel_values", "prompt_masks", "pixel_values_images"):
            return self.floats(self.rows, *self.image_shape())
        if name == "aspect_ratio_ids":
            return torch.ones(self.rows, 1, dtype=torch.long)
        if name == "aspect_ratio_mask":
            return torch.ones(self.rows, 1, 1, dtype=torch.long)
        if name in ("states", "actions"):
            width = int(config.state_dim if name == "states" else config.act_dim)
            return self.floats(self.rows, LENGTH, width)
        if name in ("rewards", "returns_to_go"):
            return self.floats(self.rows, LENGTH, 1)
        if name == "timesteps":
            return torch.arange(LENGTH).expand(self.rows, LENGTH)
        if name == "is_longer":
            return torch.zeros(self.rows, 1, dtype=torch.bool)
        if name == "visual_feats":
            return self.floats(self.rows, 4, int(config.visual_feat_dim))
        if name == "visual_pos":
            return torch.rand(self.rows, 4, 4, generator=self.generator)
        if name in ("audio_mel",):
            return self.features()
        if name in ("flattened_patches",):
            width = int(_first(config, "patch_embed_hidden_size", default=32))
            flat = self.floats(self.rows, 16, width + 2)
            flat[..., :2] = torch.arange(1, 17)[:, None] % 4 + 1
            return flat
        if name in ("image_sizes",):
            _, height, width = self.image_shape()
            return torch.tensor([[height, width]] * self.rows)
        return None

    def patches(self, frames: int, count: int = 16) -> Tensor:
        """(rows * count, channels * frames * patch * patch): the flat patches of image-grid vision towers."""
        patch = _first(self.config, "patch_size", within="vision", default=14)
        patch = patch if isinstance(patch, int) else patch[-1]
        channels = int(_first(self.config, "in_channels", "num_channels", "in_chans", within="vision", default=3))
        return self.floats(self.rows * count, channels * frames * patch * patch)

    def sound(self) -> Tensor:
        bins = _first(self.config, "num_mel_bins", default=None)
        length = _first(self.config, "max_length", default=None)
        if bins and isinstance(length, int) and length > 100:  # spectrogram transformers
            return self.floats(self.rows, length, int(bins))
        if self.model.main_input_name == "input_values" and _first(self.config, "audio_channels", default=None):
            return self.floats(self.rows, int(_first(self.config, "audio_channels")), 2400)
        return self.floats(self.rows, 4000)

    def features(self) -> Tensor:
        bins = int(_first(self.config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim",
                          "n_mels", "input_dim", "feature_size", "input_feat_size", within="audio|encoder", default=80))  # fmt: skip
        positions = _first(self.config, "max_source_positions", within="audio|encoder", default=None)
        if positions and hasattr(self.config, "max_source_positions") or _first(self.config, "n_window", default=None):
            return self.floats(self.rows, bins, 2 * int(positions or 32))
        return self.floats(self.rows, 64, bins)


def _guesses(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Arguments for forward, most complete first."""
    maker = _Maker(model)
    names = list(maker.parameters)
    required = [
        n
        for n, p in maker.parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    main = model.main_input_name if isinstance(model.main_input_name, str) else None
    base = list(dict.fromkeys([*required, *([main] if main in names else [])]))
    if not base:
        base = [names[0]]
    made = {n: maker.make(n) for n in base}
    made = {n: v for n, v in made.items() if v is not None}
    extra: dict[str, Any] = {}
    if "grid_thw" in base or (base[0] in ("hidden_states", "pixel_values") and "image_grid_thw" in base):
        for frames in (_first(maker.config, "temporal_patch_size", default=1), 1):  # a vision tower on flat patches
            yield {**made, base[0]: maker.patches(int(frames))}
    if "returns_to_go" in names:
        extra |= {n: maker.make(n) for n in ("states", "actions", "rewards", "returns_to_go", "timesteps")}
    if "spatial_shapes" in names and "pixel_attention_mask" in names:  # images as ragged patches
        flat = maker.patches(1).reshape(maker.rows, 16, -1)
        ragged = {"pixel_values": flat, "pixel_attention_mask": torch.ones(maker.rows, 16, dtype=torch.long),
                  "spatial_shapes": maker.make("spatial_shapes")}  # fmt: skip
        yield {**({"input_ids": maker.ids()} if "input_ids" in names else {}), **ragged}
    if "is_longer" in names:
        size = int(_first(maker.config, "spec_size", default=256))
        bins = int(_first(maker.config, "num_mel_bins", default=64))
        yield {
            **made,
            "input_features": maker.floats(maker.rows, 1, size * size // bins, bins),
            "is_longer": maker.make("is_longer"),
        }
    if "context_input_ids" in names:  # retrieval-augmented generation without its retriever
        docs = int(_first(maker.config, "n_docs", default=5))
        yield {**made, "context_input_ids": maker.ids().repeat_interleave(docs, 0), "doc_scores": maker.floats(maker.rows, docs),
               "context_attention_mask": torch.ones(maker.rows * docs, LENGTH, dtype=torch.long),
               "decoder_input_ids": maker.ids(3)}  # fmt: skip
    if "feature_lens" in names:  # audio encoders on ragged, concatenated spectrograms
        bins = int(_first(maker.config, "num_mel_bins", default=128))
        lengths = {"feature_lens": torch.tensor([40, 40]), "aftercnn_lens": torch.tensor([20, 20])}
        yield {"input_features": maker.floats(bins, 80), **{k: v for k, v in lengths.items() if k in names}}
    if "prompt_pixel_values" in names:
        halves = {
            n: maker.floats(maker.rows, 3, 32, 32) for n in ("pixel_values", "prompt_pixel_values", "prompt_masks")
        }
        yield halves
    if "image_embeds_position_mask" in names:
        count = int(_first(maker.config, "latent_query_num", default=4))
        mask = torch.zeros(maker.rows, count + 4, dtype=torch.long)
        mask[:, 1 : count + 1] = 1
        yield {
            "pixel_values": maker.make("pixel_values"),
            "input_ids": maker.ids(count + 4),
            "image_embeds_position_mask": mask,
        }
    if "input_ids" in names and "input_features" in names and "input_features" not in made:
        yield {**made, **extra, "input_features": maker.features()}
        yield {**made, **extra, "input_features": maker.features().transpose(1, 2)}
    if "visual_feats" in names:
        extra |= {n: maker.make(n) for n in ("visual_feats", "visual_pos")}
    if "encoder_hidden_states" in names and "query_embeds" in made:
        width = int(_first(maker.config, "encoder_hidden_size", default=32))
        extra["encoder_hidden_states"] = maker.floats(maker.rows, 5, width)
    for name in required:
        if name.endswith("mask") and made.get(name) is None:
            first = next((v for v in made.values() if isinstance(v, Tensor)), None)
            length = LENGTH if first is None else first.shape[-1 if "features" in name and first.shape[1] < 130 else 1]
            extra[name] = torch.ones(maker.rows, length, dtype=torch.long)
    if "bbox" in names and "input_ids" in made:
        extra["bbox"] = maker.make("bbox")
    if "decoder_input_ids" in names:
        extra["decoder_input_ids"] = maker.make("decoder_input_ids")
    if main == "past_values" or "past_values" in names:
        extra |= {
            n: maker.make(n)
            for n in ("past_time_features", "past_observed_mask", "future_values", "future_time_features")
            if n in names
        }
    if "input_ids" in names and "pixel_values" in names and main == "input_ids":
        yield from _with_images(maker, {**made, **extra})
    if "input_ids" in names and "input_ids" not in made:
        yield {**made, **extra, "input_ids": maker.ids()}
    if "pixel_values" in names and "pixel_values" not in made:
        yield {**made, **extra, "pixel_values": maker.make("pixel_values")}
    if extra:
        yield {**made, **extra}
    yield made
    if "input_ids" in made:
        yield {"input_ids": made["input_ids"]}
    if main == "input_features" or "input_features" in made:
        for shape in (
            (2, 80, 128),
            (2, 64, 80),
            (2, 128, 128),
            (2, 128, 80),
            (2, 128, 200),
            (2, 64, 128),
            (2, 64, 560),
        ):
            given = {**made, **extra, "input_features": maker.floats(*shape)}
            yield given
            for axis in (1, 2):
                yield {
                    n: torch.ones(2, shape[axis], dtype=torch.bool) if n.endswith("mask") else v
                    for n, v in given.items()
                }
    if "input_features_mask" in names and isinstance(made.get("input_features"), Tensor):
        for axis in (1, 2):
            length = made["input_features"].shape[axis]
            yield {**made, **extra, "input_features_mask": torch.ones(2, length, dtype=torch.long)}
    if any(n.endswith("mask") for n in extra):
        yield {n: v.bool() if n.endswith("mask") else v for n, v in {**made, **extra}.items()}
    if "hidden_states" in made and "mask" in names:
        yield {"hidden_states": maker.floats(2, 64, 80), "mask": torch.ones(2, 64, dtype=torch.bool)}
    if "aspect_ratio_ids" in made:
        tiles = int(_first(maker.config, "max_num_tiles", default=4))
        yield {**made, "pixel_values": maker.floats(2, 1, tiles, *maker.image_shape()),
               "aspect_ratio_mask": torch.ones(2, 1, tiles, dtype=torch.long)}  # fmt: skip
    if main == "input_values" or "input_values" in made:
        for shape in ((2, 1, 2400), (2, 2400), (2, 2400, 80), (2, 1, 9600), (2, 2, 2400), (1, 16000)):
            yield {**made, **extra, "input_values": maker.floats(*shape)}
    if "pixel_values" in made:
        for size in (32, 64, 128, 224, 256):
            yield {**made, **extra, "pixel_values": maker.floats(2, 3, size, size)}
        for frames in dict.fromkeys((2, 4, int(_first(maker.config, "num_frames", default=2)))):
            yield {**made, **extra, "pixel_values": maker.floats(2, frames, *maker.image_shape())}
        yield {**made, **extra, "pixel_values": maker.patches(1).reshape(2, 16, -1)}


def _with_images(maker: _Maker, base: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Text with an image in it: one placeholder token, to be repeated as the model asks (see `run`)."""
    config = maker.config
    token = _first(config, "image_token_id", "image_token_index", "media_token_id", default=None)
    names = maker.parameters
    channels, height, width = maker.image_shape()
    ids = base["input_ids"]
    if isinstance(token, int):
        ids = ids.clone()
        ids[:, 2] = token
    grid_name = next((n for n in ("image_grid_thw", "image_grid_hws", "grid_thw") if n in names), None)
    if grid_name:
        frames = int(_first(config, "temporal_patch_size", within="vision", default=1))
        for depth in dict.fromkeys((frames, 1)):
            whole = {**base, "input_ids": ids, "pixel_values": maker.patches(depth), grid_name: maker.make(grid_name)}
            if "mm_token_type_ids" in names:
                whole["mm_token_type_ids"] = (ids == token).long()
            yield whole
    pixels = maker.floats(maker.rows, channels, height, width)
    sizes = {"image_sizes": torch.tensor([[height, width]] * maker.rows)} if "image_sizes" in names else {}
    yield {**base, "input_ids": ids, "pixel_values": pixels, **sizes}
    one = {**base, "input_ids": ids, "pixel_values": pixels[:, None], **sizes}
    yield one
    if "image_attention_mask" in names:
        yield {**one, "image_attention_mask": torch.ones(maker.rows, ids.shape[1], 1, dtype=torch.long)}
    if frames := _first(config, "num_frames", default=None):
        yield {**one, "pixel_values": pixels[:, None].repeat(1, int(frames), 1, 1, 1)}


_MISMATCH = re.compile(r"tokens:? *(\d+).*?features:? *(\d+)", re.DOTALL)


def _call(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Run; where the model says how many placeholder tokens it wants, repeat them and run again."""
    try:
        return inputs, model(**inputs)
    except ValueError as error:
        found = _MISMATCH.search(str(error))
        token = _first(model.config, "image_token_id", "image_token_index", "media_token_id", default=None)
        if not found or "input_ids" not in inputs or not isinstance(token, int):
            raise
        have, want = int(found[1]), int(found[2])
        rows = inputs["input_ids"].shape[0]
        width = _first(model.config, "hidden_size", within="text", default=1)
        if want % rows or not want:
            raise
        each = want // rows
        if each > 2000 and each % int(width) == 0:
            each //= int(width)
        text = inputs["input_ids"]
        text = torch.where(text == token, torch.tensor(4), text) if have else text
        ids = torch.cat([text[:, :2], torch.full((rows, each), token), text[:, 2:]], dim=1)
        inputs = {**inputs, "input_ids": ids}
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = (ids == token).long()
        return inputs, model(**inputs)


def run(model: PreTrainedModel) -> tuple[dict[str, Any], Any]:
    """Inputs the model accepts and its output for them; the first error if there are none."""
    makers = _guesses(model)
    first: Exception | None = None
    for inputs in makers:
        try:
            torch.manual_seed(0)
            with torch.no_grad():
                inputs, output = _call(model, inputs)
        except Exception as error:
            first = first or error
            continue
        if tensors(output):
            return inputs, output
    raise first or Unsupported("no tensor came out")


def tensors(output: Any) -> list[Tensor]:
    """All floating tensors in an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    elif hasattr(output, "__dict__") and not isinstance(output, (list, tuple)):
        output = [v for k, v in sorted(vars(output).items()) if isinstance(v, (Tensor, list, tuple, dict))]
    if isinstance(output, (list, tuple)):
        return [t for item in output for t in tensors(item)]
    return []
