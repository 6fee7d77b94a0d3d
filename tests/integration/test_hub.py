"""Push and pull through a Hub server on loopback, every step in a fresh process, and the model card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard

from hf_adanorm.saving.card import BEGIN, END, describes
from tests.integration.hub_client import REPOS
from tests.integration.hub_server import HubServer
from tests.zoo.processes import Scripts

ROOT = Path(__file__).parents[2]
CLIENT = "tests.integration.hub_client"
TOKEN = "hf_token_of_the_loopback_hub"


class Session:
    """A hub and the processes that speak with it, with the package and without, each kind with its own caches."""

    def __init__(self, hub: HubServer, folders: list[Path], processes: list[Scripts]):
        self.hub, self.folders, self.processes = hub, folders, processes
        self.folder = folders[0]
        self.output = ""

    def run(self, task: str) -> dict[str, Any]:
        done = self.processes[task.endswith("without_package")].run(CLIENT, task, self.folder)
        self.output += done.stdout + done.stderr
        assert done.returncode == 0, done.stderr[-3000:]
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def card(self, repo: str) -> str:
        return self.hub.repos[repo].files()["README.md"].decode()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with HubServer(tokens={TOKEN: "me"}) as hub:
        hub.create_repo("me/remote-card", {"README.md": b"---\ntags:\n- mine\n---\n# Written by hand\n"})
        folders = [tmp_path_factory.mktemp(name) for name in ("hub", "with", "without")]
        environments = [{**hub.environment(home, TOKEN), "PYTHONPATH": str(ROOT)} for home in folders]
        with (
            Scripts([CLIENT], folders[1], environments[1]) as with_package,
            Scripts([CLIENT], folders[2], environments[2], hidden="hf_adanorm") as without_package,
        ):
            yield Session(hub, folders, [with_package, without_package])


@pytest.fixture(scope="module")
def pushed(session: Session) -> dict[str, Any]:
    """The logits of every pushed model, as they were where it was made."""
    reference = session.run("push")
    files = session.hub.repos["me/adanorm-whole"].files()
    config = json.loads(files["config.json"])
    config["adanorm"] |= {"format": 3, "version": "9.1.0"}
    files = {**files, "config.json": json.dumps(config).encode()}
    session.hub.create_repo("me/newer", files)
    code = files["modeling_adanorm.py"].decode()
    newer = code.replace('__version__, FORMAT = "0.1.0", 1', '__version__, FORMAT = "9.1.0", 3')
    assert newer != code
    session.hub.create_repo("me/newer-file", {**files, "modeling_adanorm.py": newer.encode()})
    return reference


@pytest.fixture(scope="module")
def trained(session: Session) -> dict[str, Any]:
    return session.run("train")


@pytest.fixture(scope="module")
def with_package(session: Session, pushed: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    return session.run("pull_with_package")


@pytest.fixture(scope="module")
def without_package(session: Session, pushed: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    return session.run("pull_without_package")


# ----------------------------------------------------------------------------------------------------------- pushing


def test_a_push_uploads_model_traveling_file_card_and_tokenizer(session: Session, pushed: dict[str, Any]) -> None:
    expected = {"README.md", "config.json", "modeling_adanorm.py", "tokenizer.json", "tokenizer_config.json"}
    for repo in REPOS:
        files = set(session.hub.repos[repo].files()) - {".gitattributes"}
        weights = {name for name in files if name.startswith("model")} - {"modeling_adanorm.py"}
        assert files - weights == expected
        assert ("model.safetensors.index.json" in weights) == repo.endswith("sharded")
        assert len(weights) > 3 if repo.endswith("sharded") else weights == {"model.safetensors"}
        assert len(session.hub.repos[repo].commits) == 3  # the repository, the model with its card, the tokenizer


@pytest.mark.parametrize("repo", ["me/config", "me/pushed-config"])
def test_a_pushed_config_alone_brings_the_traveling_file(session: Session, pushed: dict[str, Any], repo: str) -> None:
    files = session.hub.repos[repo].files()
    assert {"config.json", "modeling_adanorm.py"} <= set(files)
    assert json.loads(files["config.json"])["auto_map"]["AutoModel"] == "modeling_adanorm.BertModel"


def test_trainer_pushes_the_traveling_file_with_every_checkpoint(session: Session, trained: dict[str, Any]) -> None:
    commits = [files for files in session.hub.repos["me/trained"].commits.values() if "config.json" in files]
    assert len(commits) >= 2
    assert all({"modeling_adanorm.py", "README.md"} <= set(files) for files in commits)


# ------------------------------------------------------------------------------------------------------ who may pull


@pytest.mark.parametrize("repo", REPOS)
def test_who_pulls_and_how(
    pushed: dict[str, Any], with_package: dict[str, Any], without_package: dict[str, Any], repo: str
) -> None:
    """The same logits, or an error; in a pipeline too."""
    right = pushed[repo]
    for answers in (with_package, without_package):
        assert _close(answers["trust"][repo], right)
        assert _close(answers["pipeline with trust"][repo], right)
    assert _close(with_package["stock"][repo], right)
    assert _close(with_package["pipeline"][repo], right)
    for how in ("stock", "pipeline"):
        assert "size mismatch" in without_package[how][repo] or "ignore_mismatched_sizes" in without_package[how][repo]


def test_pulls_after_other_ways_to_push(
    pushed: dict[str, Any], trained: dict[str, Any], with_package: dict[str, Any], without_package: dict[str, Any]
) -> None:
    assert _close(with_package["stock"]["me/saved"], pushed["me/saved"])
    assert _close(with_package["stock"]["me/trained"], trained["me/trained"])
    assert _close(without_package["trust"]["me/trained"], trained["me/trained"])
    assert "ignore_mismatched_sizes" in without_package["stock"]["me/trained"]


def test_a_newer_format_names_both_versions(with_package: dict[str, Any], without_package: dict[str, Any]) -> None:
    answers = [*with_package["newer"].values(), with_package["newer with trust"], with_package["newer in a pipeline"]]
    for answer in [*answers, without_package["newer with trust"]]:
        assert "9.1.0" in answer
        assert "0.1.0" in answer
    assert "ignore_mismatched_sizes" in without_package["newer"]


def test_a_newer_traveling_file_serves_its_own_format(pushed: dict[str, Any], without_package: dict[str, Any]) -> None:
    assert _close(without_package["newer file with trust"], pushed["me/adanorm-whole"])


def test_a_trusted_load_without_the_package_can_be_pushed_again(
    session: Session, pushed: dict[str, Any], without_package: dict[str, Any]
) -> None:
    files = session.hub.repos["me/again"].files()
    first = session.hub.repos["me/adanorm-whole"].files()
    assert files["modeling_adanorm.py"] == first["modeling_adanorm.py"]
    config = json.loads(files["config.json"])
    assert config["auto_map"]["AutoModelForSequenceClassification"] == "modeling_adanorm.BertForSequenceClassification"
    assert config["adanorm"] == json.loads(first["config.json"])["adanorm"]
    assert _close(without_package["again"], pushed["me/adanorm-whole"])
    assert "ignore_mismatched_sizes" in without_package["again without trust"]


def test_a_norm_of_a_user_is_pushed_pulled_and_pushed_again(
    session: Session, pushed: dict[str, Any], with_package: dict[str, Any], without_package: dict[str, Any]
) -> None:
    here, elsewhere = with_package["own norm"], without_package["own norm"]
    for answer in (here["trust"], elsewhere["trust"], elsewhere["again"]):
        assert _close(answer, pushed["me/derf"])
    assert "import derf and call register_norm" in here["stock"]
    assert "ignore_mismatched_sizes" in elsewhere["stock"]
    first, again = (session.hub.repos[repo].files() for repo in ("me/derf", "me/derf-again"))
    for name in ("modeling_adanorm.py", "modeling_adanorm_with_classes.py", "derf.py"):
        assert first[name] == again[name]


def test_the_server_knew_every_request(
    session: Session, with_package: dict[str, Any], without_package: dict[str, Any]
) -> None:
    assert session.hub.unknown == []


def test_the_token_is_in_no_output_and_no_file(
    session: Session, with_package: dict[str, Any], without_package: dict[str, Any]
) -> None:
    assert TOKEN not in session.output
    for repo in session.hub.repos.values():
        for files in repo.commits.values():
            assert not any(TOKEN.encode() in data for data in files.values())
    written = [path for folder in session.folders for path in folder.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


# ---------------------------------------------------------------------------------------------------- the model card


@pytest.mark.parametrize("repo", [*REPOS, "me/saved", "me/trained", "me/was-stock", "me/other-norms"])
def test_pushed_cards_say_how_to_load_and_pass_validation(
    session: Session, pushed: dict[str, Any], trained: dict[str, Any], repo: str
) -> None:
    text = session.card(repo)
    card = ModelCard(text)
    HfApi(session.hub.url)._validate_yaml(text)
    assert card.data.library_name == "transformers"
    assert "hf_adanorm" in card.data.tags
    call = f'AutoModelForSequenceClassification.from_pretrained("{repo}"'
    assert f"{call}, trust_remote_code=True)" in text
    assert "ignore_mismatched_sizes=True" in text
    assert describes(text, json.loads(session.hub.repos[repo].files()["config.json"]))
    assert f"\n# {repo.partition('/')[2]}\n" in text


def test_tags_of_a_push_reach_the_card(session: Session, pushed: dict[str, Any]) -> None:
    assert set(ModelCard(session.card("me/adanorm-whole")).data.tags) == {"hf_adanorm", "adanorm", "tiny"}


def test_a_card_that_is_there_is_never_overwritten(session: Session, pushed: dict[str, Any]) -> None:
    assert ModelCard(session.card("me/remote-card")).text == "# Written by hand\n"
    assert session.card("me/own-card") == "---\nlicense: mit\n---\n# Mine\n"


def test_a_second_push_leaves_nothing_of_the_norms_before(session: Session, pushed: dict[str, Any]) -> None:
    other, stock = session.card("me/other-norms"), session.card("me/stock-again")
    assert ModelCard(other).data.tags == ["hf_adanorm", "adanorm"]
    assert "detachnorm" not in other.lower()
    assert ModelCard(stock).data.tags is None
    assert "hf_adanorm" not in stock


def test_the_trainers_card_keeps_what_the_trainer_wrote(session: Session, trained: dict[str, Any]) -> None:
    text = session.card("me/trained")
    assert "### Training hyperparameters" in text
    assert text.count(BEGIN) == text.count(END) == 1
    assert "generated_from_trainer" in ModelCard(text).data.tags


def _close(left: Any, right: list[list[float]]) -> bool:
    """A pipeline's answer, one text at a time and so with other rounding than a padded batch."""
    return isinstance(left, list) and left == [pytest.approx(row, abs=1e-5) for row in right]
