"""Gains and biases folded into the linear layers that read a norm: consumers, plan, fit, and what the user calls."""

from .fold import FoldReport, OnUnfoldable, fold_affine, fold_norms
from .plan import comes_in
