"""Studies, each a script of its own: what norms do to gradients, to pretrained models, to speed."""
