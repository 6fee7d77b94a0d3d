"""Train a byte-level language model with AdaNorm, another norm, or LayerNorm as the control.

    accelerate launch recipes/language_modeling.py --config recipes/configs/enwik8.yaml --train_file enwik8.zip
    accelerate launch recipes/language_modeling.py --config recipes/configs/enwik_sample.yaml --train_file a_text.txt

A decoder from `model_config` reads the bytes of a text file. The score is bits per character (byte), as usual for
enwik8. Every byte is scored once, with at least `sequence_length - eval_stride` bytes of context. A model with a
memory (Transformer-XL: XLNet with `attn_type: uni`) reads the text as contiguous streams, one per row of a batch, and
carries its memory from segment to segment, in evaluation too. Run the same command again to resume from the newest
complete checkpoint in `output_dir`.

`output_dir` then contains `results.json`, `test_bits.json`, `checkpoint-N/`, and the best model with its tokenizer as
`best/`: load it with `pipeline("text-generation", ...)` after `import hf_adanorm`.
"""

from __future__ import annotations

from common.options import parse_options
from tasks.options import LanguageModelingOptions

if __name__ == "__main__":  # help, and mistakes in the options, before torch is imported
    parse_options(LanguageModelingOptions, description=__doc__)

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from common.checkpoints import write_json
from common.evaluation import gather_by_index
from common.loop import Run
from tasks.bytes import ByteTask, Memory, collate_windows, prepare_bytes, stream_bits, window_bits
from tasks.data import data_content

OPTIONS, TASK = LanguageModelingOptions, ByteTask


def scores_of(bits: Sequence[float], characters: Sequence[int]) -> dict[str, float]:
    """Return bits per character, and the loss in nats, of windows."""
    score = sum(bits) / sum(characters)
    return {"bits_per_character": score, "loss": score * math.log(2)}


def evaluate(run: Run, task: ByteTask) -> dict[str, float]:
    """Return bits per character and loss of the validation text, the same on every process."""

    def outputs_of(batch: dict[str, torch.Tensor], indices: list[int]) -> list[tuple[float, int]]:
        return list(zip(window_bits(run.model, batch).tolist(), batch["scored"].sum(1).tolist(), strict=True))

    most = run.options.max_validation_samples
    if task.windows is not None:
        total = min(len(task.windows), most or len(task.windows))
        outputs = run.evaluate(task.windows, [1] * total, collate_windows, outputs_of)
    else:
        length, processes = run.options.sequence_length, run.accelerator.num_processes
        # Each stream starts with an empty memory, so their number must not depend on the number of processes.
        data = task.splits["validation"][: most and most * length + 1]
        share = {"rank": run.accelerator.process_index, "num_processes": processes, "before_each": run.stop_if_asked}
        run.model.eval()
        indices, own = stream_bits(run.model, data, length, run.options.eval_batch_size, **share)
        run.model.train()
        outputs = gather_by_index(run.accelerator, indices, own, -(-(len(data) - 1) // length))
    return scores_of([output[0] for output in outputs], [output[1] for output in outputs])


def test_scores(run: Run, task: ByteTask, model: Path) -> dict[str, float] | None:
    """Return the scores of the saved model on the test split, from a fresh process that loads it by stock calls."""
    options = run.options
    if not options.score_test or "test" not in task.splits:
        return None
    with tempfile.TemporaryDirectory() as folder:
        text, output = Path(folder) / "test.txt", Path(folder) / "bits.json"
        text.write_bytes(task.splits["test"].tobytes())
        arguments = {"model": model.resolve(), "data": text, "output": output}
        if task.windows is not None:  # a memory reads streams
            arguments["stride"] = options.eval_stride
        run.fresh_process("score_bytes.py", sequence_length=options.sequence_length, **arguments)
        scores = json.loads(output.read_text(encoding="utf-8"))
    write_json(run.output_dir / "test_bits.json", scores)
    return scores_of(scores["bits"], scores["characters"])


def main(argv: list[str] | None = None) -> None:
    """Set up, train, test the best model in a fresh process, and write `results.json`."""
    options = parse_options(LanguageModelingOptions, argv, __doc__)
    run = Run(options, argv, __file__, data_content)
    if run.finished:
        return
    task = run.prepare(prepare_bytes)
    memory = Memory(run.accelerator, run.bare.config)
    with run.training():
        for step in run:
            if run.progress.epoch_step == 0:
                memory.held.clear()  # the streams begin anew
            for number, segment in enumerate(step):
                inputs = {"input_ids": segment[:, :-1], **memory.inputs(number)}
                output = run.model(**inputs)
                memory.keep(number, output)
                logits = output.logits.float()  # (micro-batch, length, bytes)
                loss = F.cross_entropy(logits.transpose(1, 2), segment[:, 1:], reduction="sum") / step.size
                run.backward(loss, inputs)
            if step.evaluates:
                run.note(evaluate(run, task))
        best = run.best()
        if run.alone():
            speed = run.stopwatch.samples_per_second  # in characters
            results = {
                "test": test_scores(run, task, best),
                "train_samples": len(task.train_data),
                "train_tokens": len(task.splits["train"]),
                "train_samples_per_second": speed and speed / options.sequence_length,
                "train_characters_per_second": speed,
            }
            run.write_results(results)


if __name__ == "__main__":
    main()
