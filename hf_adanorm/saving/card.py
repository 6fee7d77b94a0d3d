"""The model card of a patched model: README.md of its folder or repository.

Saving or pushing a patched model writes one where there is none (`hooks.py` says when). `write_model_card` makes one
on request, or brings the part of an existing one that is ours up to date: the section between two markers, and the
front matter's entries that are not filled in. Everything else in a card belongs to whoever wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2  # torch brings it along
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.utils.hub import cached_file

from hf_adanorm.modeling_adanorm import NORM_CLASSES, AdaNormSpec, NormGroup, is_own_reference

from .files import leads_outside, write_file

BEGIN = "<!-- hf_adanorm: begin. Written by a program: write_model_card replaces what stands between the markers. -->"
END = "<!-- hf_adanorm: end -->"
CARD_NAME, EVAL_RESULTS = "README.md", ".eval_results"
PROJECT = "https://github.com/hf-adanorm/hf-adanorm"  # as in pyproject.toml
# Of a push: files in the repository whose scores are another model's once our section of the card is another.
STALE = f"{EVAL_RESULTS}/*"
INSTALL = f"pip install git+{PROJECT}"
_MAX_NAMES = 8  # of a group that the table lists; the list below it has all

# What a pipeline takes and gives, by task; LABEL stands for a label of the model's.
_EXAMPLES = {
    "text-classification": ('"What a lovely film!"', "[{'label': 'LABEL', 'score': ...}]"),
    "token-classification": ('"Ada lives in London."', "[{'entity': 'LABEL', 'score': ..., 'word': 'ada', ...}, ...]"),
    "text-generation": ('"Once upon a time"', "[{'generated_text': 'Once upon a time ...'}]"),
    "fill-mask": (
        'f"The capital of France is {pipe.tokenizer.mask_token}."',
        "[{'score': ..., 'token_str': 'paris', 'sequence': 'the capital of france is paris.', ...}, ...]",
    ),
    "image-classification": ('"photo.jpg"', "[{'label': 'LABEL', 'score': ...}, ...]"),
    "object-detection": ('"photo.jpg"', "[{'score': ..., 'label': 'LABEL', 'box': {'xmin': ..., ...}}, ...]"),
    "audio-classification": ('"speech.wav"', "[{'score': ..., 'label': 'LABEL'}, ...]"),
    "automatic-speech-recognition": ('"speech.wav"', "{'text': '...'}"),
}


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
    license: str | None = None,  # noqa: A002, its name in the front matter
    tags: Sequence[str] | None = None,
) -> Path:
    """Write the model card of the patched model saved in `folder`, or refresh the section of its card that is ours.

    In a card that is there already, text outside our two markers stays as it is, and so do the entries of its front
    matter, save for results of the same metric on the same data, or of a model with other norms. Results and the
    command of an earlier call are dropped from the section unless they are given again.

    Args:
        folder: a folder that `save_pretrained` of a patched model wrote.
        model_id: the model's name on the Hub, for the title and the examples.
        base_model: the id of the model that was patched or fine-tuned.
        datasets: ids on the Hub of the data that it was trained on.
        results: metric -> value, such as {"accuracy": 0.7721}, measured on `dataset_split` of the first of `datasets`;
            rounded to four digits. With `datasets` the first of them is also written to `.eval_results/`, where the
            Hub's leaderboards look.
        dataset_name: a readable name for the data of the results; needed if `datasets` is not given.
        dataset_split: such as "test".
        task: the Hub's name of the task, such as "text-classification"; by default that of the model's class.
        command: the command line that made the model; paths of this machine are shortened to their last part.
        license: the model's license, such as "apache-2.0"; by default the base model's, where its card is at hand.
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
        license=license,
        tags=list(tags or ()),
    )
    write_file(target, text)
    if results and datasets:
        _write_eval_results(Path(folder), datasets[0], results, dataset_split)
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
    license: str | None = None,  # noqa: A002
    tags: list[str] | None = None,
) -> str:
    """The text of the card of a model with the given config.json, built on an `existing` card if there is one."""
    specs = dict(_specs(config))
    norms = list(dict.fromkeys(group.norm for spec in specs.values() for group in spec.groups))
    architecture = _architecture(config)
    card = _parse(existing)
    data = card.data
    if existing is not None and describes(existing, config) is False:
        _forget_model(data)
    task = task or data.pipeline_tag or _task(str(config.get("model_type")), architecture)
    to_tag = [norm for norm in norms if not NORM_CLASSES[norm].is_identity]
    unnamed = "-".join([(base_model or architecture).rpartition("/")[2], *to_tag])
    title = model_id.rpartition("/")[2] if model_id else unnamed
    if existing is None:
        card.text = f"\n# {title}\n\n{BEGIN}\n{END}\n"
    elif model_id:  # the name that a card got for want of a better one
        for before in (unnamed, "-".join([architecture, *norms]), architecture):
            card.text = card.text.replace(f"# {before}\n\n{BEGIN}", f"# {title}\n\n{BEGIN}")
    rounded = {metric: float(f"{value:.4g}") for metric, value in (results or {}).items()}
    where = " ".join([dataset_name or (datasets or ["?"])[0], *([f"({dataset_split})"] if dataset_split else [])])
    section = _render_section(
        config,
        specs,
        task=task,
        name=model_id or "path/or/id-of-this-model",
        results=[(_cell(metric), f"{value:.4g}") for metric, value in rounded.items()],
        where=_cell(where),
        command=without_folders(command),
    )
    card.text = _replace_section(card.text, f"{BEGIN}\n{section}\n{END}")

    data.library_name = data.library_name or "transformers"
    data.base_model = data.base_model or base_model
    data.license = data.license or license or _license_of(base_model)
    data.pipeline_tag = data.pipeline_tag or task
    data.tags = list(dict.fromkeys([*_list(data.tags), "hf_adanorm", *to_tag, *(tags or [])]))
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
            for metric, value in rounded.items()
        ]
        old = [r for r in data.eval_results or [] if not any(r.is_equal_except_value(new) for new in fresh)]
        data.eval_results = [*old, *fresh]
    return str(card)


def renewed_card(existing: str | None, config: Mapping[str, Any], **more: Any) -> str | None:
    """The card for a push over an `existing` one, of a model with the given config.json: our section describes that
    model, and is gone if it is no patched one. A card without our section stays as it is; `more` as in `render_card`.
    """
    if existing is not None and describes(existing, config) is not False:
        return existing
    if not any(True for _ in _specs(config)):
        return None if existing is None else without_section(existing)
    return render_card(config, existing=existing, **more)


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
    """Whether the spec of a card's section is that of `config`; None for a card without our section."""
    if BEGIN not in text:
        return None
    specs = dict(_specs(config))
    if f"<!-- spec {_digest(specs)} -->" in text:
        return True
    with suppress(ValueError, TypeError):  # cards of hf_adanorm 0.1.0 held the spec as JSON
        shown = [AdaNormSpec.from_dict(json.loads(block)) for block in re.findall(r"```json\n(.*)\n```", text)]
        return bool(shown) and _digest(dict(enumerate(shown))) == _digest(dict(enumerate(specs.values())))
    return False


def _digest(specs: Mapping[Any, AdaNormSpec]) -> str:
    """Of what the specs say, whichever version wrote them."""
    said = {str(key): {**spec.to_dict(), "format": None, "version": None} for key, spec in specs.items()}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def without_section(text: str) -> str:
    """A card without our section, our tags and the patched model's results, for a model that is no longer patched."""
    if BEGIN not in text or END not in text.partition(BEGIN)[2]:
        return text
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2].lstrip("\r\n")
    text = before.rstrip("\r\n") + "\n" + (f"\n{after}" if after else "")
    try:
        card = _parse(text)
    except ValueError:  # not for us to mend
        return text
    _forget_model(card.data)
    return str(card)


def with_section(existing: str | None, section: str, *, title: str, **data: str | None) -> str:
    """A card of a model that is not patched, with `section` where ours is or would be, and `data` in the front matter
    where it has no such entry; `title` is that of a new card."""
    card = _parse(f"\n# {title}\n\n{BEGIN}\n{END}\n" if existing is None else existing)
    if describes(card.text, {}) is False:
        _forget_model(card.data)
    card.text = _replace_section(card.text, f"{BEGIN}\n{section}\n\n<!-- spec {_digest({})} -->\n{END}")
    for key, value in data.items():
        setattr(card.data, key, getattr(card.data, key, None) or value)
    return str(card)


def _forget_model(data: ModelCardData) -> None:
    """Take out what a card's front matter says of the patched model that it was written for."""
    data.tags = [tag for tag in _list(data.tags) if tag not in {"hf_adanorm", *NORM_CLASSES}] or None
    if data.eval_results:
        data.eval_results = data.model_name = None


# ------------------------------------------------------------------------------------------------------ the section


_AFFINE = {
    frozenset([False]): "The swapped layers have no gain and no bias.",
    frozenset([True]): "Their gains and biases are in the checkpoint.",
    frozenset([False, True]): "Of the swapped layers some have gains and biases, which are in the checkpoint.",
}


def _render_section(config: Mapping[str, Any], specs: Mapping[str, AdaNormSpec], **more: Any) -> str:
    groups = [(group, where) for where, spec in specs.items() for group in spec.groups]
    names = ", ".join(dict.fromkeys(group.kind.title for group, _ in groups))
    affine = frozenset(group.kind.keeps_affine for group, _ in groups)
    architecture = _architecture(config)
    targets = {
        auto: reference.rpartition(".")[2]
        for auto, reference in _mapping(config, "auto_map").items()
        if re.fullmatch(r"Auto\w{1,60}", auto) and isinstance(reference, str) and is_own_reference(reference)
    }
    matching = [auto for auto, target in targets.items() if target == architecture]
    # Of several the bare model's own, and last the one that names no task.
    matching.sort(key=lambda auto: (auto != "AutoModel", auto == "AutoModelForPreTraining"))
    example = _EXAMPLES.get(more["task"])
    label = next(iter(_mapping(config, "id2label").values()), None)
    label = label if isinstance(label, str) and re.fullmatch(r"[\w .+-]{1,40}", label) else "LABEL_0"
    source = (Path(__file__).with_name("card.md.jinja")).read_text(encoding="utf-8")
    lost = []
    if any(spec.biases for spec in specs.values()):
        lost.append("the biases that the folding added are left out")
    if any(spec.eps for spec in specs.values()):
        lost.append("where the folding adjusted an eps, it is the config's")
    section = jinja2.Template(source, trim_blocks=True, lstrip_blocks=True).render(
        heading=f"Swapped norms: {names}" if groups else "Folded norms",
        about=_AFFINE.get(affine),
        rows=[_row(group, where) for group, where in groups],
        lost=", and ".join(lost),
        auto=next(iter(matching), "AutoModel"),
        trusted=bool(targets),
        example=example and {"input": example[0], "output": example[1].replace("LABEL", label)},
        project=PROJECT,
        install=INSTALL,
        digest=_digest(specs),
        **more,
    )
    # Whatever comes from a config or a caller, our markers are ours.
    return str(section).replace(BEGIN, "").replace(END, "").strip()


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _row(group: NormGroup, where: str) -> dict[str, str]:
    data = group.to_dict()
    modules = [f"`{name}`" for name in data.pop("modules")]
    kind = NORM_CLASSES[data.pop("norm")]
    settings = [f"{key} = {value}" for key, value in data.items()]
    name = f"{kind.title} ({kind.summary})" if kind.summary else kind.title
    more = f" and {len(modules) - _MAX_NAMES} more" if len(modules) > _MAX_NAMES else ""
    nested = f" in `{where if where.isidentifier() else 'a nested config'}`" if where else ""
    return {
        "norm": name,
        "settings": ", ".join(settings) or "as the replaced norm",
        "modules": f"{', '.join(modules[:_MAX_NAMES])}{more}{nested}",
        "all_modules": ", ".join(modules) if more else "",
    }


def without_folders(command: str | None) -> str | None:
    """A command line without the folders of the machine that it ran on."""
    if command is None:
        return None
    return re.sub(r"(?<![\w.:/-])(?:~|[A-Za-z]:)?/(?:[^\s/'\"]+/)*(?=[^\s/])", "", command).replace("```", "` ` `")


def _license_of(base_model: str | None) -> str | None:
    """The license in the card of the base model, where that is a folder or in the local cache."""
    with suppress(OSError, ValueError):
        if base_model and (path := cached_file(base_model, CARD_NAME, local_files_only=True)):
            license_name = _parse(read_card(Path(path))).data.license
            return license_name if isinstance(license_name, str) else None
    return None


def _write_eval_results(folder: Path, dataset: str, results: Mapping[str, float], split: str | None) -> None:
    """The first result in the form that the Hub's leaderboards read, where huggingface_hub knows it."""
    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml  # noqa: PLC0415, of newer ones
    except ImportError:
        return
    metric, value = next(iter(results.items()))
    notes = f"{metric} on {split}" if split else metric
    entry = EvalResultEntry(dataset_id=dataset, task_id="default", value=float(f"{value:.4g}"), notes=notes)
    place = folder / EVAL_RESULTS
    place.mkdir(exist_ok=True)
    if leads_outside(place):
        raise ValueError(f"{place} is a link that leads out of the folder: move it away")
    write_file(place / f"{_slug(dataset)}.yaml", yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))


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
    return re.sub(r"\s+", " ", text.replace("|", "\\|").replace("<", "&lt;"))


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
