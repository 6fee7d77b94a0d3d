"""What the norms cost, measured: contenders, measurements, report."""
