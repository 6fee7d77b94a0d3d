"""The model card (README.md) of a saved model, written from the template `card.md.jinja`.

Saving or pushing a patched model writes a card where there is none (see `hooks.py`). `write_model_card` adds what only
the user knows, such as data and results. In an existing card we change only the section between our two markers and
empty entries of the front matter.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2  # torch depends on it
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.utils.hub import cached_file

from hf_adanorm.modeling_adanorm import __version__
from hf_adanorm.norms import norm_names
from hf_adanorm.spec import AdaNormSpec

from .files import leads_outside, write_file

PROJECT = ""
"""Address of the project's repository. Empty until there is one: cards then name the package only."""
BEGIN = "<!-- hf_adanorm: begin. write_model_card replaces the text between these two markers. -->"
END = "<!-- hf_adanorm: end -->"
CARD_NAME = "README.md"
_FORM = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)

# The Hub's name of a task -> the Auto class that serves it, and the middle of the name of its table in modeling_auto.
_TASKS = {
    "text-generation": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "image-classification": ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION"),
    "image-segmentation": ("AutoModelForImageSegmentation", "IMAGE_SEGMENTATION"),
    "fill-mask": ("AutoModelForMaskedLM", "MASKED_LM"),
    "object-detection": ("AutoModelForObjectDetection", "OBJECT_DETECTION"),
    "question-answering": ("AutoModelForQuestionAnswering", "QUESTION_ANSWERING"),
    "text2text-generation": ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM"),
    "text-classification": ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
    "token-classification": ("AutoModelForTokenClassification", "TOKEN_CLASSIFICATION"),
    "audio-classification": ("AutoModelForAudioClassification", "AUDIO_CLASSIFICATION"),
    "automatic-speech-recognition": ("AutoModelForSpeechSeq2Seq", "SPEECH_SEQ_2_SEQ"),
    "image-text-to-text": ("AutoModelForImageTextToText", "IMAGE_TEXT_TO_TEXT"),
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
    """Write the model card of the model saved in `folder`, or update our section of its card.

    The text outside our two markers and the entries of the front matter stay. Only results of the same metric on the
    same data are replaced, and those of a model with other norms.

    Args:
        folder: a folder that `save_pretrained` wrote.
        model_id: the model's name on the Hub, for the title and the code.
        base_model: the id of the model that was patched or fine-tuned.
        datasets: Hub ids of the training data.
        results: metric -> value, such as {"accuracy": 0.7721}, rounded to four digits. Measured on `dataset_split` of
            `dataset_name`, or of the first of `datasets`.
        dataset_name: a readable name of the data, for results on local files.
        dataset_split: the split of the results, such as "test".
        task: the Hub's name of the task, such as "text-classification"; by default that of the model's class.
        command: the command line that made the model; paths are shortened to their last part.
        license: the model's license, such as "apache-2.0"; by default that of the base model, if its card is cached.
        tags: further tags.

    Returns:
        The path of the card, `folder/README.md`.

    Raises:
        FileNotFoundError: `folder` has no config.json.
        TypeError, ValueError: config.json is not valid, or the existing card is not UTF-8 text, has an invalid front
            matter, or only one of our two markers.

    Example:
        >>> write_model_card("out", base_model="google-bert/bert-base-uncased", results={"accuracy": 0.9},
        ...                  datasets=["stanfordnlp/sst2"], dataset_split="validation")  # doctest: +SKIP
        PosixPath('out/README.md')
    """
    details = {key: value for key, value in locals().items() if key != "folder"}
    folder = Path(folder)
    target = folder / CARD_NAME
    existing, chat = read_card(target), _has_chat_template(folder)
    write_file(target, render_card(read_config(folder), existing=existing, chat=chat, **details))
    return target


def render_card(config: Mapping[str, Any], *, existing: str | None = None, chat: bool = False, **details: Any) -> str:
    """Return the card of a model with the given config.json.

    Args:
        existing: the card to update, if there is one. Of an empty form (`is_form`) only the front matter stays.
        chat: whether the tokenizer has a chat template.
        **details: arguments of `write_model_card`.
    """
    given = {**(write_model_card.__kwdefaults__ or {}), **details}
    specs, architecture, card = _specs(config), _architecture(config), _parse(existing)
    rows, data = _rows(specs), card.data
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    if existing is not None and describes(existing, config) is False:
        _forget_model(data)
    task = given["task"] or data.pipeline_tag or _task(config, architecture)
    base_model = given["base_model"] or next(iter(_united(data.base_model)), None)
    datasets = list(given["datasets"] or ())
    data_names = [given["dataset_name"]] if given["dataset_name"] else datasets
    made_up = ["-".join([part, *norms]).rpartition("/")[2] for part in (base_model, architecture) if part]
    title = given["model_id"].rpartition("/")[2] if given["model_id"] else made_up[0]
    split = given["dataset_split"]
    results = {metric: float(f"{value:.4g}") for metric, value in (given["results"] or {}).items()}
    section = _TEMPLATE.render(
        architecture=architecture,
        auto=_TASKS[task][0] if task in _TASKS else "AutoModel",
        base_model=base_model if _is_id(base_model) else None,
        biases=any(spec.biases for spec in specs.values()),
        chat=chat,
        command=without_folders(given["command"] or ""),
        data=_cell(", ".join(data_names)),
        digest=_digest(specs),
        eps=any(spec.eps for spec in specs.values()),
        folded=bool(config.get("folded_norms")),
        name=given["model_id"] or "path/or/id-of-this-model",
        norms=norms,
        project=PROJECT,
        results=[(_cell(metric), f"{value:.4g}") for metric, value in results.items()],
        rows=rows,
        task=task,
        trusted=_is_trusted(config),
        version=__version__,
        where=_cell(" ".join([*data_names[:1], *([f"({split})"] if split else [])]) or "-"),
    )
    section = section.replace(BEGIN, "").replace(END, "").strip()  # our markers stay ours, whatever a config contains
    if existing is None or is_form(existing):
        card.text = f"\n# {title}\n\n{BEGIN}\n{END}\n"
    for heading in made_up:
        card.text = card.text.replace(f"# {heading}\n\n{BEGIN}", f"# {title}\n\n{BEGIN}")
    card.text = _replace_section(card.text, section)

    data.library_name = data.library_name or "transformers"
    data.base_model = given["base_model"] or data.base_model
    data.license = data.license or given["license"] or _license_of(base_model)
    data.pipeline_tag = data.pipeline_tag or task
    own = ["hf_adanorm"] if specs or config.get("folded_norms") else []
    data.tags = _united(data.tags, own, norms, given["tags"]) or None
    if datasets:
        data.datasets = _united(data.datasets, datasets)
    if results:
        data.metrics = _united(data.metrics, results)
        data.model_name = data.model_name or title
        where = data_names[0] if data_names else "unknown"
        kind = datasets[0] if datasets else re.sub(r"[^\w.-]+", "-", where)
        fresh = [EvalResult(task or "other", kind, where, *result, dataset_split=split) for result in results.items()]
        old = [row for row in data.eval_results or [] if not any(row.is_equal_except_value(new) for new in fresh)]
        data.eval_results = [*old, *fresh]
    return str(card)


def renew_card(folder: Path, config: Mapping[str, Any], **details: Any) -> None:
    """Update our section of the folder's card to the given config.

    Write a card if a patched model has none, or only an empty form. Leave a card without our section as it is, and a
    section that already describes the model. Remove our section if the model has no swapped norms.
    """
    path = folder / CARD_NAME
    text = read_card(path)
    old = None if text is None or is_form(text) else text
    if old is not None and describes(old, config) is not False:
        return
    if _specs(config):
        more = {} if old is None else {"base_model": None}  # keep that of the existing card
        write_file(path, render_card(config, existing=text, **{**details, **more}))
    elif old is not None and (stripped := without_section(old)) != old:
        write_file(path, stripped)


def describes(text: str, config: Mapping[str, Any]) -> bool | None:
    """Check whether our section of a card belongs to a model with these norms. Return None if there is no section."""
    return None if BEGIN not in text else f"<!-- spec {_digest(_specs(config))} -->" in text


def without_section(text: str) -> str:
    """Return a card without our section, our tags and the results of the patched model."""
    before, begin, rest = text.partition(BEGIN)
    if not begin or END not in rest:
        return text
    after = rest.partition(END)[2].lstrip("\r\n")
    card = _parse(before.rstrip("\r\n") + "\n" + (f"\n{after}" if after else ""))
    _forget_model(card.data)
    return str(card)


def is_form(text: str) -> bool:
    """Check whether the card is the empty form that transformers writes for want of another, as nobody edited it."""
    return _FORM in text and _parse(text).text.split() == _form()


@functools.cache
def _form() -> Any:
    return ModelCard.from_template(ModelCardData(), model_description=_FORM).text.split()


def with_tags_of(form: str, text: str) -> str:
    """Return a card with the tags of the form that transformers wrote in its place."""
    card, tags = _parse(text), _united(_parse(form).data.tags)
    if not tags:
        return text
    card.data.tags = _united(card.data.tags, tags)
    return str(card)


def read_card(path: Path) -> str | None:
    """Return the text of a card, or None if there is no such file.

    Raises:
        ValueError: the file is not UTF-8 text, is a folder, or is a link out of the model's folder.
    """
    if not os.path.lexists(path):
        return None
    if leads_outside(path) or not path.is_file():
        raise ValueError(f"{path} is a folder or a link out of its folder, not a model card: move it away")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it or move it away") from None


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a saved model. Raises FileNotFoundError or ValueError."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the folder of a model saved with save_pretrained")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} contains a {type(config).__name__}, expected an object")
    return config


def base_model_of(config: PreTrainedConfig) -> str | None:
    """Return the Hub id that the model was loaded from, or None for a local folder or a fresh model."""
    name = getattr(config, "_name_or_path", None) or ""
    return name if _is_id(name) and not Path(name).exists() else None


def without_folders(command: str) -> str:
    """Return a command line without the folders of the machine that it ran on."""
    return re.sub(r"(?<![\w.:/-])(?:~|[A-Za-z]:)?/(?:[^\s/'\"]+/)*(?=[^\s/])", "", command).replace("```", "` ` `")


# ------------------------------------------------------------------------------------------------------- the section

_TEMPLATE = jinja2.Template(
    Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True
)


def _specs(config: Mapping[str, Any]) -> dict[str, AdaNormSpec]:
    """Return the model's spec under the name "", or those of its nested configs under their names."""
    if config.get("adanorm") is not None:
        return {"": AdaNormSpec.from_dict(config["adanorm"])}
    nested = {name: value for name, value in config.items() if isinstance(value, Mapping) and value.get("adanorm")}
    return {name: AdaNormSpec.from_dict(value["adanorm"]) for name, value in nested.items()}


def _digest(specs: Mapping[str, AdaNormSpec]) -> str:
    """Return a hash of the norms, the same for every version of the package."""
    content = {key: {**spec.to_dict(), "format": None, "version": None} for key, spec in specs.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _rows(specs: Mapping[str, AdaNormSpec]) -> list[dict[str, Any]]:
    """Return the rows of the table of norms, one for each group of a spec."""
    rows = []
    for where, spec in specs.items():
        for group in spec.groups:
            fields = group.to_dict()
            norm, names = fields.pop("norm"), fields.pop("modules")
            settings = ", ".join(f"{key} = {value}" for key, value in {**fields.pop("settings", {}), **fields}.items())
            modules = [f"`{name}`" for name in names]
            rows.append({"norm": norm, "settings": _cell(settings) or "-", "modules": modules, "where": where})
    return rows


def _is_trusted(config: Mapping[str, Any]) -> bool:
    """Check whether the repository carries the code that loads it."""
    auto_map = config.get("auto_map")
    entries = auto_map.items() if isinstance(auto_map, Mapping) else ()
    return any(str(name).startswith("AutoModel") and "--" not in str(target) for name, target in entries)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, (list, tuple)) and names else config.get("model_type")
    return name if isinstance(name, str) and name.isidentifier() else "model"


def _task(config: Mapping[str, Any], architecture: str) -> str | None:
    for task, (_, table) in _TASKS.items():
        found = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).get(config.get("model_type"))
        if architecture in (found if isinstance(found, (list, tuple)) else (found,)):
            return task
    return None


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    with suppress(OSError, ValueError):
        return "chat_template" in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return False


def _license_of(base_model: str | None) -> str | None:
    """Return the license in the card of the base model, if that is a folder or cached."""
    with suppress(OSError, ValueError):
        if base_model and (path := cached_file(base_model, CARD_NAME, local_files_only=True)):
            license_name = _parse(read_card(Path(path))).data.license
            return license_name if isinstance(license_name, str) else None
    return None


def _forget_model(data: ModelCardData) -> None:
    """Remove what the front matter says about the patched model that it was written for."""
    data.tags = [tag for tag in _united(data.tags) if tag not in {"hf_adanorm", *norm_names()}] or None
    if data.eval_results:
        data.eval_results = data.model_name = None


def _parse(text: str | None) -> Any:
    if text is None or not re.match(r"\s*---\s*\n", text):
        text = f"---\n{{}}\n---\n{text or ''}"
    try:
        return ModelCard(text)
    except Exception as error:  # errors of yaml and of huggingface_hub have no common class
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the front matter of {CARD_NAME} is not valid: {why}") from None


def _replace_section(text: str, section: str) -> str:
    if (BEGIN in text) != (END in text) or text.count(BEGIN) > 1 or text.find(BEGIN) > text.find(END):
        raise ValueError(f"{CARD_NAME} must contain both markers of hf_adanorm's section once and in order")
    before, _, rest = text.partition(BEGIN) if BEGIN in text else (f"{text.rstrip()}\n\n", "", f"{END}\n")
    return f"{before}{BEGIN}\n{section}\n{END}{rest.partition(END)[2]}"


def _is_id(name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name))


def _united(*values: Any) -> list[str]:
    """Return the entries of lists, single texts and None, each once."""
    lists = ([value] if isinstance(value, str) else value or () for value in values)
    return list(dict.fromkeys(str(entry) for entries in lists for entry in entries))


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("|", "\\|").replace("<", "&lt;"))
