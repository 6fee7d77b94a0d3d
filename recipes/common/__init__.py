"""What all recipes share: the loop, options, set-up, batches, steps, checkpoints, evaluation, results, publishing."""

import importlib.util
import sys

NEEDED = ("accelerate", "datasets", "numpy", "PIL", "tqdm", "yaml")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    print(f"error: not installed: {', '.join(missing)}. In the checkout: pip install -e '.[recipes]'", file=sys.stderr)
    sys.exit(2)
