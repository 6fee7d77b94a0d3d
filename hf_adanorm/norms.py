"""Name norms: the built-in ones, registered classes, and classes in the user's files.

A norm is given as a name ("adanorm"), a class, a `functools.partial` of a class, or a text such as
"my_norms.py:Derf:alpha=0.7" or "package.module:Derf". `resolve_norm` turns all of these into a class and its settings.
The settings of a norm are the keyword-only parameters of its constructor.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

BUILT_IN = {
    "adanorm": "AdaNorm",
    "layernorm-simple": "LayerNormSimple",
    "detachnorm": "DetachNorm",
    "none": "NoNorm",
    "dyt": "DyT",
}
"""The class of each built-in norm in `modeling_adanorm.py`, by name."""
TITLES = {"layernorm": "LayerNorm", **BUILT_IN, "layernorm-simple": "LayerNorm-simple", "none": "w/o Norm"}
"""Names for tables and plots."""
STOCK = "layernorm"  # accepted wherever norms are named: the model's own norms
NAME_CUTOFF = 0.8  # for did_you_mean: "adanrom" is a misspelling, but "rmsnorm" means another norm, not "layernorm"
_REGISTERED: dict[str, type] = {}
_USED: list[type] = []  # the classes of the user's that were swapped in without a registered name
_FROM_FOLDER: ContextVar[Mapping[str, type] | None] = ContextVar("hf_adanorm_classes", default=None)


# ------------------------------------------------------------------------------------------------------- the names


def register_norm(name: str, cls: type) -> None:
    """Give a norm class a short name, for `patch_model`, command lines, reports and the files of saved models.

    Args:
        name: letters, digits, `-`, `_` and `.`, such as "derf".
        cls: an `nn.Module` whose constructor takes `(normalized_shape, eps, ...)`.

    Raises:
        TypeError, ValueError: `cls` is not such a class; a name of another norm, or with other characters.
    """
    check_class(cls)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name):
        raise ValueError(f"name must consist of letters, digits, '-', '_' and '.', such as 'derf', got {name!r}")
    if name in BUILT_IN or name == STOCK:
        raise ValueError(f"{name!r} is the name of a built-in norm: choose another one")
    old, new = (f"{each.__module__}.{each.__qualname__}" for each in (_REGISTERED.get(name, cls), cls))
    if old != new:  # a notebook cell or `importlib.reload` may make the class once more
        raise ValueError(f"{name!r} is already the name of {old}: choose another one")
    _REGISTERED[name] = cls


def norm_names() -> list[str]:
    """Return the names of all norms: the built-in ones, then the registered ones."""
    return [*BUILT_IN, *_REGISTERED]


def name_of(cls: type) -> str:
    """Return the name of a norm class: the registered one, else that of the class."""
    own = getattr(cls, "norm_name", "")
    if isinstance(own, str) and own in BUILT_IN:
        return own
    return next((name for name, known in _REGISTERED.items() if known is cls), cls.__name__)


def did_you_mean(value: Any, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; did you mean 'x'?" for the nearest of `known`, or "" if none has a similarity of `cutoff` (0 to 1)."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(value)[:100].lower(), by_lower, n=1, cutoff=cutoff)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


# ------------------------------------------------------------------------------------------------------ a norm given


def resolve_norm(norm: Any) -> tuple[type, dict[str, Any]]:
    """Return the class of a norm and the settings that come with it.

    Args:
        norm: a name, a class, a `functools.partial` of a class with keyword arguments, or a text as in `parse_norm`.

    Raises:
        TypeError, ValueError, FileNotFoundError: no norm, an unknown name or setting, a missing file.
    """
    settings: dict[str, Any] = {}
    if isinstance(norm, functools.partial):
        if norm.args:
            raise TypeError(f"functools.partial of a norm takes keyword arguments only, got {norm.args!r}")
        settings, norm = dict(norm.keywords), norm.func
    if isinstance(norm, str) and ":" in norm:
        norm, settings = parse_norm(norm)
    if isinstance(norm, str):
        norm = _class_of(norm)
    if not isinstance(norm, type):
        raise TypeError(f"norm must be a name, a class or a functools.partial of a class, got {norm!r:.100}")
    if norm.__name__ not in BUILT_IN.values() or not hasattr(norm, "is_adanorm_module"):
        check_class(norm)
    check_settings(norm, settings)
    return norm, settings


def _class_of(name: str) -> type:
    if name in BUILT_IN:
        return getattr(importlib.import_module(f"{__package__}.modeling_adanorm"), BUILT_IN[name])  # type: ignore[no-any-return]
    if name.endswith(".py"):
        raise ValueError(f"{name!r} names a file without a class: write {name}:CLASS")
    if name not in _REGISTERED:
        known = [*norm_names(), STOCK]
        raise ValueError(
            f"norm must be one of {known}, a class, or a text such as 'my_norms.py:Derf', got {name[:60]!r}"
            f"{did_you_mean(name, known, cutoff=NAME_CUTOFF)}"
        )
    return _REGISTERED[name]


def parse_norm(text: str) -> tuple[str | type, dict[str, Any]]:
    """Split a norm as command lines give it into the norm and its settings.

    >>> parse_norm("adanorm:k=0.05")
    ('adanorm', {'k': 0.05})

    Args:
        text: "NAME", "FILE.py:CLASS" or "PACKAGE.MODULE:CLASS", each with ":SETTING=VALUE" as often as needed.

    Raises:
        ValueError, FileNotFoundError: the text has another form, or there is no such class or file.
    """
    parts = re.split(r":(?![\\/])", text)  # not the colon of a drive letter
    first = 1 + (len(parts) > 1 and "=" not in parts[1] and parts[0] not in norm_names())
    settings = {}
    for part in parts[first:]:
        key, sign, value = part.partition("=")
        if not sign or not key.isidentifier():
            raise ValueError(f"{part!r} in {text!r} is not of the form SETTING=VALUE")
        settings[key] = parse_value(value)
    return (parts[0] if first == 1 else load_class(parts[0], parts[1])), settings


def parse_value(text: str) -> Any:
    """Return the value of a setting as command lines give it: a number, true, false, null, or else a text."""
    words = {"true": "True", "false": "False", "null": "None", "none": "None"}
    try:
        value = ast.literal_eval(words.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, (int, float, str, type(None))) else text


def load_class(where: str, name: str) -> type:
    """Import the file or module `where` and return its class `name`. A file may use `from .x import` in its folder."""
    if where.endswith(".py"):
        path = Path(where).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"{where} does not exist, which should hold the norm {name}")
        # The folder becomes a package of its own, so that `from .helpers import x` works.
        package = f"_hf_adanorm_{hashlib.sha256(str(path.parent).encode()).hexdigest()[:16]}"
        if package not in sys.modules:
            module = types.ModuleType(package)
            module.__path__ = [str(path.parent)]
            sys.modules[package] = module
        found = importlib.import_module(f"{package}.{path.stem}")
    else:
        if not re.fullmatch(r"\w+(\.\w+)*", where):
            raise ValueError(f"{where!r} is neither a file that ends in .py nor the name of a module")
        try:
            found = importlib.import_module(where)
        except ModuleNotFoundError as error:
            hint = f"; a file is named as {where}.py:{name}" if Path(f"{where}.py").is_file() else ""
            raise ValueError(f"there is no module {where!r} ({error}){hint}") from error
    cls = getattr(found, name, None)
    if not isinstance(cls, type):
        classes = [key for key, value in vars(found).items() if isinstance(value, type)]
        raise ValueError(f"{where} has no class {name!r}{did_you_mean(name, classes)}")
    return cls


# ------------------------------------------------------------------------------------------------------- the settings


# What a constructor takes besides its settings.
_RESERVED = {"normalized_shape", "eps", "centered", "channels_first", "output_dtype"}
_RESERVED |= {"device", "dtype", "training", "norm", "weight"}


def settings_of(cls: type) -> Mapping[str, Any]:
    """Return the settings of a norm class with their defaults: the keyword-only parameters of its constructor.

    `**kwargs` hands on to the base class. A setting without a default has `inspect.Parameter.empty`.
    """
    return _settings(cls)


@functools.lru_cache(maxsize=64)  # a state dict asks once per norm
def _settings(cls: type) -> Mapping[str, Any]:
    found: dict[str, Any] = {}  # of the constructors from `cls` up, as far as each passes **kwargs on
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base.__module__.startswith("torch.nn"):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _RESERVED}
        found = {**own, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def computes_n(cls: type) -> bool:
    """Tell whether a class declares (`plain_settings`) with which settings it computes N(x), without gain and bias."""
    return getattr(cls, "plain_settings", None) is not None


def check_class(cls: Any) -> None:
    """Raise TypeError unless `cls` is an `nn.Module` whose constructor takes `(normalized_shape, eps, ...)`, and
    ValueError if it is called like a built-in norm."""
    from torch import nn  # noqa: PLC0415

    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"a norm must be a class derived from torch.nn.Module, got {cls!r:.100}")
    if cls.__module__.partition(".")[0] == "torch" or cls.__init__ in (nn.LayerNorm.__init__, nn.RMSNorm.__init__):
        raise TypeError(
            f"{cls.__name__} is a class of torch: use norm='layernorm' to keep the norms of the model, or write a "
            "class of your own, in a file such as my_norms.py"
        )
    parameters = list(inspect.signature(cls).parameters.values())
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)]
    if named[1:2] != ["eps"]:
        raise TypeError(
            f"the constructor of {cls.__name__} must begin with (normalized_shape, eps, ...), followed by settings as "
            f"keyword-only parameters; it takes {inspect.signature(cls)}"
        )
    extra = [p.name for p in parameters[2:] if p.kind == p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    if extra:
        raise TypeError(f"{extra[0]} of {cls.__name__} must be keyword-only (put it after a `*`) to be a setting")
    if name_of(cls) in (*BUILT_IN, STOCK):
        raise ValueError(f"the class {cls.__name__!r} has the name of a built-in norm: give it another one")


def check_settings(cls: type, settings: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError for a setting that `cls` does not have, or that a config cannot hold."""
    known = settings_of(cls)
    for name, value in settings.items():
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"{name!r} is not a setting of {name_of(cls)!r}, which has {sorted(known)}{hint}")
        for item in value.values() if isinstance(value, Mapping) else [value]:
            check_value(name, item)


def check_value(name: str, value: Any) -> None:
    """Raise ValueError or TypeError for a value of a setting that JSON cannot hold, or that a loader would refuse."""
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        if len(repr(value)) >= 80:
            raise ValueError(f"{name} must be a text of fewer than 78 characters, got {len(value)}: {value[:20]!r}...")
    elif not (isinstance(value, (int, float)) or hasattr(value, "__float__")):
        raise TypeError(f"{name} must be a number, a truth value or a text, got {value!r:.100}")
    elif not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}: JSON has no other")


# -------------------------------------------------------------------------------- the classes of saved models


def remember(cls: type) -> None:
    """Let models saved with this class load again in this process."""
    if cls not in _USED and cls not in _REGISTERED.values():
        _USED.append(cls)


def known_classes() -> list[type]:
    """Return the classes that this process has registered or swapped in."""
    return [*_REGISTERED.values(), *_USED]


@contextmanager
def classes_from_folder(classes: Mapping[str, type]) -> Iterator[None]:
    """Let models that are loaded in the block use the classes of their own folder, and no others."""
    token = _FROM_FOLDER.set(classes)
    try:
        yield
    finally:
        _FROM_FOLDER.reset(token)


def find_classes(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, type]:
    """Return the class of each entry in `classes` of a spec.

    Raises:
        ValueError: the class is not known here, or its file has another content than the one that was saved.
    """
    from_folder = _FROM_FOLDER.get()
    if from_folder is None:
        return {name: _find_class(name, entry) for name, entry in entries.items()}
    if lost := entries.keys() - from_folder.keys():
        raise ValueError(f"the folder's own code does not provide the norm {min(lost)!r}: it was changed by hand")
    return {name: from_folder[name] for name in entries}


def _find_class(name: str, entry: Mapping[str, Any]) -> type:
    candidates = [_REGISTERED[name]] if name in _REGISTERED else []
    candidates += [cls for cls in known_classes() if cls.__name__ == entry["class"] and cls not in candidates]
    for cls in candidates:
        files = files_of(cls)
        if files and {path.name: digest(path) for path in files} == entry["files"]:
            return cls
    file, trust = entry["file"], "load with trust_remote_code=True, which executes the files in the model's folder"
    if candidates:
        known = f"{candidates[0].__module__}.{candidates[0].__qualname__}"
        raise ValueError(
            f"the norm {name!r} of this model was saved with another version of {file} than that of {known}. "
            f"Use the version that it was saved with, or {trust}"
        )
    raise ValueError(
        f"this model uses the norm {name!r}, the class {entry['class']} of {file}: import {file.removesuffix('.py')} "
        f"and call register_norm({name!r}, {entry['class']}), or {trust}"
    )


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(cls: type) -> list[Path]:
    """Return the file of a class and those that it imports by `from .name import ...`; [] if it has no file."""
    found = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if found is None or cls.__module__ == "__main__":
        return []
    files = [Path(found)]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and "." not in node.module:
                near = path.with_name(f"{node.module}.py")
                files += [near] if near.is_file() and near not in files else []
    return files
