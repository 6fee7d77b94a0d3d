"""Choices and help of the options of `patch_model` that belong to no norm. Imports neither torch nor transformers."""

from __future__ import annotations

CHOICES = {
    "targets": ("auto", "layernorm", "rmsnorm", "all"),
    "affine": ("drop", "fold"),
    "unfoldable": ("keep", "approximate", "calibrate", "raise"),
    "tied": ("keep", "untie"),
}
HELP = {
    "include": "swap only norms whose name ends like this; * matches anything between two dots, re: starts a regular "
    "expression; repeatable",
    "exclude": "skip these norms; written like --include",
    "layers": "swap only norms of this layer, counted from 0, negative from the end; repeatable",
    "targets": "the kind of norm to swap; auto, the default: the norms on the residual stream",
    "eps": "added to the variance; by default that of the replaced norm",
    "centered": "whether the mean is subtracted; by default as the replaced norm does",
    "affine": "drop the trained gains and biases (the default), or fold them as `hf-adanorm fold` does",
    "unfoldable": "what to do with a norm that does not fold exactly (default: keep)",
    "tied": "keep a head that is tied to an embedding (the default), or untie it and fold into the copy",
    "tolerance": "largest change of an output by a fold, relative to the largest value of that output",
}
"""The text that `--help` shows, by option."""
