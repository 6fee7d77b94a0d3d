"""What norms do to activations and gradients, and where two models part ways."""
