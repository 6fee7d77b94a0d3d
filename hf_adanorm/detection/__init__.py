"""Which modules of a model are norms, and what they compute: found by running copies of them, never by their names."""

from .walk import NormInfo, check_module, iter_norms, recognize

__all__ = ["NormInfo", "check_module", "iter_norms", "recognize"]
