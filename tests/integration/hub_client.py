"""Do the tasks of test_hub.py, each in a process of its own; the last line of the output is the answer in JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, BertConfig, Trainer, TrainingArguments, pipeline

from tests.zoo.tiny_text import TEXTS, make_tokenizer

REPOS = ["me/adanorm-whole", "me/detachnorm-sharded"]


def build(norm: str | None = "adanorm", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.BertForSequenceClassification(BertConfig(vocab_size=64, **sizes)).eval()
    if norm is not None:
        import hf_adanorm

        hf_adanorm.patch_model(model, norm, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def logits(model: Any) -> list[list[float]]:
    return model.eval()(**make_tokenizer()(TEXTS, padding=True, return_tensors="pt")).logits.tolist()


def attempt(function: Callable[[], Any]) -> Any:
    """Return its result, or its error as text."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def load(repo: str, **options: Any) -> Any:
    return attempt(lambda: logits(AutoModelForSequenceClassification.from_pretrained(repo, **options)))


def run_pipeline(repo: str, **options: Any) -> Any:
    def run() -> Any:
        classifier = pipeline("text-classification", model=repo, top_k=None, function_to_apply="none", **options)
        scores = [{entry["label"]: entry["score"] for entry in answer} for answer in classifier(TEXTS)]
        return [[answer["LABEL_0"], answer["LABEL_1"]] for answer in scores]

    return attempt(run)


# ------------------------------------------------------------------------------------------------------------ tasks


def push(folder: Path) -> dict[str, Any]:
    reference = {}
    for repo in REPOS:
        norm, form = repo.removeprefix("me/").rsplit("-", 1)
        model = build(norm)
        model.push_to_hub(repo, **({"max_shard_size": "40KB"} if form == "sharded" else {}), tags=["tiny"])
        make_tokenizer().push_to_hub(repo)
        reference[repo] = logits(model)

    own = build("recipes/norms/derf.py:Derf", alpha=0.7)
    own.push_to_hub("me/derf")
    reference["me/derf"] = logits(own)

    model = build()
    model.save_pretrained(
        str(folder / "saved"), push_to_hub=True, repo_id="me/saved", commit_message="Saved and pushed"
    )
    reference["me/saved"] = logits(model)
    model.config.save_pretrained(str(folder / "config"), push_to_hub=True, repo_id="me/config")
    model.config.push_to_hub("me/pushed-config")

    (folder / "own-card").mkdir()
    (folder / "own-card" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    model.save_pretrained(str(folder / "own-card"), push_to_hub=True, repo_id="me/own-card")
    build(None).push_to_hub("me/was-stock")  # transformers' empty form of a card
    model.push_to_hub("me/was-stock")
    model.push_to_hub("me/remote-card")
    build("detachnorm").push_to_hub("me/other-norms")
    model.push_to_hub("me/other-norms")
    model.push_to_hub("me/stock-again")
    build(None).push_to_hub("me/stock-again")
    return reference


def pull_with_package(folder: Path) -> dict[str, Any]:
    import hf_adanorm  # noqa: F401

    out: dict[str, Any] = {"stock": {repo: load(repo) for repo in [*REPOS, "me/saved", "me/trained"]}}
    out["trust"] = {repo: load(repo, trust_remote_code=True) for repo in REPOS}
    out["pipeline"] = {repo: run_pipeline(repo) for repo in REPOS}
    out["pipeline with trust"] = {repo: run_pipeline(repo, trust_remote_code=True) for repo in REPOS}
    out["newer"] = {repo: load(repo) for repo in ("me/newer", "me/newer-file")}
    out["newer with trust"] = load("me/newer-file", trust_remote_code=True)
    out["newer in a pipeline"] = run_pipeline("me/newer")
    out["own norm"] = {"stock": load("me/derf"), "trust": load("me/derf", trust_remote_code=True)}
    return out


def pull_without_package(folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {"stock": {repo: load(repo) for repo in [*REPOS, "me/trained"]}}
    out["pipeline"] = {repo: run_pipeline(repo) for repo in REPOS}
    out["trust"] = {repo: load(repo, trust_remote_code=True) for repo in [*REPOS, "me/trained"]}
    out["pipeline with trust"] = {repo: run_pipeline(repo, trust_remote_code=True) for repo in REPOS}
    out["newer"] = load("me/newer")
    out["newer with trust"] = load("me/newer", trust_remote_code=True)
    out["newer file with trust"] = load("me/newer-file", trust_remote_code=True)
    model = AutoModelForSequenceClassification.from_pretrained("me/adanorm-whole", trust_remote_code=True)
    model.push_to_hub("me/again")
    out["again"] = load("me/again", trust_remote_code=True)
    out["again without trust"] = load("me/again")
    own = AutoModelForSequenceClassification.from_pretrained("me/derf", trust_remote_code=True)
    own.push_to_hub("me/derf-again")
    out["own norm"] = {"stock": load("me/derf"), "trust": logits(own)}
    out["own norm"]["again"] = load("me/derf-again", trust_remote_code=True)
    return out


def train(folder: Path) -> dict[str, Any]:
    """Train with the Trainer, which pushes a checkpoint, and the model with its card at the end."""
    import hf_adanorm  # noqa: F401

    tokenizer, model = make_tokenizer(), build()
    data = [{**tokenizer(text), "labels": i % 2} for i, text in enumerate(TEXTS)]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        push_to_hub=True,
        hub_model_id="me/trained",
        hub_strategy="every_save",
        max_steps=2,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.evaluate()
    while trainer.push_in_progress is not None and not trainer.push_in_progress.is_done():
        time.sleep(0.05)
    trainer.push_to_hub()
    return {"me/trained": logits(model)}


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    task, folder = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):  # the last line of stdout is the answer, whatever transformers prints
        answer = globals()[task](Path(folder))
    print(json.dumps(answer))
