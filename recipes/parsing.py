"""Train a dependency parser with AdaNorm, another norm, or LayerNorm as the control.

    accelerate launch recipes/parsing.py --config recipes/configs/ud_ewt.yaml --train_file en_ewt-ud-train.conllu \\
        --validation_file en_ewt-ud-dev.conllu --test_file en_ewt-ud-test.conllu --norm adanorm

An MLP chooses arc-standard transitions from the words, tags and relations of Chen and Manning (2014), as in the
paper's PTB row. It learns the oracle's transitions of the projective trees; the others are skipped and counted. The
scores are attachment scores of all sentences, unlabeled and labeled, with and without punctuation. Run the same
command again to resume from the newest complete checkpoint in `output_dir`.

`output_dir` then contains `results.json`, `test.conllu`, `test_trees.json`, `checkpoint-N/`, and the best model with
its vocabulary as `best/`: parse with `predict.py --task parsing`.
"""

from __future__ import annotations

from common.options import parse_options
from tasks.options import ParsingOptions

if __name__ == "__main__":  # help, and mistakes in the options, before torch is imported
    parse_options(ParsingOptions, description=__doc__)

import tempfile
import time
from pathlib import Path

import torch.nn.functional as F

from common.checkpoints import write_json
from common.evaluation import mean
from common.loop import Run
from tasks.arc_standard import parse_sentences
from tasks.conllu import attachment_scores, attachments, read_conllu, write_conllu
from tasks.data import data_content
from tasks.parsing import ParsingTask, collate_transitions, prepare_parsing

OPTIONS, TASK = ParsingOptions, ParsingTask


def evaluate(run: Run, task: ParsingTask) -> dict[str, float]:
    """Return attachment scores of the validation sentences and the loss of their oracle's transitions."""
    gold, sentences, examples = task.gold["validation"], task.encoded["validation"], task.examples["validation"]

    def parsed(batch: list, _: list[int]) -> list:
        single_root = run.bare.config.single_root
        trees = parse_sentences(run.bare, batch, single_root=single_root, batch_size=len(batch))
        return list(zip(*trees, strict=True))

    def losses(batch: dict, _: list[int]) -> list[float]:
        logits = run.model(input_ids=batch["input_ids"]).logits.float()
        return F.cross_entropy(logits, batch["labels"], reduction="none").tolist()

    started = time.perf_counter()
    trees = run.evaluate(sentences, [len(sentence.words) for sentence in sentences], list, parsed)
    task.sentences_per_second = len(sentences) / (time.perf_counter() - started)
    relations = [task.vocabulary.names(tree[1]) for tree in trees]
    counts = attachments(gold, [tree[0] for tree in trees], relations, run.options.punctuation_tags)
    loss = mean(run.evaluate(examples, [1] * len(examples), collate_transitions, losses))
    return {**attachment_scores(counts.sum(0)), "loss": loss}


def test_scores(run: Run, task: ParsingTask, best: Path) -> dict[str, float]:
    """Return attachment scores of the test sentences, which a fresh process parses with the saved model."""
    gold = task.gold["test"]
    output = run.output_dir / "test.conllu"
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "test.conllu"
        blank = [["_"] * len(sentence.forms) for sentence in gold]
        data.write_text(write_conllu(gold, blank, blank), encoding="utf-8")
        run.fresh_process("predict.py", task="parsing", model=best.resolve(), data=data, output=output.resolve())
    parsed = read_conllu(output, tag_column=run.options.tag_column)
    heads, relations = [sentence.heads for sentence in parsed], [sentence.relations for sentence in parsed]
    counts = attachments(gold, heads, relations, run.options.punctuation_tags)
    write_json(run.output_dir / "test_trees.json", {"counts": counts.tolist()})
    return attachment_scores(counts.sum(0))


def main(argv: list[str] | None = None) -> None:
    """Set up, train, test the best model in a fresh process, and write `results.json`."""
    options = parse_options(ParsingOptions, argv, __doc__)
    run = Run(options, argv, __file__, data_content)
    if run.finished:
        return
    task = run.prepare(prepare_parsing)
    with run.training():
        for step in run:
            for batch in step:
                logits = run.model(input_ids=batch["input_ids"]).logits.float()  # (micro-batch, transitions)
                loss = F.cross_entropy(logits, batch["labels"], reduction="sum") / step.size
                run.backward(loss, {"input_ids": batch["input_ids"]})
            if step.evaluates:
                run.note(evaluate(run, task))
        best = run.best()
        if run.alone():
            scores = test_scores(run, task, best) if "test" in task.gold else None
            words = sum(len(sentence.words) for sentence in task.encoded["train"])
            sizes = {"train_samples": len(task.train_data), "train_tokens": words, "left_out": task.left_out}
            run.write_results({"test": scores, **sizes, "sentences_per_second": task.sentences_per_second})


if __name__ == "__main__":
    main()
