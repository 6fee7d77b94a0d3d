"""Gains and biases folded into the linear layers that read a norm: consumers, plan, fit, and what the user calls."""

from .fold import fold_affine, fold_norms
