"""A recipe's push: the best model with card and results, through a Hub server on loopback; and a start from it."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import classification
from classification import ClassificationOptions
from common.publishing import publish
from tasks.conllu import read_conllu
from tests.integration.hub_server import HubServer
from tests.recipes.fault_runs import arguments, write_data
from tests.recipes.tiny_configs import TINY_CLASSIFIER
from tests.zoo.processes import Scripts

SCRIPT = Path(classification.__file__)
TOKEN = "hf_token_of_the_loopback_hub"


@pytest.fixture(scope="module")
def hub():
    with HubServer(tokens={TOKEN: "me"}) as server:
        yield server


@pytest.fixture(scope="module")
def scripts(hub, tmp_path_factory):
    """Runs a script of the recipes that speaks with the Hub."""
    folder = tmp_path_factory.mktemp("scripts")
    environment = {**hub.environment(folder / "home"), "PYTHONPATH": str(SCRIPT.parent)}
    with Scripts(["classification", "parsing", "predict"], folder, environment) as scripts:
        yield scripts


def run(scripts, texts, *options, token=TOKEN):
    files = ["--train_file", texts["train"], "--validation_file", texts["validation"]]
    settings = ["--max_steps", "4", "--batch_size", "8", "--max_length", "32", "--min_frequency", "1"]
    return scripts.run(SCRIPT, *files, *settings, *options, HF_TOKEN=token)


@pytest.fixture(scope="module")
def first(scripts, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    options = ["--model_config", json.dumps(TINY_CLASSIFIER), "--C", "1.3", "--output_dir", folder / "run"]
    done = run(scripts, texts, *options, "--push_to_hub", "true", "--hub_model_id", "me/demo")
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
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


def test_the_same_command_pushes_a_finished_run_and_keeps_a_card_written_there(first, hub, scripts, texts):
    text = hub.repos["me/demo"].files()["README.md"].decode() + "\nA remark.\n"
    hub.create_repo("me/again", {"README.md": text.encode()})
    options = ["--model_config", json.dumps(TINY_CLASSIFIER), "--C", "1.3", "--output_dir", first / "run"]
    done = run(scripts, texts, *options, "--push_to_hub", "true", "--hub_model_id", "me/again")
    assert done.returncode == 0, done.stderr
    files = hub.repos["me/again"].files()
    assert files["model.safetensors"] == hub.repos["me/demo"].files()["model.safetensors"]
    assert "A remark." in files["README.md"].decode()


def test_a_control_replaces_what_a_card_said_about_a_patched_model(first, hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    text = hub.repos["me/demo"].files()["README.md"].decode() + "\nA remark.\n"
    (tmp_path / "README.md").write_text(text)
    options = ClassificationOptions(norm="layernorm", hub_model_id="me/control")
    publish(tmp_path, {"validation": {"accuracy": 0.5}, "command": "python classification.py --seed 1"}, options)
    publish(tmp_path, {"validation": {"accuracy": 0.75}, "command": "python classification.py --seed 2"}, options)
    text = (tmp_path / "README.md").read_text()
    assert ModelCard(text).data.tags is None
    assert [result.metric_value for result in ModelCard(text).data.eval_results] == [0.75]
    assert "A remark." in text
    assert "adanorm |" not in text
    assert "| accuracy | 0.75 |" in text
    assert "\npython classification.py --seed 2\n" in text
    assert "--seed 1" not in text


def test_a_run_starts_from_a_pushed_checkpoint(first, scripts, texts, tmp_path):
    start = ["--model_name_or_path", "me/demo", "--C", "1.3", "--learning_rate", "1e-9"]
    done = run(scripts, texts, *start, "--output_dir", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    before, after = (json.loads((f / "results.json").read_text()) for f in (first / "run", tmp_path / "r"))
    assert after["validation"]["loss"] == pytest.approx(before["validation"]["loss"], abs=1e-4)
    assert ModelCard.load(tmp_path / "r" / "best" / "README.md").data.base_model == "me/demo"


def test_a_push_without_a_token_ends_before_training(scripts, texts, tmp_path):
    options = ["--model_config", json.dumps(TINY_CLASSIFIER), "--output_dir", tmp_path / "run"]
    done = run(scripts, texts, *options, "--push_to_hub", "true", "--hub_model_id", "me/x", token=None)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot push to me/x" in line
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_parser_is_pushed_with_its_vocabulary_and_parses_from_the_hub(hub, scripts, tmp_path):
    data = write_data(tmp_path)
    push = {"max_steps": 4, "eval_steps": 4, "push_to_hub": "true", "hub_model_id": "me/parser"}
    options = arguments("parsing", data, tmp_path / "run", **push)
    done = scripts.run(SCRIPT.with_name("parsing.py"), *options, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    files = {"config.json", "model.safetensors", "modeling_adanorm.py", "transition_parser.py", "vocabulary.json"}
    assert files <= set(hub.repos["me/parser"].files())
    raw, parsed = data / "trees-validation.jsonl", tmp_path / "parsed.conllu"
    options = ["--task", "parsing", "--model", "me/parser", "--data", raw, "--output", parsed]
    done = scripts.run(SCRIPT.with_name("predict.py"), *options, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    gold = read_conllu(raw, trees=False)
    assert [sentence.forms for sentence in read_conllu(parsed)] == [sentence.forms for sentence in gold]
