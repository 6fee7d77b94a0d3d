"""Load checkpoints that another version of transformers saved, with the package and by trust.

    python tests/campaigns/checkpoints.py save FOLDER           # under each version
    python tests/campaigns/checkpoints.py load FOLDER           # then under each version
    python tests/campaigns/checkpoints.py load FOLDER --trust   # the same where hf_adanorm cannot be imported
    python tests/campaigns/checkpoints.py report FOLDER         # the table; exit code 1 if a model came out another

`nox -s checkpoints` does all of it. The control is a stock model saved beside the patched one: if its own
weights do not survive a change of version, the patched model is not checked.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

if "--trust" in sys.argv:
    sys.modules["hf_adanorm"] = None  # type: ignore[assignment]  # as if it were not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from torch import nn

from tests.zoo import tiny_inputs
from tests.zoo.todays_models import output

TYPES = (
    "bert", "gpt2", "bart", "marian", "clip", "vit", "deit", "beit", "dinov2", "dinov3_vit", "vivit", "swin",
    "whisper", "audio-spectrogram-transformer", "wav2vec2", "deberta-v2", "siglip", "llava", "mllama", "altclip",
    "clip_vision_model",
)  # fmt: skip
"""About half of them had modules renamed or moved between 5.0 and 5.24."""
TOLERANCE = 1e-6


def swapped(model: nn.Module) -> int:
    return sum(bool(getattr(type(module), "is_adanorm_module", False)) for module in model.modules())


def save(folder: Path) -> None:
    from hf_adanorm import patch_model

    for model_type in TYPES:
        here = folder / transformers.__version__ / model_type
        try:
            model, inputs = tiny_inputs.runnable(model_type)
        except tiny_inputs.UnsupportedError as error:
            print(f"{error} under {transformers.__version__}: {error.__cause__}"[:200])
            continue
        model.save_pretrained(here / "stock")
        sample = {"inputs": inputs, "stock": output(model, inputs)}
        patch_model(model, "adanorm", C=1.3, k=0.07)
        model.save_pretrained(here / "patched")
        auto_map = json.loads((here / "patched" / "config.json").read_text(encoding="utf-8"))["auto_map"]
        sample |= {"patched": output(model, inputs), "norms": swapped(model)}
        sample["auto"] = next(auto for auto, name in auto_map.items() if name.endswith(f".{type(model).__name__}"))
        torch.save(sample, here / "sample.pt")


def outcome(folder: Path, kind: str, sample: dict[str, Any], **options: Any) -> str:
    """Return "same", or what differs."""
    try:
        model = getattr(transformers, sample["auto"]).from_pretrained(folder / kind, **options)
        here = output(model, sample["inputs"])
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]
    if kind == "patched" and swapped(model) != sample["norms"]:
        return f"{swapped(model)} norms of {sample['norms']}"
    there = sample[kind]
    off = float((here - there).abs().max() / there.abs().max()) if here.shape == there.shape else float("nan")
    return "same" if off <= TOLERANCE else f"off by {off:.1e}"


def load(folder: Path, trust: bool) -> None:
    if not trust:
        import hf_adanorm  # noqa: F401
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        for path in sorted(folder.glob("*/*/sample.pt")):
            sample = torch.load(path)
            row = {"saved": path.parent.parent.name, "loaded": transformers.__version__, "type": path.parent.name}
            row["control"] = outcome(path.parent, "stock", sample)
            row["patched"] = outcome(path.parent, "patched", sample, **({"trust_remote_code": True} if trust else {}))
            file.write(json.dumps({**row, "way": "trust" if trust else "package"}) + "\n")


def report(folder: Path) -> int:
    """Print how many models came out the same per pair of versions and way to load, then those that did not."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    models: Counter[str] = Counter()
    same: Counter[str] = Counter()
    for row in rows:
        group = "| {saved} | {loaded} | {way} |".format(**row)
        models[group] += 1
        same[group] += row["patched"] == "same"
    print("| saved under | loaded under | way | models | the same |\n|---|---|---|---|---|")
    for group in sorted(models):
        print(f"{group} {models[group]} | {same[group]} |")
    different = [row for row in rows if row["patched"] != "same"]
    for row in different:
        print("{type}, {saved} to {loaded} by {way}: {patched} (stock: {control})".format(**row))
    return any(row["control"] == "same" for row in different)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("save", "load", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trust", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    if options.what == "report":
        return report(options.folder)
    if options.what == "save":
        save(options.folder)
    else:
        load(options.folder, options.trust)
    return 0


if __name__ == "__main__":
    sys.exit(main())
