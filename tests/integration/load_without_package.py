"""Load every saved model in a process where hf_adanorm cannot be imported: FOLDER OUT, called by test_saving.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.zoo.round_trip import CASES, PAIRS, auto_class, inputs, norms, run


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


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    assert sys.modules["hf_adanorm"] is None
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    results = {(case, swap): load(folder / case / swap, case) for case, swap in PAIRS}
    for case in CASES:
        results[case, "adanorm"]["model"].save_pretrained(folder / case / "resaved")
        results[case, "resaved"] = load(folder / case / "resaved", case)
    deeper = auto_class(CASES["bert"].auto_class).from_pretrained(
        folder / "bert" / "adanorm", num_hidden_layers=4, trust_remote_code=True
    )
    results["bert", "deeper"] = {"state": deeper.state_dict(), "model": None}
    for result in results.values():
        del result["model"]
    torch.save(results, out)
