"""Find the norms of a model, and what they compute, by running copies of modules and not by their names."""

from .probe import NormInfo
from .stream import is_stack, off_stream
from .walk import check_module, iter_norms, recognize
