"""What all recipes share: the loop, options, set-up, batches, steps, checkpoints, evaluation, results, publishing."""

import importlib.util
import sys


def require(*modules: str) -> None:
    """End the process with one line unless these modules are installed."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        hint = "In the checkout: pip install -e '.[recipes]'"
        print(f"error: not installed: {', '.join(missing)}. {hint}", file=sys.stderr)
        sys.exit(2)


require("accelerate", "datasets", "numpy", "PIL", "yaml")
