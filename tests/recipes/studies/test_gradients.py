"""The study of gradients, at toy size."""

import json
import sys

import pytest

from studies import gradients

ROWS = [{"text": f"word{n % 5} other{n % 3}", "label": n % 2, "de": f"wort{n % 5} noch{n % 3}"} for n in range(12)]
SIZES = ["--num_layers", "1", "--width", "8", "--num_steps", "3", "--every", "1", "--batch_size", "4"]


@pytest.mark.parametrize(
    ("norms", "more"),
    [("[layernorm,detachnorm]", []), ("[detachnorm:detach_mean=false,detachnorm]", ["--target_column", "de"])],
)
def test_every_norm_starts_alike_and_is_drawn(norms, more, tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    argv = ["gradients.py", "--train_file", str(tmp_path / "train.jsonl"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*argv, *SIZES, *more, "--norms", norms])
    gradients.main()
    found = json.loads((tmp_path / "out" / "gradients.json").read_text())
    first = [losses[0] for losses in found["losses"].values()]
    assert first == pytest.approx([first[0]] * len(first), abs=1e-6)  # fresh gains: the same function
    assert {row["step"] for row in found["records"]["DetachNorm"]} == {1, 2, 3}
    pictures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert pictures >= {"gradients", "losses", "theorem-detachnorm", "steps-detachnorm", "phi-detachnorm"}
    assert ("theorem-detachnorm-variance-only" in pictures) == ("detach_mean" in norms)
