"""Load every saved model in a process where hf_adanorm cannot be imported: FOLDER OUT, called by test_saving.py."""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.modules["hf_adanorm"] = None  # type: ignore[assignment]  # as if it were not installed

import torch
import transformers

from tests.zoo.round_trip import CASES, SWAPS, auto_class, inputs, norms, run


def load(folder: Path, case: str) -> dict[str, Any]:
    cls = auto_class(CASES[case].auto_class)
    error = None
    try:
        cls.from_pretrained(folder)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    model, info = cls.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    return {
        "without_trust": error,
        "class": type(model).__name__,
        "info": {key: list(value) for key, value in info.items()},
        "norms": norms(model),
        "state": model.state_dict(),
        "run": run(model, inputs(case)),
        "model": model,
    }


def main(folder: Path, out: Path) -> None:
    try:
        import hf_adanorm  # noqa: F401
    except ImportError:
        pass
    else:
        raise SystemExit("hf_adanorm can be imported here")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    results = {}
    for case in CASES:
        for swap in SWAPS:
            results[case, swap] = load(folder / case / swap, case)
        results[case, "adanorm"]["model"].save_pretrained(folder / case / "resaved")
        results[case, "resaved"] = load(folder / case / "resaved", case)
    deeper = auto_class(CASES["bert"].auto_class).from_pretrained(
        folder / "bert" / "adanorm", num_hidden_layers=4, trust_remote_code=True
    )
    results["bert", "deeper"] = {"state": deeper.state_dict(), "model": None}
    for result in results.values():
        del result["model"]
    torch.save(results, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
