"""Every code block of the README and the pages holds: Python runs in order, commands and links name what exists."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "recipes" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = {page: re.findall(r"^```(\S*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for page, text in TEXTS.items()}
PYTHON = {page: [code for language, code in blocks if language == "python"] for page, blocks in BLOCKS.items()}
SHELL = [code for blocks in BLOCKS.values() for language, code in blocks if language in ("bash", "sh", "console")]


def commands(block: str) -> list[list[str]]:
    """The block's command lines as words, without comments, variables set for one command, and prompts."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s&&\s|\s\|\s", line.removeprefix("$ ")):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


ALL_COMMANDS = [words for block in SHELL for words in commands(block)]


def run_help(script: Path, monkeypatch, capsys) -> str:
    """Return what `script --help` prints."""
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code in (0, None)
    return capsys.readouterr().out


def option_names(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--")]


def test_every_block_says_its_language():
    known = {"python", "bash", "sh", "console", "yaml", "json", "text", "bibtex"}
    assert {language for blocks in BLOCKS.values() for language, _ in blocks} <= known


@pytest.mark.parametrize("page", [page for page, codes in PYTHON.items() if codes])
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, object] = {"__name__": "__page__"}
    for number, code in enumerate(PYTHON[page], start=1):
        exec(compile(code, f"{page}, Python block {number}", "exec"), names)
    assert "hf_adanorm" in sys.modules


def test_the_readme_is_a_landing_page():
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 120
    tables = re.findall(r"(?:^\|.*\n)+", TEXTS["README.md"], re.MULTILINE)
    assert max((table.count("\n") for table in tables), default=0) <= 12 + 2


def test_shell_commands_are_known_ones():
    known = "pip uv make python accelerate torchrun hf-adanorm git cd tensorboard sbatch source"
    assert {words[0] for words in ALL_COMMANDS} <= set(known.split())


def test_installed_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs = [words for words in ALL_COMMANDS if words[:2] == ["pip", "install"]]
    assert installs
    for words in installs:
        for word in words[2:]:
            for extra in re.findall(r"\[([\w,-]+)\]", word):
                assert set(extra.split(",")) <= set(project["optional-dependencies"]), word
            if word.endswith(".txt"):
                assert (ROOT / word).is_file()


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in ALL_COMMANDS:
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets


def recipe_commands() -> dict[str, list[list[str]]]:
    """Script of the recipes -> the options that README gives to it."""
    found: dict[str, list[list[str]]] = {}
    for words in ALL_COMMANDS:
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if scripts and words[0] in ("python", "accelerate", "torchrun"):
            found.setdefault(words[scripts[0]], []).append(words)
    return found


@pytest.mark.parametrize("script", recipe_commands() or [pytest.param("", marks=pytest.mark.skip("no recipe"))])
def test_recipes_exist_and_know_their_options(script, monkeypatch, capsys):
    path = ROOT / script
    assert path.is_file()
    monkeypatch.syspath_prepend(str(path.parent))
    told_by = [path]
    if path.name == "compare.py":  # passes on what it does not know
        told_by += [path.parent / "classification.py", path.parent / "translation.py"]
    known = {name for told in told_by for name in re.findall(r"--[\w-]+", run_help(told, monkeypatch, capsys))}
    known |= {"--alpha"}  # a setting of the norm in the user's file
    for words in recipe_commands()[script]:
        assert set(option_names(words[words.index(script) + 1 :])) <= known


@pytest.mark.parametrize("script", recipe_commands() or [pytest.param("", marks=pytest.mark.skip("no recipe"))])
def test_launchers_know_their_options(script):
    launch = pytest.importorskip("accelerate.commands.launch")
    known = {name for action in launch.launch_command_parser()._actions for name in action.option_strings}
    for words in recipe_commands()[script]:
        if words[:2] == ["accelerate", "launch"]:
            assert set(option_names(words[: words.index(script)])) <= known


def test_the_map_names_what_exists():
    named = re.findall(r"`([a-z_/]+\.py|[a-z_/]+/)`", TEXTS["docs/architecture.md"])
    places = [ROOT, ROOT / "hf_adanorm", ROOT / "recipes"]
    assert [name for name in named if not any((place / name).exists() for place in places)] == []
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "hf_adanorm").rglob("*.py"))
    functions = re.findall(r"`(_?[a-z_]+)`", TEXTS["docs/architecture.md"])
    assert [name for name in functions if not re.search(rf"\b{name}\b", code)] == []


def test_files_that_commands_name_exist():
    """Paths into the repository, in commands and in links."""
    for words in ALL_COMMANDS:
        for word in words[1:]:
            value = re.sub(r"(?<=\.py):.*", "", word).split("=")[-1]
            if re.match(r"(recipes|hf_adanorm|tests)/", value):
                assert (ROOT / value).exists(), value
    for page, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" not in link:
                assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


OURS = [words for words in ALL_COMMANDS if words[0] == "hf-adanorm"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models in folders, with the names that the documentation uses: a folder is preferred to the Hub."""
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    from hf_adanorm import patch_model
    from tests.zoo.fold_models import tied_llama

    folder = tmp_path_factory.mktemp("models")
    bert = BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=64)
    )
    bert.save_pretrained(folder / "bert-base-uncased")
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(folder / "gpt2")
    for name in ("SmolLM2-135M", "SmolLM2-135M-Instruct"):
        tied_llama().save_pretrained(folder / "HuggingFaceTB" / name)
    patch_model(bert).save_pretrained(folder / "out")
    return folder


def runs_here(words: list[str]) -> bool:
    """Check whether a command runs as it stands: without a placeholder, without the Hub, and to an end."""
    return words[1] != "run" and "--push-to-hub" not in words and not {"NAME", "FOLDER"} & set(words)


@pytest.mark.parametrize("words", [words for words in OURS if runs_here(words)], ids=" ".join)
def test_our_commands_run(words, models, tmp_path, monkeypatch, capsys):
    from hf_adanorm.cli import main

    monkeypatch.chdir(tmp_path)
    sources = [word for word in words[2:3] if (models / word).is_dir()]
    for source in sources:
        shutil.copytree(models / source, tmp_path / source)
    norm = next(code for code in PYTHON["docs/your_norm.md"] if "my_norms.py" in code)
    exec(norm, {})
    with pytest.raises(SystemExit) as end:
        main(words[1:])
    assert end.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("words", [words for words in OURS if not runs_here(words)], ids=" ".join)
def test_our_other_commands_parse(words, tmp_path, monkeypatch):
    from hf_adanorm.cli import parse

    monkeypatch.chdir(tmp_path)
    exec(next(code for code in PYTHON["docs/your_norm.md"] if "my_norms.py" in code), {})
    assert parse(words[1:]).function.__name__ == words[1]
