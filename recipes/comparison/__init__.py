"""Norms compared over seeds: the runs, significance, the paper's figures, the report."""
