"""Train a classifier of texts or images with AdaNorm, another norm, or LayerNorm as the control.

    accelerate launch recipes/classification.py --config recipes/configs/demo.yaml --norm adanorm
    accelerate launch --multi_gpu recipes/classification.py --config recipes/configs/rt.yaml --mixed_precision bf16

The model is fresh, from `model_config`, or pretrained, from a name or a folder. The data come from the Hub or from
local files. Run the same command again to resume from the newest complete checkpoint in `output_dir`.

`output_dir` then contains `results.json`, `checkpoint-N/`, and the best model with its tokenizer as `best/`: load it
with `pipeline("text-classification", ...)` after `import hf_adanorm`.
"""

from __future__ import annotations

from common.options import parse_options
from tasks.options import ClassificationOptions

if __name__ == "__main__":  # help, and mistakes in the options, before torch is imported
    parse_options(ClassificationOptions, description=__doc__)

import json
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

from common.checkpoints import write_json
from common.evaluation import accuracy, mean
from common.loop import Run
from tasks.data import data_content
from tasks.images import prepare_image
from tasks.text import ClassificationTask, prepare_text

OPTIONS, TASK = ClassificationOptions, ClassificationTask
PREPARE = {"text": prepare_text, "image": prepare_image}


def evaluate(run: Run, task: ClassificationTask) -> dict[str, float]:
    """Return loss and accuracy (percent) on the validation split, the same on every process."""

    def outputs_of(batch: dict[str, torch.Tensor], indices: list[int]) -> list[tuple[int, float]]:
        labels = batch.pop("labels")
        logits = run.model(**batch).logits.float()  # (batch, classes)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return list(zip(logits.argmax(-1).tolist(), losses.tolist(), strict=True))

    data = task.splits["validation"]
    outputs = run.evaluate(data, task.lengths["validation"], task.collate, outputs_of)
    correct = accuracy([output[0] for output in outputs], data["labels"][:])
    return {"accuracy": correct, "loss": mean([output[1] for output in outputs])}


def test_scores(run: Run, task: ClassificationTask, model: Path) -> dict[str, float] | None:
    """Return the accuracy on the test split of the saved model, loaded by stock calls in a fresh process."""
    if task.raw_test is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder) / "test.parquet", Path(folder) / "predictions.json"
        task.raw_test.select_columns(task.columns).to_parquet(data)
        arguments = {"model": model.resolve(), "data": data, "output": output, "columns": task.columns}
        run.fresh_process("predict.py", task=run.options.task, **arguments)
        found = json.loads(output.read_text(encoding="utf-8"))
    predictions = [task.names.index(prediction["label"]) for prediction in found]
    labels = task.splits["test"]["labels"][:]
    write_json(run.output_dir / "test_predictions.json", {"predictions": predictions, "labels": labels})
    return {"accuracy": accuracy(predictions, labels)}


def main(argv: list[str] | None = None) -> None:
    """Set up, train, test the best model in a fresh process, and write `results.json`."""
    options = parse_options(ClassificationOptions, argv, __doc__)
    run = Run(options, argv, __file__, data_content)
    if run.finished:
        return
    task = run.prepare(PREPARE[options.task])
    with run.training():
        for step in run:
            for batch in step:
                labels = batch.pop("labels")
                logits = run.model(**batch).logits.float()  # (micro-batch, classes)
                loss = F.cross_entropy(logits, labels, reduction="sum") / step.size
                run.backward(loss, batch)
            if step.evaluates:
                run.note(evaluate(run, task))
        best = run.best()
        if run.alone():
            sizes = {"train_samples": len(task.train_data), "train_tokens": sum(task.lengths["train"])}
            if "test" in task.splits:  # what a model that has learned nothing scores
                labels = task.splits["test"]["labels"][:]
                sizes["chance"] = Counter(labels).most_common(1)[0][1] / len(labels)
            run.write_results({"test": test_scores(run, task, best), **sizes})


if __name__ == "__main__":
    main()
