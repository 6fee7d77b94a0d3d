"""One thread a process: the tests share few cores, and one thread makes results the same on every machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings

torch.set_num_threads(1)
# How long an example takes says nothing on a busy machine.
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")
