"""A recipe's push: the best model with card and results, through a Hub server on loopback; and a start from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import classification
from tasks.conllu import read_conllu
from tests.integration.hub_server import HubServer
from tests.recipes.fault_runs import arguments, write_data
from tests.recipes.tiny_configs import TINY_CLASSIFIER

SCRIPT = Path(classification.__file__)
TOKEN = "hf_token_of_the_loopback_hub"


# Started for this Hub, whose address is read where it is imported; every job in a process forked from it.
WORKER = """
import importlib, json, os, sys
import classification, parsing, predict
for line in sys.stdin:
    script, argv, log, environment = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.update(environment)
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = [script, *argv]
        code = 0
        try:
            importlib.import_module(os.path.basename(script).removesuffix(".py")).main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    with HubServer(tokens={TOKEN: "me"}) as server:
        environment = {**os.environ, **server.environment(folder / "home"), "PYTHONPATH": str(SCRIPT.parent)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        with subprocess.Popen([sys.executable, "-c", WORKER], env=environment, **pipes) as worker:

            def run_script(name, *argv, token=TOKEN):
                """The exit code of a script of the recipes, and what it said."""
                log = folder / f"log{len(list(folder.iterdir()))}"
                given = {"HF_TOKEN": token} if token else {}
                job = [str(SCRIPT.with_name(name)), list(map(str, argv)), str(log), given]
                worker.stdin.write(json.dumps(job) + "\n")
                return int(worker.stdout.readline()), log.read_text()

            server.run_script = run_script
            yield server
            worker.stdin.close()


def run(hub, texts, *options, **how):
    files = ["--train_file", texts["train"], "--validation_file", texts["validation"]]
    settings = ["--max_steps", "4", "--batch_size", "8", "--max_length", "32", "--min_frequency", "1"]
    return hub.run_script("classification.py", *files, *settings, "--progress_bar", "false", *options, **how)


@pytest.fixture(scope="module")
def first(hub, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    options = ["--model_config", json.dumps(TINY_CLASSIFIER), "--C", "1.3", "--output_dir", folder / "run"]
    push = ["--push_to_hub", "true", "--hub_model_id", "me/demo"]
    code, said = run(hub, texts, *options, *push)
    assert code == 0, said
    assert TOKEN not in said
    return folder


def test_the_best_model_is_pushed_with_card_and_results(first, hub):
    files = hub.repos["me/demo"].files()
    assert {"config.json", "model.safetensors", "modeling_adanorm.py", "tokenizer.json", "README.md"} <= set(files)
    assert files["model.safetensors"] == (first / "run" / "best" / "model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    results = json.loads((first / "run" / "results.json").read_text())
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores == {name: float(f"{value:.4g}") for name, value in results["validation"].items()}
    assert {(r.dataset_name, r.dataset_split) for r in card.data.eval_results} == {("local files", "validation")}
    assert "classification.py --train_file train" in card.text
    assert str(first) not in card.text
    assert "C = 1.3" in card.text


def test_the_same_command_pushes_a_finished_run_and_keeps_a_card_written_there(first, hub, texts):
    text = hub.repos["me/demo"].files()["README.md"].decode() + "\nA remark.\n"
    hub.create_repo("me/again", {"README.md": text.encode()})
    options = ["--model_config", json.dumps(TINY_CLASSIFIER), "--C", "1.3", "--output_dir", first / "run"]
    code, said = run(hub, texts, *options, "--push_to_hub", "true", "--hub_model_id", "me/again")
    assert code == 0, said
    files = hub.repos["me/again"].files()
    assert files["model.safetensors"] == hub.repos["me/demo"].files()["model.safetensors"]
    assert "A remark." in files["README.md"].decode()


def test_a_run_starts_from_a_pushed_checkpoint(first, hub, texts, tmp_path):
    options = [
        "--model_name_or_path",
        "me/demo",
        "--C",
        "1.3",
        "--learning_rate",
        "1e-9",
        "--output_dir",
        tmp_path / "r",
    ]
    code, said = run(hub, texts, *options)
    assert code == 0, said
    before, after = (json.loads((f / "results.json").read_text()) for f in (first / "run", tmp_path / "r"))
    assert after["validation"]["loss"] == pytest.approx(before["validation"]["loss"], abs=1e-4)
    assert ModelCard.load(tmp_path / "r" / "best" / "README.md").data.base_model == "me/demo"


def test_a_push_without_a_token_ends_before_training(hub, texts, tmp_path):
    options = ["--model_config", json.dumps(TINY_CLASSIFIER), "--output_dir", tmp_path / "run"]
    code, said = run(hub, texts, *options, "--push_to_hub", "true", "--hub_model_id", "me/x", token=None)
    assert code == 2
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "cannot push to me/x" in line
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_parser_is_pushed_with_its_vocabulary_and_parses_from_the_hub(hub, tmp_path):
    data = write_data(tmp_path)
    push = {"max_steps": 4, "eval_steps": 4, "push_to_hub": "true", "hub_model_id": "me/parser"}
    code, said = hub.run_script("parsing.py", *arguments("parsing", data, tmp_path / "run", **push))
    assert code == 0, said
    files = {"config.json", "model.safetensors", "modeling_adanorm.py", "transition_parser.py", "vocabulary.json"}
    assert files <= set(hub.repos["me/parser"].files())
    raw, parsed = data / "trees-validation.jsonl", tmp_path / "parsed.conllu"
    options = ["--task", "parsing", "--model", "me/parser", "--data", raw, "--output", parsed]
    code, said = hub.run_script("predict.py", *options)
    assert code == 0, said
    gold = read_conllu(raw, trees=False)
    assert [sentence.forms for sentence in read_conllu(parsed)] == [sentence.forms for sentence in gold]
