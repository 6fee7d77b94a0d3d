"""What the norms cost, measured: contenders, measurements, report."""

from .measure import LEVELS, MODES, run_bench
