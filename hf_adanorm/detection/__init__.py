"""Which modules of a model are norms, and what they compute: found by running copies of them, never by their names."""

from .probe import NormInfo
from .stream import is_stack, off_stream, reads_values
from .walk import check_module, iter_norms, recognize
