"""The spec: what was swapped in a model, the value of `config.adanorm`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .modeling_adanorm import FORMAT, NORM_CLASSES, __version__, check, is_name, read_spec


@dataclass(frozen=True, kw_only=True)
class NormGroup:
    """Modules that share their settings, one entry of the spec's `groups`. What is None is read off each module."""

    norm: str
    """The name of a built-in norm, such as "adanorm", or a key of the spec's `classes`."""
    modules: tuple[str, ...]
    """Names in the base model, such as "encoder.layer.*.output.LayerNorm", as in the keys of the checkpoint. `*`
    stands for one number, a leading `^` marks a module outside of the base model."""
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Arguments of the norm's constructor, by name."""
    centered: bool | None = None
    """Whether the mean is subtracted."""
    eps: float | None = None
    """Added to the variance."""
    channels_first: bool | None = None
    """Whether axis 1 is normalized instead of the trailing axes."""
    normalized_shape: tuple[int, ...] | None = None
    """Sizes of the normalized axes."""
    output_dtype: str | None = None
    """How the dtype of the outputs depends on that of the weight."""

    def to_dict(self) -> dict[str, Any]:
        """Return the group as JSON types."""
        given = {key: value for key, value in vars(self).items() if value not in (None, {})}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}


@dataclass(frozen=True, kw_only=True)
class AdaNormSpec:
    """What was swapped in a model: the value of `config.adanorm`, as a dictionary there.

    >>> spec = AdaNormSpec(groups=(NormGroup(norm="adanorm", settings={"k": 0.1}, modules=("encoder.layer.*.norm",)),))
    >>> AdaNormSpec.from_dict(spec.to_dict()) == spec
    True
    """

    groups: tuple[NormGroup, ...] = ()
    """The swapped modules, grouped by their norm and its settings."""
    biases: tuple[str, ...] = ()
    """Linear layers that were given a bias by a fold, named as in `NormGroup.modules`."""
    eps: Mapping[str, float] = field(default_factory=dict)
    """The eps of norms that were not swapped but whose eps a fold adjusted."""
    classes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The author's norms by name. Each has the name of its class, its file, and the SHA-256 of its files, such as
    {"class": "Derf", "file": "my_norms.py", "files": {"my_norms.py": "..."}}."""

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON types: format, version, groups, and biases, eps and classes where there are any."""
        out = {"format": FORMAT, "version": __version__, "groups": [group.to_dict() for group in self.groups]}
        more = {"biases": list(self.biases), "eps": dict(self.eps), "classes": dict(self.classes)}
        return {**out, **{key: value for key, value in more.items() if value}}

    def names(self) -> list[str]:
        """Return every name of a module."""
        return [*(name for group in self.groups for name in group.modules), *self.biases, *self.eps]

    @classmethod
    def from_dict(cls, data: Any) -> AdaNormSpec:
        """Return the inverse of `to_dict`.

        Raises:
            TypeError, ValueError: for anything that `to_dict` does not write, and for a higher format.
        """
        classes = data.get("classes") if isinstance(data, dict) else None
        spec = read_spec(data, classes if isinstance(classes, dict) else ())
        for name, entry in spec["classes"].items():
            files = entry.get("files") if isinstance(entry, dict) and entry.keys() == {"class", "file", "files"} else 0
            fine = isinstance(files, dict) and all(
                map(is_name, [entry["class"], entry["file"], *files, *files.values()])
            )
            what = f"class {name!r} of config.adanorm needs a name that is not built in, a class, file and files"
            check(fine and name not in NORM_CLASSES, what, entry)
        given: list[dict[str, Any]] = [
            {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
            for group in spec["groups"]
        ]
        groups, biases = tuple(NormGroup(**group) for group in given), tuple(spec["biases"])
        return cls(groups=groups, biases=biases, eps=spec["eps"], classes=spec["classes"])
