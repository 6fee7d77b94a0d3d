"""Load a checkpoint and save the changed model without losses: what the commands of `hf-adanorm` share.

1. `load_config` and `empty_model` build the model without weights, to check options before anything is downloaded.
2. `load_model` loads the weights. Weights that the checkpoint lacks would be random: it raises. Weights that the model
   class does not use are kept in `Source.unused`.
3. `save_model` writes the model, the unused weights, and every other file that belongs to it.
4. `push_folder` uploads the result.
"""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._tables import listed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

# Files that `save_pretrained` writes anew or that belong to a training run. All other files are copied.
NOT_COPIED = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "*.pt", "*.pth", "*.h5", "*.msgpack"),
    *("*.ot", "*.ckpt", "*.gguf", "*.onnx", "*.onnx_data", "*.tflite", "config.json", "README.md", ".git*"),
    *("training_args.bin", "trainer_state.json", "adapter_*", "generation_config.json", "modeling_adanorm*.py"),
)
# Folders with the same weights in other formats, or of a training run.
FOLDERS_NOT_COPIED = ("onnx", "openvino", "coreml", "flax", "tf", "original", "runs", "logs", "checkpoint-*", ".*")


@dataclass
class Source:
    """The checkpoint that a command reads."""

    name: str
    """A Hub id or a folder."""
    revision: str | None = None
    architecture: str | None = None
    """The transformers class to load; by default the one that the config names."""
    trust_remote_code: bool = False
    """Whether to run the files of the author's norms that the checkpoint contains."""
    unused: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the checkpoint that the class does not use, once `load_model` has run."""


def load_config(source: Source) -> PreTrainedConfig:
    """Return the config of a checkpoint. Raises OSError or ValueError."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    name, folder = source.name, Path(source.name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        inner = [str(path.parent) for path in sorted(folder.glob("*/config.json"))]
        raise FileNotFoundError(f"{name} has no config.json{f'; give {inner[0]}' if inner else ''}")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{name}: no such folder")
    try:
        config = AutoConfig.from_pretrained(name, revision=source.revision)
    except OSError as error:
        if folder.is_dir():
            raise
        message = f"{name} is not a local folder, and the Hub has no such model or cannot be reached: {error}"
        raise OSError(message) from None
    if source.trust_remote_code:
        _import_classes(source, config)
    if source.architecture is not None:
        config.architectures = [source.architecture]
        model_class(config)
    return config  # type: ignore[no-any-return]


def _import_classes(source: Source, config: PreTrainedConfig) -> None:
    """Import the classes of the author's norms from the checkpoint, so that models with them load in this process."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from .norms import remember
    from .saving import all_configs
    from .spec import AdaNormSpec

    for data in filter(None, (getattr(part, "adanorm", None) for part in all_configs(config))):
        for entry in AdaNormSpec.from_dict(data).classes.values():
            reference = f"{Path(entry['file']).stem}.{entry['class']}"
            remember(get_class_from_dynamic_module(reference, source.name, revision=source.revision))


def model_class(config: PreTrainedConfig) -> Any:
    """Return the class that the config names, so that the head is kept, or AutoModel if it names none."""
    import transformers

    name = (config.architectures or [""])[0]
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    if name:
        raise ValueError(f"{name} is not a model class of transformers: give --architecture CLASS")
    return transformers.AutoModel


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model on the meta device: every module, without memory for weights."""
    import torch

    cls = model_class(config)
    with torch.device("meta"):
        build = cls.from_config if hasattr(cls, "from_config") else cls._from_config
        return build(config)  # type: ignore[no-any-return]


def load_model(source: Source, config: PreTrainedConfig, *, folds: bool = False) -> PreTrainedModel:
    """Load the model in the dtype of its checkpoint.

    Raises:
        ValueError: the checkpoint lacks weights other than those of norms, which start from gain 1 and bias 0; or with
            `folds` it has unused weights that may read a folded norm.
    """
    import transformers

    from .detection import iter_norms

    cls = model_class(config)
    whole = cls if cls is transformers.AutoModel else _that_ignores_nothing(cls)
    options: dict[str, Any] = {"dtype": "auto", "output_loading_info": True}
    model, info = whole.from_pretrained(source.name, revision=source.revision, config=config, **options)
    if whole is not cls:
        model.__class__ = cls
    norms = {norm for norm, _, _ in iter_norms(model)}
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    missing = sorted(info["missing_keys"])
    if random := [key for key in missing if key.rpartition(".")[0] not in norms and key not in tied]:
        raise ValueError(
            f"{source.name} lacks weights that {type(model).__name__} needs, which would be random: {listed(random)}. "
            "Give the class that the checkpoint was trained as: --architecture CLASS"
        )
    unused = sorted(info["unexpected_keys"])
    if folds and (readers := [key for key in unused if key.endswith(".weight")]):
        raise ValueError(
            f"{source.name} contains weights that the model does not use, which a fold would leave wrong: "
            f"{listed(readers)}. Give the class that uses them: --architecture CLASS"
        )
    source.unused = _read_tensors(source, unused)
    return model  # type: ignore[no-any-return]


def _that_ignores_nothing(cls: Any) -> Any:
    """Return a subclass that reports every unexpected key; transformers leaves out those that a class expects."""
    ignored = property(lambda model: set(), lambda model, patterns: None)
    members = {"_keys_to_ignore_on_load_unexpected": ignored, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), members)


def _read_tensors(source: Source, keys: list[str]) -> dict[str, Tensor]:
    """Read tensors from the files of a checkpoint, by key."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    if not keys:
        return {}
    folder = Path(source.name)
    if not folder.is_dir():
        folder = Path(snapshot_download(source.name, revision=source.revision, allow_patterns="*.safetensors"))
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            found |= {key: tensors.get_tensor(key) for key in set(keys) & set(tensors.keys())}
    if lost := [key for key in keys if key not in found]:
        raise ValueError(
            f"{source.name} contains weights that the model does not use and that cannot be kept: {listed(lost)}. "
            "Give the class that uses them (--architecture CLASS), or save it as safetensors first"
        )
    return found


def save_model(model: PreTrainedModel, source: Source, folder: Path) -> list[str]:
    """Save the model with all that belongs to it. Return the files of the source that were not copied."""
    left = copy_files(source.name, source.revision, folder)
    more: dict[str, Any] = {"state_dict": {**model.state_dict(), **source.unused}} if source.unused else {}
    model.save_pretrained(folder, **more)
    return left


def copy_files(name: str, revision: str | None, folder: Path) -> list[str]:
    """Copy the files beside the weights (tokenizer, processor, modules of Sentence Transformers) into `folder`.

    Returns:
        The files that were not copied, weights and training state aside: code, and links out of the folder.
    """
    from .saving import leads_outside

    source = Path(name) if Path(name).is_dir() else _download(name, revision)
    parts = _module_folders(source)
    left, outside = [], []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if not (path.is_file() or path.is_symlink()) or not _belongs(relative, parts):
            continue
        if leads_outside(path, source):
            outside.append(str(path))
        elif path.suffix == ".py":
            left.append(relative.as_posix())
        elif path.is_file():
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)
    if outside:
        warnings.warn(f"not copied, because these links lead out of the folder: {', '.join(outside)}", stacklevel=2)
    return left


def _download(name: str, revision: str | None) -> Path:
    """Download the files beside the weights. The card is among them, for its license."""
    from huggingface_hub import snapshot_download

    unwanted = [pattern for pattern in NOT_COPIED if pattern not in ("README.md", "config.json")]
    unwanted += [f"{folder}/*" for folder in FOLDERS_NOT_COPIED]
    source = Path(snapshot_download(name, revision=revision, ignore_patterns=unwanted))
    if parts := _module_folders(source):
        snapshot_download(name, revision=revision, allow_patterns=[f"{part}/*" for part in parts])
    return source


def _module_folders(source: Path) -> list[str]:
    """Return the folders of the modules that follow the transformer in a Sentence Transformers model."""
    try:
        modules = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        return [module["path"] for module in modules if module["path"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _belongs(path: Path, module_folders: list[str]) -> bool:
    if any(path.is_relative_to(folder) for folder in module_folders):
        return True  # with its weights
    if any(fnmatch(part, pattern) for part in path.parts[:-1] for pattern in FOLDERS_NOT_COPIED):
        return False
    return not any(fnmatch(path.name, pattern) for pattern in NOT_COPIED)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder. Rename it to `out` at the end, or delete it after an error.

    Raises:
        FileExistsError: `out` is a file, a folder that is not empty, or a mount point.
    """
    from .saving import TEMPORARY

    target = out.resolve()  # a link to an empty folder means that folder
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder: give a new one")
    if target.is_mount():
        raise FileExistsError(f"{out} is a mount point, which cannot be replaced: give a folder inside it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{TEMPORARY}{target.name}-{secrets.token_hex(8)}"
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_push(repo_id: str | None) -> None:
    """Raise ValueError for what would make a push fail, before any work is done."""
    from huggingface_hub.errors import LocalTokenNotFoundError
    from huggingface_hub.utils import build_hf_headers, validate_repo_id

    if repo_id is not None:
        validate_repo_id(repo_id)
        try:
            build_hf_headers(token=True)
        except LocalTokenNotFoundError as error:
            raise ValueError("--push-to-hub needs a token: run hf auth login, or set HF_TOKEN") from error


def push_folder(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a folder and return the address of the repository. The repository's card is kept; see `card.py`."""
    from huggingface_hub import HfApi

    from .saving import CARD_NAME, read_card, read_config, renew_card, write_file, write_model_card

    api = HfApi(library_name="hf_adanorm")
    ignore: list[str] = []
    try:
        # Without a wish, leave it to the Hub: an organization may make new repositories private.
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if api.file_exists(repo_id, CARD_NAME):
            try:
                write_file(folder / CARD_NAME, read_card(Path(api.hf_hub_download(repo_id, CARD_NAME))) or "")
                renew_card(folder, read_config(folder), model_id=repo_id)
            except ValueError as error:
                warnings.warn(f"the card of {repo_id} is unchanged: {error}", stacklevel=2)
                ignore = [CARD_NAME]
        elif (folder / CARD_NAME).exists():
            write_model_card(folder, model_id=repo_id)
        message = "Upload model"
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=ignore)
    except Exception as error:  # errors of the network have no common class
        again = shlex.join(["hf", "upload", repo_id, str(folder), *["--private"] * bool(private)])
        raise OSError(f"{error}; {folder} is complete, and `{again}` pushes it") from error
    return f"{api.endpoint}/{repo_id}"
