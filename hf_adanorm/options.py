"""Choices and help of the options of `patch_model` that belong to no norm. Imports neither torch nor transformers."""

from __future__ import annotations

CHOICES = {
    "targets": ("auto", "layernorm", "rmsnorm", "all"),
    "affine": ("drop", "fold"),
    "unfoldable": ("keep", "approximate", "calibrate", "raise"),
    "tied": ("keep", "untie"),
}
HELP = {
    "eps": "added to the variance; by default what the replaced norm uses",
    "centered": "whether the mean is subtracted; by default as the replaced norm does",
    "include": "swap only norms whose name ends so; * is anything between dots, re: starts a regular expression",
    "targets": "kind of norm to swap; auto: those on the residual stream",
}
"""The text that `--help` shows, by option."""
