"""Tiny random models of any model type in transformers.

`configs(model_type)` yields ways to shrink the default config, most drastic first: every width the same, or every
width divided by a factor (which keeps ratios and divisibility), or only fewer layers. `OVERRIDES` holds what the names
of a config's fields do not tell. `build` draws weights, gains and biases that are far from trivial, so that a lost
gain or a lost norm shows in the output.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCAB = 160
LENGTH = 7

_MAPPINGS = ["MODEL", "MODEL_FOR_PRETRAINING", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_MASKED_LM"]
_MAPPINGS += ["MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM"]
_MAPPINGS = [f"{name}_MAPPING_NAMES" for name in _MAPPINGS]
_MAPPINGS += sorted(name for name in vars(modeling_auto) if name.endswith("_MAPPING_NAMES") and name not in _MAPPINGS)
"""The order in which a type's class is looked for; the bare model first."""


class UnsupportedError(Exception):
    """The type has no model of its own to build; the message says why."""


def model_types() -> list[str]:
    return sorted(CONFIG_MAPPING.keys())


# --- which class -----------------------------------------------------------------------------------------------------


def model_classes(model_type: str, config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """Return classes that build this type, the preferred one first."""
    names: list[str] = []
    for mapping in _MAPPINGS:
        value = getattr(modeling_auto, mapping).get(model_type, [])
        names += [value] if isinstance(value, str) else list(value)
    found = [getattr(transformers, name, None) for name in names]
    classes = [cls for cls in found if isinstance(cls, type) and issubclass(cls, PreTrainedModel)]
    return list(dict.fromkeys([*classes, *_classes_of_config(config)]))


def _classes_of_config(config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """Return the model classes in the file beside the config's that name it as their config_class."""
    try:
        module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
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
_CAPS_TEXT = """
0 num_kv_shared_layers
1 n_group topk_group n_shared_experts moe_num_shared_experts first_k_dense_replace
2 num_experts_per_tok moe_topk moe_k top_k_experts num_selected_experts num_zero_experts zero_expert_num
3 num_labels
4 n_routed_experts num_experts num_local_experts moe_num_experts index_topk num_query_tokens num_denoising
4 image_embedding_size
6 num_latents
8 num_codevectors_per_group
12 num_queries two_stage_num_proposals
16 max_text_len train_num_points image_seq_length
32 d_latents context_length
40 shape_vocab_size pronunciation_vocab_size
60 entity_vocab_size
64 max_source_positions max_target_positions block_size codebook_size max_2d_position_embeddings
128 max_position_embeddings n_positions n_ctx max_seq_len
"""


def _table(text: str) -> dict[str, int]:
    """Read lines of a number and the fields that it is for."""
    return {name: int(number) for number, *names in map(str.split, text.strip().splitlines()) for name in names}


_CAPS = _table(_CAPS_TEXT)
"""The largest values of fields that are neither widths nor counts of layers or heads."""
_STAGES = ("depths", "hidden_sizes", "embed_dims", "stage_dims")


def _whole(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the config and all configs in it, inner ones first."""
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [*(part for sub in inner for part in _whole(sub)), config]


def _set(config: PreTrainedConfig, name: str, value: Any) -> None:
    with contextlib.suppress(Exception):  # a read-only or validated field stays as it is
        setattr(config, name, value)


def shrink(config: PreTrainedConfig, width: int | None, factor: int | None, layers: int = 2) -> None:
    """Make `config` small in place, widths all equal to `width`, or all divided by `factor`."""
    for part in _whole(config):
        _shrink_part(part, width, factor, layers)
        _fit_rope(part)


def _is_width(name: str) -> bool:
    return bool(_WIDTH.search(name) or _ALSO_WIDTH.match(name)) and not _NOT_WIDTH.search(name)


def _width(name: str, value: int, width: int | None, factor: int | None) -> int:
    if value < 24:
        return value
    if width is not None:
        of_head = "head_dim" in name or name == "d_kv"
        return width // 2 if name == "qk_head_dim" else width // 4 if of_head else width
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
    special: list[str] = []
    for name, value in old.items():
        if name.startswith("_") or isinstance(value, (bool, str, PreTrainedConfig)) or value is None:
            continue
        if re.search(r"(token_ids?|token_index|token_id_\w+|_idx)$", name) and isinstance(value, int):
            if value >= 100:
                special.append(name)
            continue
        if isinstance(value, int):
            _set(config, name, _shrink_int(name, value, width, factor, layers, old))
        elif isinstance(value, (list, tuple)) and value:
            _set(config, name, _shrink_list(name, value, width, factor, layers, depth))
    for number, name in enumerate(special):  # ids of special tokens move below the vocabulary's end, all different
        _set(config, name, VOCAB - 10 - number)
    if "stage_names" in old and depth is not None:
        names = list(old["stage_names"])[: layers + 1]
        count = max(1, len(wanted))
        config.stage_names = names
        config._out_features, config._out_indices = names[-count:], list(range(len(names)))[-count:]
    if isinstance(old.get("eos_token_id"), (list, tuple)):
        _set(config, "eos_token_id", 2)


def _shrink_int(name: str, value: int, width: int | None, factor: int | None, layers: int, old: dict[str, Any]) -> int:
    if name in _CAPS:
        return min(value, _CAPS[name])
    if re.fullmatch(r"(\w+_)?vocab_size\w*|vocabulary_size|n_tokens", name):
        return min(value, VOCAB)
    if _LAYERS.match(name) and not _KEEP_LAYERS.search(name):
        stages = [old[k] for k in _STAGES if isinstance(old.get(k), (list, tuple))]
        return value if any(len(stage) == value for stage in stages) else min(value, layers)
    if _HEADS.match(name):
        whole = name == "num_key_value_heads" and value == old.get("num_attention_heads")
        grouped = ("key_value" in name or "kv" in name) and not whole
        return value if width is None else min(value, 2 if grouped else 4)
    if name == "image_size":
        patch = old.get("patch_size")
        return min(value, 4 * patch if isinstance(patch, int) and patch > 4 else 64)
    if name == "window_size" and "depths" in old:
        return 2  # windows must tile every stage of the smaller image
    return _width(name, value, width, factor) if _is_width(name) or name == "upsample_groups" else value


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
        if _is_width(name):
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
    """Make an `mrope_section` that the model's code reads add up to half the rotated part of a head."""
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
    """Return the text of the model file beside the config's."""
    path = Path(inspect.getfile(config_class))
    model_file = path.with_name(path.name.replace("configuration_", "modeling_"))
    return model_file.read_text() if model_file.exists() else ""


# --- what names do not tell ------------------------------------------------------------------------------------------

_SERIES = {"prediction_length": 4, "context_length": 12}
_HIERA = {
    "vision_config.backbone_config.window_size_per_stage": [2, 2, 2, 1],
    "vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "time_series_transformer": _SERIES,
    "informer": _SERIES,
    "autoformer": _SERIES,
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3},
    "align": {"vision_config.width_coefficient": 0.25, "vision_config.depth_coefficient": 0.3},
    "align_vision_model": {"width_coefficient": 0.25, "depth_coefficient": 0.3},
    "seggpt": {"image_size": [64, 32], "patch_size": 8, "pretrain_image_size": 32},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "reformer": {"axial_pos_shape": [1, LENGTH], "lsh_attn_chunk_length": LENGTH, "local_attn_chunk_length": LENGTH},
    "glm5_next": {"text_config.index_topk": 16},
    "glm5_next_text": {"index_topk": 16},
    "oneformer": {"task_seq_len": LENGTH, "max_seq_len": LENGTH},
    "vitmatte": {"convstream_hidden_sizes": [8, 16, 32], "fusion_hidden_sizes": [32, 32, 32, 32]},
    "chameleon": {"vocabulary_map": {"<image>": VOCAB - 1, "IMGIMGA": 5}},
    "emu3": {"vocabulary_map": {"<image>": VOCAB - 1, "<|extra_200|>": 4, "<|visual token 0|>": 5}},
    "sam2": _HIERA,
    "sam2_vision_model": {k.removeprefix("vision_config."): v for k, v in _HIERA.items() if k.startswith("vision_")},
    "sam2_hiera_det_model": {"window_size_per_stage": [2, 2, 2, 1]},
    "blip-2": {"image_token_index": VOCAB - 1},
    "instructblip": {"image_token_index": VOCAB - 1},
    "dbrx": {
        "attn_config.rope_theta": 10000.0,
        "ffn_config.ffn_hidden_size": 32,
        "attn_config.kv_n_heads": 2,
        "attn_config.clip_qkv": 8.0,
    },
    "videomae": {"num_frames": 4},
    "vivit": {"num_frames": 4, "image_size": 32},
}
"""Fields to set after shrinking, by type; dotted names reach into sub-configs."""


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


_ENCODERS = {"encoder-decoder": "bert", "vision-encoder-decoder": "vit", "speech-encoder-decoder": "wav2vec2"}


def _composed(model_type: str) -> PreTrainedConfig | None:
    """Return the config of a type that is built from others, None for other types."""
    cls: Any = CONFIG_MAPPING[model_type]
    if model_type in _ENCODERS:
        decoder = _tiny("bert", is_decoder=True, add_cross_attention=True)
        config = cls.from_encoder_decoder_configs(_tiny(_ENCODERS[model_type]), decoder)
        config.pad_token_id, config.decoder_start_token_id = 0, 1
        return config
    if model_type == "vision-text-dual-encoder":
        return cls.from_vision_text_configs(_tiny("vit"), _tiny("bert"), projection_dim=32)
    if model_type in ("musicgen", "musicgen_melody"):
        parts = {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": f"{model_type}_decoder"}
        return cls(**{part: _tiny(inner).to_dict() for part, inner in parts.items()})
    if model_type == "rag":
        return cls.from_question_encoder_generator_configs(_tiny("dpr"), _tiny("bart"))
    return None


def configs(model_type: str) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield ways to a tiny config, each with the name of the way."""
    if (config := _composed(model_type)) is not None:
        yield "composed", config
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
            raise UnsupportedError(
                f"its config has no defaults: {type(error).__name__}: {str(error)[:150]}"
            ) from error
        shrink(config, width, factor)
        if fill:
            for part in _whole(config):
                _fill(part)
        for name, value in OVERRIDES.get(model_type, {}).items():
            _assign(config, name, value)
        yield way, config


_FILL_TEXT = """
0 pad_token_id dropout dropout_rate
1 n_shared_experts topk_group n_group moe_layer_freq
2 num_experts_per_tok top_k_experts
4 n_routed_experts num_experts prediction_length
8 sliding_window
32 moe_intermediate_size shared_expert_intermediate_size
160 vocab_size
"""
_FILL: dict[str, float] = {"initializer_range": 0.02, **_table(_FILL_TEXT)}


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
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draw weights large enough to matter, gains in 0.5 .. 1.5 (less 1 where 1 + w is applied), biases in +-0.5."""
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
        if not bool(torch.isfinite(parameter).all()):  # some classes leave parameters uninitialized
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        if parameter.ndim >= 2:
            fan_in = math.prod(parameter.shape[1:])
            parameter += (torch.randn(parameter.shape, generator=generator) * 0.5 / math.sqrt(fan_in)).to(parameter)
        elif bool((parameter == parameter.flatten()[0]).all()) and float(parameter.abs().max()) < 1e-2:
            parameter.copy_(uniform(parameter, 0.1, 0.4))  # layer scales of 1e-6 would hide everything behind them


def build(cls: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a model in evaluation mode, with eager attention, in float32; `seed` decides its weights."""
    torch.manual_seed(seed)
    model = cls._from_config(config, attn_implementation="eager", dtype=torch.float32)
    model = model.float().eval()
    randomize(model, seed)
    return model


def num_parameters(cls: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        model = cls._from_config(copy.deepcopy(config), attn_implementation="eager")
    return sum(p.numel() for p in model.parameters())
