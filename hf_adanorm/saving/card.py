"""The model card of a patched model: README.md of its folder or repository.

Saving or pushing a patched model writes one where there is none (`hooks.py` says when). `write_model_card` makes one
on request, or brings the part of an existing one that is ours up to date: the section between two markers, and the
front matter's entries that are not filled in. Everything else in a card belongs to whoever wrote it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from hf_adanorm.modeling_adanorm import AdaNormSpec, NormGroup

from .files import leads_outside, write_file

BEGIN = "<!-- hf_adanorm: begin. Written by a program: write_model_card replaces what stands between the markers. -->"
END = "<!-- hf_adanorm: end -->"
CARD_NAME = "README.md"
_MAX_NAMES = 8  # of a group that the table lists; the spec below it has all

_NAMES = {
    "adanorm": "AdaNorm",
    "layernorm-simple": "LayerNorm-simple (no gain, no bias)",
    "detachnorm": "DetachNorm (mean and variance are constants in the backward pass)",
    "none": "no normalisation",
}

_LIMITS = """\
- `ignore_mismatched_sizes=True` defeats the protection described above, although the error message of transformers
  suggests it: the result is a wrong model.
- `from_pretrained(..., config=...)` with a stock config raises, and so does this config with the weights of a stock
  model: load a stock model first, then patch it.
- `from_config` without the package and without `trust_remote_code=True` builds a model with LayerNorm.
- Norms that have no weights to begin with (as in OLMo) leave nothing to mismatch: such a model loads without an error,
  and wrongly, without the package and without `trust_remote_code=True`.
- Loaders other than transformers (vLLM, TGI, llama.cpp and the like) are not supported.
- An adapter trained on this model needs this model as its base: save or push the patched base first, and load it again
  before attaching the adapter."""

_CITATION = """\
```bibtex
@inproceedings{xu2019understanding,
  title     = {Understanding and Improving Layer Normalization},
  author    = {Xu, Jingjing and Sun, Xu and Zhang, Zhiyuan and Zhao, Guangxiang and Lin, Junyang},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2019},
  url       = {https://arxiv.org/abs/1911.07013}
}
```"""


def write_model_card(
    folder: str | os.PathLike[str],
    *,
    model_id: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] | None = None,
    results: Mapping[str, float] | None = None,
    dataset_name: str | None = None,
    dataset_split: str | None = None,
    task: str | None = None,
    command: str | None = None,
    tags: Sequence[str] | None = None,
) -> Path:
    """Write the model card of the patched model saved in `folder`, or refresh the section of its card that is ours.

    In a card that is there already, text outside our two markers stays as it is, and so do the entries of its front
    matter, save for results of the same metric on the same data. Results and the command of an earlier call are
    dropped from the section unless they are given again.

    Args:
        folder: a folder that `save_pretrained` of a patched model wrote.
        model_id: the model's name on the Hub, for the title and the examples.
        base_model: the id of the model that was patched or fine-tuned.
        datasets: ids on the Hub of the data that it was trained on.
        results: metric -> value, such as {"accuracy": 0.7721}, measured on `dataset_split` of the first of `datasets`.
        dataset_name: a readable name for the data of the results; needed if `datasets` is not given.
        dataset_split: such as "test".
        task: the Hub's name of the task, such as "text-classification"; by default that of the model's class.
        command: the command line that made the model.
        tags: further tags.

    Returns:
        The path of the card, `folder/README.md`.

    Raises:
        FileNotFoundError: `folder` has no config.json.
        TypeError, ValueError: its config.json describes no patched model, or its spec is none; results without a name
            of their data; an existing card that is not UTF-8 text, whose front matter cannot be read, or that holds
            only one of the markers.

    Example:
        >>> write_model_card("out", base_model="google-bert/bert-base-uncased", results={"accuracy": 0.9},
        ...                  datasets=["stanfordnlp/sst2"], dataset_split="validation")  # doctest: +SKIP
        PosixPath('out/README.md')
    """
    config = read_config(Path(folder))
    if not any(True for _ in _specs(config)):
        raise ValueError(
            f"{folder} holds no patched model (its config.json has no entry 'adanorm'): patch_model first"
        )
    if results and not (datasets or dataset_name):
        raise ValueError("results need the data that they were measured on: give datasets or dataset_name")
    target = Path(folder) / CARD_NAME
    text = render_card(
        config,
        existing=read_card(target),
        model_id=model_id,
        base_model=base_model,
        datasets=list(datasets or ()),
        results=results,
        dataset_name=dataset_name,
        dataset_split=dataset_split,
        task=task,
        command=command,
        tags=list(tags or ()),
    )
    write_file(target, text)
    return target


def render_card(
    config: Mapping[str, Any],
    *,
    existing: str | None = None,
    model_id: str | None = None,
    base_model: str | None = None,
    datasets: list[str] | None = None,
    results: Mapping[str, float] | None = None,
    dataset_name: str | None = None,
    dataset_split: str | None = None,
    task: str | None = None,
    command: str | None = None,
    tags: list[str] | None = None,
) -> str:
    """The text of the card of a model with the given config.json, built on an `existing` card if there is one."""
    specs = dict(_specs(config))
    norms = list(dict.fromkeys(group.norm for spec in specs.values() for group in spec.groups))
    architecture = _architecture(config)
    card = _parse(existing)
    title = model_id or architecture
    if existing is None:
        card.text = f"\n# {title}\n\n{BEGIN}\n{END}\n"
    section = _section(config, specs, norms, model_id, results, dataset_name, dataset_split, datasets, command)
    card.text = _replace_section(card.text, f"{BEGIN}\n{section}\n{END}")

    data = card.data
    task = task or data.pipeline_tag or _task(str(config.get("model_type")), architecture)
    data.library_name = data.library_name or "transformers"
    data.base_model = data.base_model or base_model
    data.pipeline_tag = data.pipeline_tag or task
    data.tags = list(
        dict.fromkeys([*_list(data.tags), "hf_adanorm", *(n for n in norms if n != "none"), *(tags or [])])
    )
    if datasets:
        data.datasets = list(dict.fromkeys([*_list(data.datasets), *datasets]))
    if results:
        data.metrics = list(dict.fromkeys([*_list(data.metrics), *results]))
        data.model_name = data.model_name or title
        fresh = [
            EvalResult(
                task_type=task or "other",
                dataset_type=datasets[0] if datasets else _slug(str(dataset_name)),
                dataset_name=dataset_name or datasets[0],  # type: ignore[index]
                dataset_split=dataset_split,
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in results.items()
        ]
        old = [r for r in data.eval_results or [] if not any(r.is_equal_except_value(new) for new in fresh)]
        data.eval_results = [*old, *fresh]
    return str(card)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a saved model (FileNotFoundError, ValueError)."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the folder of a model saved with save_pretrained")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, no object")
    return config


def base_model_of(config: PreTrainedConfig) -> str | None:
    """The Hub id that the model was loaded from; None for a local folder or a fresh model."""
    name = getattr(config, "_name_or_path", None) or ""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name)
    return name if is_id and not Path(name).exists() else None


def is_placeholder(text: str) -> bool:
    """Whether a card is the one that transformers writes for want of another, as nobody has touched it."""
    if _PLACEHOLDER not in text:
        return False
    try:
        card = ModelCard(text)
        template = ModelCard.from_template(ModelCardData(), model_description=_PLACEHOLDER)
    except (ImportError, ValueError, TypeError):
        return False
    return bool(card.text.strip() == template.text.strip())


_PLACEHOLDER = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
    "This model card has been automatically generated."
)


def card_tags(text: str) -> list[str]:
    """The tags in a card's front matter."""
    return _list(_parse(text).data.tags)


def with_tags(text: str, tags: list[str]) -> str:
    """A card with further tags."""
    if not tags:
        return text
    card = _parse(text)
    card.data.tags = list(dict.fromkeys([*_list(card.data.tags), *tags]))
    return str(card)


def describes(text: str, config: Mapping[str, Any]) -> bool | None:
    """Whether the spec in a card's section is that of `config`; None for a card without our section."""
    if BEGIN not in text:
        return None
    return all(_spec_json(spec) in text for _, spec in _specs(config))


def without_section(text: str) -> str:
    """A card without our section and our tags, for a model that is no longer patched."""
    if BEGIN not in text or END not in text.partition(BEGIN)[2]:
        return text
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2].lstrip("\r\n")
    text = before.rstrip("\r\n") + "\n" + (f"\n{after}" if after else "")
    try:
        card = _parse(text)
    except ValueError:  # not for us to mend
        return text
    ours = {"hf_adanorm", *_NAMES}
    card.data.tags = [tag for tag in _list(card.data.tags) if tag not in ours] or None
    return str(card)


# ------------------------------------------------------------------------------------------------------ the section


def _section(
    config: Mapping[str, Any],
    specs: Mapping[str, AdaNormSpec],
    norms: list[str],
    model_id: str | None,
    results: Mapping[str, float] | None,
    dataset_name: str | None,
    dataset_split: str | None,
    datasets: list[str] | None,
    command: str | None,
) -> str:
    kinds = ", ".join(_NAMES[norm].partition(" (")[0] for norm in norms)
    groups = [group for spec in specs.values() for group in spec.groups]
    about = "The swapped layers have no gain and no bias."
    if any(group.fade is not None for group in groups):
        about = "It was saved in the middle of a fade: what is left of gains and biases is in the checkpoint."
    out = [
        f"## Swapped norms: {kinds}" if norms else "## Folded norms",
        "",
        "Normalisation layers of this model were replaced by those of "
        "[Understanding and Improving Layer Normalization](https://arxiv.org/abs/1911.07013) (Xu et al., NeurIPS "
        f"2019) with hf_adanorm. {about}"
        if norms
        else "Gains and biases of this model's norms were folded into the layers that read them, with hf_adanorm.",
        "",
    ]
    if groups:
        out += ["| norm | settings | modules |", "|---|---|---|"]
    for prefix, spec in specs.items():
        out += [_row(group, prefix) for group in spec.groups]
    out += [
        "",
        "`*` stands for every number, `^` for a module outside the base model. The spec, as in `config.json`:",
        "",
    ]
    for prefix, spec in specs.items():
        out += [*([f"In `{prefix}`:", ""] if prefix else []), "```json", _spec_json(spec), "```", ""]
    out += _loading(config, model_id or "path/or/id-of-this-model")
    out += ["### Known limits", "", _LIMITS, ""]
    if results:
        where = " ".join([dataset_name or datasets[0], *([f"({dataset_split})"] if dataset_split else [])])  # type: ignore[index]
        out += ["### Results", "", "| data | metric | value |", "|---|---|---|"]
        out += [f"| {_cell(where)} | {_cell(name)} | {value:.6g} |" for name, value in results.items()]
        out += [""]
    if command:
        out += ["### How it was made", "", "```bash", command.replace("```", "` ` `"), "```", ""]
    return "\n".join([*out, "### Citation", "", _CITATION])


def _row(group: NormGroup, prefix: str) -> str:
    data = group.to_dict()
    modules = data.pop("modules")
    name = _NAMES[data.pop("norm")]
    settings = ", ".join(f"{key} = {value}" for key, value in data.items()) or "as the replaced norm"
    more = f" and {len(modules) - _MAX_NAMES} more" if len(modules) > _MAX_NAMES else ""
    where = f" in `{prefix}`" if prefix else ""
    return f"| {name} | {settings} | {', '.join(f'`{m}`' for m in modules[:_MAX_NAMES])}{more}{where} |"


def _spec_json(spec: AdaNormSpec) -> str:
    return json.dumps(spec.to_dict())


def _loading(config: Mapping[str, Any], name: str) -> list[str]:
    architecture = _architecture(config)
    auto_map = config.get("auto_map") or {}
    targets = {auto: str(ref).rpartition(".")[2] for auto, ref in auto_map.items()}
    auto = next(
        (auto for auto, target in targets.items() if target == architecture and auto != "AutoModel"), "AutoModel"
    )
    lines = [
        "### How to load it",
        "",
        "With the package hf_adanorm installed:",
        "",
        "```python",
        f"import hf_adanorm  # teaches transformers the swapped norms\nfrom transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{name}")',
        "```",
        "",
    ]
    if targets:
        lines += [
            "Without it, by the file `modeling_adanorm.py` of this repository:",
            "",
            "```python",
            f"from transformers import {auto}",
            "",
            f'model = {auto}.from_pretrained("{name}", trust_remote_code=True)',
            "```",
            "",
            "The same goes for `pipeline(...)`. ",
        ]
    else:
        lines += [
            "Its architecture comes from outside transformers, so there is no way to load it without the package. "
        ]
    lines[-1] += (
        "With neither, loading **stops with a size mismatch** on the swapped norms. That is on purpose: "
        "stock LayerNorms in their place would be another model, with outputs that look right and are wrong."
    )
    return [*lines, ""]


# ------------------------------------------------------------------------------------------------------- small parts


def _specs(config: Mapping[str, Any]) -> Iterator[tuple[str, AdaNormSpec]]:
    """The model's spec under the name "", or, where there is none, those of the nested configs under their names."""
    if config.get("adanorm") is not None:
        yield "", AdaNormSpec.from_dict(config["adanorm"])
        return
    for name, value in config.items():
        if isinstance(value, Mapping) and value.get("adanorm") is not None:
            yield name, AdaNormSpec.from_dict(value["adanorm"])


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, (list, tuple)) and names else config.get("model_type")
    return name if isinstance(name, str) and name.isidentifier() else "model"


# The Hub's tasks and the mapping of Auto classes that serves each. transformers.modelcard holds the same table, but
# importing it brings in the Trainer and all that it needs.
_TASKS = {
    "text-generation": "CAUSAL_LM",
    "image-classification": "IMAGE_CLASSIFICATION",
    "image-segmentation": "IMAGE_SEGMENTATION",
    "fill-mask": "MASKED_LM",
    "object-detection": "OBJECT_DETECTION",
    "question-answering": "QUESTION_ANSWERING",
    "text2text-generation": "SEQ_TO_SEQ_CAUSAL_LM",
    "text-classification": "SEQUENCE_CLASSIFICATION",
    "table-question-answering": "TABLE_QUESTION_ANSWERING",
    "token-classification": "TOKEN_CLASSIFICATION",
    "audio-classification": "AUDIO_CLASSIFICATION",
    "automatic-speech-recognition": "SPEECH_SEQ_2_SEQ",
    "zero-shot-image-classification": "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "image-text-to-text": "IMAGE_TEXT_TO_TEXT",
}


def _task(model_type: str, architecture: str) -> str | None:
    from transformers.models.auto import modeling_auto

    tables = {task: f"MODEL_FOR_{name}_MAPPING_NAMES" for task, name in _TASKS.items()}
    for task, table in [*tables.items(), ("automatic-speech-recognition", "MODEL_FOR_CTC_MAPPING_NAMES")]:
        found = getattr(modeling_auto, table, {}).get(model_type)
        if architecture in (found if isinstance(found, (list, tuple)) else (found,)):
            return task
    return None


def _parse(text: str | None) -> Any:
    if text is None or not re.match(r"\s*---\s*\n", text):
        text = f"---\n{{}}\n---\n{text or ''}"
    try:
        return ModelCard(text)
    except Exception as error:  # yaml's errors and huggingface_hub's have nothing in common
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the front matter of README.md cannot be read: {why}") from None


def _replace_section(text: str, section: str) -> str:
    if (BEGIN in text) != (END in text) or text.count(BEGIN) > 1 or text.find(BEGIN) > text.find(END):
        raise ValueError(
            "README.md does not hold both markers of hf_adanorm's section once and in order: put them back, or take "
            "out what is left of the section"
        )
    if BEGIN not in text:
        return f"{text.rstrip()}\n\n{section}\n"
    start, end = text.index(BEGIN), text.index(END) + len(END)
    return text[:start] + section + text[end:]


def _list(value: Any) -> list[str]:
    if value is None:
        return []
    return (
        [value] if isinstance(value, str) else [str(entry) for entry in value] if isinstance(value, Iterable) else []
    )


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("|", "\\|"))


def read_card(path: Path) -> str | None:
    """The text of a card with its line endings, None if there is no such file.

    Raises:
        ValueError: what is there cannot be kept: no UTF-8 text, a folder, a link out of the model's folder.
    """
    if not os.path.lexists(path):
        return None
    if leads_outside(path) or not path.is_file():
        raise ValueError(f"{path} is a folder or a link to what lies elsewhere, no model card: move it away")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it, or move it away") from None
