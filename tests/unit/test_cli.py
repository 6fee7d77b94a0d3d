"""The command line: against a Hub server in fresh processes, and in this process on folders."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

import hf_adanorm
from hf_adanorm import is_patched
from hf_adanorm.cli import _as_options, main
from hf_adanorm.modeling_adanorm import NOTICE
from hf_adanorm.saving.card import BEGIN, describes
from tests.integration.hub_client import build
from tests.integration.hub_server import HubServer
from tests.zoo.fold_models import tied_llama
from tests.zoo.processes import Scripts
from tests.zoo.tiny_text import make_tokenizer

CLI = [sys.executable, "-m", "hf_adanorm.cli"]
TOKEN = "hf_token_of_the_loopback_hub"
DERF = f"{Path(__file__).parents[2]}/recipes/norms/derf.py:Derf"  # a norm of a user's own


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock model with its tokenizer, in bfloat16."""
    folder = tmp_path_factory.mktemp("stock") / "model"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes)).to(torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub(stock: Path) -> Iterator[HubServer]:
    with HubServer(tokens={TOKEN: "me"}) as server:
        server.create_repo("org/bert", contents(stock))
        yield server


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process, without a network: (exit code, stdout, stderr)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def scripts(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripts]:
    """Runs the command where it speaks with the Hub."""
    folder = tmp_path_factory.mktemp("scripts")
    environment = {**hub.environment(folder / "home", TOKEN), "PYTHONPATH": str(Path(hf_adanorm.__file__).parents[1])}
    with Scripts(["hf_adanorm.cli", "hf_adanorm.patching"], folder, environment) as scripts:
        yield scripts


# ----------------------------------------------------------------------------------------------------------- the hub


def test_inspect_downloads_no_weights(hub: HubServer, scripts: Scripts) -> None:
    asked = len(hub.requests)
    done = scripts.run("hf_adanorm.cli", "inspect", "org/bert", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["model"], report["model_class"]) == ("org/bert", "BertForSequenceClassification")
    assert (report["swapped"], report["swappable"]) == (0, 5)
    requests = hub.requests[asked:]
    assert any("config.json" in request for request in requests)
    assert not any("safetensors" in request or "_lfs" in request for request in requests)


def test_patch_pushes_model_tokenizer_and_card(hub: HubServer, stock: Path, tmp_path: Path, scripts: Scripts) -> None:
    out = tmp_path / "out"
    options = ["--C", "1.5", "--layers", "-1", "--push-to-hub", "me/patched", "--private", "--json"]
    done = scripts.run("hf_adanorm.cli", "patch", "org/bert", out, *options)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert json.loads(done.stdout)["swapped"] == 2
    assert hub.repos["me/patched"].private
    files = hub.repos["me/patched"].files()
    assert {name: data for name, data in files.items() if not name.startswith(".")} == contents(out)
    assert files["tokenizer.json"] == (stock / "tokenizer.json").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "org/bert"
    assert "me/patched" in card.text
    weights = load_file(out / "model.safetensors")
    own = ("_extra_state", NOTICE)  # settings and the notice are no numbers of the model
    assert {tensor.dtype for name, tensor in weights.items() if not name.endswith(own)} == {torch.bfloat16}
    assert hub.unknown == []


def test_a_folded_stock_model_is_pushed_as_what_it_is(hub: HubServer, tmp_path: Path, scripts: Scripts) -> None:
    tied_llama().save_pretrained(tmp_path / "source")
    options = ["--tied", "untie", "--push-to-hub", "me/folded", "--json"]
    done = scripts.run("hf_adanorm.cli", "fold", tmp_path / "source", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stock"]
    files = hub.repos["me/folded"].files()
    assert {name: data for name, data in files.items() if not name.startswith(".")} == contents(tmp_path / "out")
    assert ModelCard(files["README.md"].decode()).data.pipeline_tag == "text-generation"


@pytest.mark.parametrize("command", [["patch", "org/bert"], ["fold", "org/llama", "--tied", "untie"]])
def test_a_second_push_brings_our_section_of_the_card_up_to_date(
    hub: HubServer, tmp_path: Path, scripts: Scripts, command: list[str]
) -> None:
    tied_llama().save_pretrained(tmp_path / "llama")
    hub.create_repo("org/llama", contents(tmp_path / "llama"))
    build("detachnorm").save_pretrained(tmp_path / "before")
    text = (tmp_path / "before" / "README.md").read_text() + "\nA remark.\n"
    hub.create_repo("me/twice", {"README.md": text.encode()})
    done = scripts.run("hf_adanorm.cli", *command[:2], tmp_path / "out", *command[2:], "--push-to-hub", "me/twice")
    assert done.returncode == 0, done.stderr
    files = {name: data.decode() for name, data in hub.repos["me/twice"].files().items() if ".safe" not in name}
    assert "A remark." in files["README.md"]
    assert "detachnorm" not in (ModelCard(files["README.md"]).data.tags or [])
    assert describes(files["README.md"], json.loads(files["config.json"])) is (True if command[0] == "patch" else None)


def test_a_card_that_cannot_be_read_stays_and_is_said(hub: HubServer, tmp_path: Path, scripts: Scripts) -> None:
    text = f"{BEGIN}\nhalf a section\n"
    hub.create_repo("me/half", {"README.md": text.encode()})
    done = scripts.run("hf_adanorm.cli", "patch", "org/bert", tmp_path / "out", "--push-to-hub", "me/half")
    assert done.returncode == 0, done.stderr
    assert "warning: the card of me/half is unchanged: README.md must contain both markers" in done.stderr
    files = hub.repos["me/half"].files()
    assert files["README.md"].decode() == text
    assert "model.safetensors" in files


def test_a_push_that_fails_names_what_is_complete_and_how_to_push_it(
    hub: HubServer, stock: Path, tmp_path: Path, scripts: Scripts
) -> None:
    out = tmp_path / "out"
    done = scripts.run("hf_adanorm.cli", "patch", stock, out, "--push-to-hub", "me/x", HF_TOKEN="hf_wrong")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"; {out} is complete, and `hf upload me/x {out}` pushes it")
    assert is_patched(BertForSequenceClassification.from_pretrained(out))


@pytest.mark.parametrize(
    ("repo", "token", "message"), [("me/x", "", "needs a token"), ("a/b/c", TOKEN, "Repo id must be")]
)
def test_what_would_stop_a_push_is_said_before_the_work(
    hub: HubServer, stock: Path, tmp_path: Path, scripts: Scripts, repo: str, token: str, message: str
) -> None:
    done = scripts.run("hf_adanorm.cli", "patch", stock, tmp_path / "out", "--push-to-hub", repo, HF_TOKEN=token)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_patching_takes_little_more_memory_than_loading(tmp_path: Path) -> None:
    """Peak resident memory beyond that of the imports, in copies of the model (about 210 MB)."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 4, "intermediate_size": 3072, "vocab_size": 32_000}
    config = BertConfig(architectures=["BertForSequenceClassification"], **sizes)
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    weights = {name: torch.ones(p.shape) for name, p in model.state_dict().items() if "position_ids" not in name}
    config.save_pretrained(tmp_path / "model")
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    size = sum(tensor.numel() * 4 for tensor in weights.values())
    del weights

    def peak(*command: str) -> int:
        process = subprocess.Popen([sys.executable, *command], cwd=tmp_path, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    assert resource.RUSAGE_CHILDREN  # ru_maxrss is what wait4 gives
    load = "BertForSequenceClassification.from_pretrained('model')"
    touch = f"print(sum(float(p.sum()) for p in {load}.parameters()))"
    imports = "import hf_adanorm; from transformers import BertForSequenceClassification; import transformers.models"
    loading = peak("-c", f"{imports}; {touch}")
    patching = peak("-m", "hf_adanorm.cli", "patch", "model", "out")
    assert patching - loading < 0.3 * size


# ----------------------------------------------------------------------------------------------------------- folders


def test_inspect_takes_the_options_of_patch(stock: Path, run: Run) -> None:
    code, out, _ = run("inspect", stock, "--include", "output.LayerNorm", "--layers", "0", "--json")
    assert code == 0
    chosen = [norm["name"] for norm in json.loads(out)["norms"] if norm["chosen"]]
    assert chosen == [f"bert.encoder.layer.0.{part}.LayerNorm" for part in ("attention.output", "output")]
    code, out, _ = run("inspect", stock, "--exclude", "re:.*attention.*")
    assert code == 0
    assert out.startswith("BertForSequenceClassification: 5 norms, 0 swapped (0 parameters removed), 3 would be")


@pytest.mark.parametrize(
    ("options", "norm"),
    [
        (["--norm", "layernorm-simple"], "LayerNormSimple((16,), eps=1e-12)"),
        (["--norm", "detachnorm", "--no-detach-mean"], "detach_mean=False, detach_variance=True"),
        (["--norm", "none", "--eps", "0.5"], "NoNorm((16,), eps=0.5)"),
        (["--k", "0.2", "--no-centered"], "AdaNorm((16,), centered=False, eps=1e-12, C=1.0, k=0.2)"),
    ],
)
def test_patch_writes_a_model_that_stock_calls_load(
    stock: Path, run: Run, tmp_path: Path, options: list[str], norm: str
) -> None:
    code, out, err = run("patch", stock, tmp_path / "out", *options)
    assert (code, err) == (0, "")
    assert "5 norms swapped" in out
    model = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert is_patched(model)
    assert norm in str(model.bert.embeddings.LayerNorm)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (stock / "tokenizer.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unpatch_gives_a_stock_model(stock: Path, run: Run, tmp_path: Path) -> None:
    run("patch", stock, tmp_path / "patched")
    code, out, err = run("unpatch", tmp_path / "patched", tmp_path / "out")
    assert code == 0
    assert "stock norms" in out
    assert "start with gain 1 and bias 0" in err
    assert not is_patched(BertForSequenceClassification.from_pretrained(tmp_path / "out"))
    assert "modeling_adanorm.py" not in {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_errors_name_options_not_arguments() -> None:
    shown = {
        "eps=0.5 needs another norm": "--eps 0.5 needs another norm",
        'targets="all" swaps every norm': "--targets all swaps every norm",
        "norm=(1, 2) and the norms": "norm=(1, 2) and the norms",
    }
    assert {message: _as_options(message) for message in shown} == shown


def test_version_and_help_need_neither_torch_nor_transformers() -> None:
    code = "import sys; sys.modules.update(torch=None, transformers=None); import hf_adanorm.cli as c; c.main()"
    version, shown = (
        subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True).stdout
        for option in ("--version", "--help")
    )
    assert version == f"hf-adanorm {hf_adanorm.__version__}\n"
    assert not re.search(r"\w\.\.\.$", shown, re.MULTILINE)


def test_out_may_be_a_link_to_an_empty_folder(stock: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert run("patch", stock, tmp_path / "out")[0] == 0
    assert (tmp_path / "out").is_symlink()
    assert is_patched(BertForSequenceClassification.from_pretrained(tmp_path / "disk"))


def test_dropped_gains_are_warned_of_in_one_line(stock: Path, run: Run, tmp_path: Path) -> None:
    source = tmp_path / "trained"
    model = BertForSequenceClassification.from_pretrained(stock)
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight.fill_(2.0)
    model.save_pretrained(source)
    code, _, err = run("patch", source, tmp_path / "out")
    assert code == 0
    assert err.startswith("warning: the trained gains and biases of 1 norm are dropped")
    assert err.count("\n") == 1


def test_a_norm_of_the_users_own_with_its_settings(stock: Path, run: Run, tmp_path: Path) -> None:
    code, out, err = run("patch", "--alpha", "0.7", stock, tmp_path / "out", "--norm", DERF)
    assert (code, err) == (0, "")
    assert "5 norms swapped" in out
    spec = json.loads((tmp_path / "out" / "config.json").read_text())["adanorm"]
    assert [group["settings"] for group in spec["groups"]] == [{"alpha": 0.7, "shift": 0.0}]
    code, out, _ = run("inspect", tmp_path / "out", "--json")
    assert (code, json.loads(out)["code"]["loader"], json.loads(out)["swapped"]) == (0, "ours", 5)
    with (tmp_path / "out" / "derf.py").open("a") as saved:
        saved.write("raise SystemExit('was run')\n")
    done = subprocess.run([*CLI, "inspect", tmp_path / "out"], capture_output=True, text=True)  # a fresh process
    assert done.returncode == 0, done.stderr
    assert "Derf {'alpha': 0.7" in done.stdout
    assert "derf.py: code of the model's author, CHANGED since it was saved" in done.stdout


def test_a_checkpoint_with_a_users_norm_is_worked_on_by_trust(
    stock: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched = tmp_path / "patched"
    run("patch", stock, patched, "--norm", DERF, "--alpha", "0.7")
    monkeypatch.setattr("hf_adanorm.norms._USED", [])  # as in another process
    code, _, err = run("unpatch", patched, tmp_path / "out")
    assert (code, "or load with --trust-remote-code" in err) == (2, True)
    code, out, _ = run("unpatch", patched, tmp_path / "out", "--trust-remote-code", "--json")
    assert (code, json.loads(out)["not_copied"]) == (0, ["derf.py"])
    assert not is_patched(BertForSequenceClassification.from_pretrained(tmp_path / "out"))
    code, out, _ = run("patch", patched, tmp_path / "more", "--layers", "0", "--trust-remote-code", "--json")
    assert (code, json.loads(out)["swapped"], json.loads(out)["not_copied"]) == (0, 5, [])
    code, out, _ = run("inspect", tmp_path / "more", "--trust-remote-code", "--json")
    assert {norm["class"] for norm in json.loads(out)["norms"]} == {"AdaNorm", "Derf"}


def test_a_reader_that_closes_the_pipe_is_no_error(stock: Path) -> None:
    with subprocess.Popen(
        [*CLI, "inspect", str(stock)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_norms_lists_the_settings_of_each(run: Run) -> None:
    code, out, _ = run("norms", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["adanorm"] == {"C": 1.0, "k": 0.1}
    assert found["layernorm-simple"] == {}
    _, out, _ = run("norms", DERF)
    assert "--alpha  (default: 0.5)" in out


def test_inspect_says_whether_the_loader_was_changed(stock: Path, run: Run, tmp_path: Path) -> None:
    run("patch", stock, tmp_path / "out")
    _, out, _ = run("inspect", tmp_path / "out")
    assert f"modeling_adanorm.py: the loader of hf_adanorm {hf_adanorm.__version__}, unmodified" in out
    with (tmp_path / "out" / "modeling_adanorm.py").open("a") as file:
        file.write("print('hello')\n")
    _, out, _ = run("inspect", tmp_path / "out")
    assert "modeling_adanorm.py: NOT the loader of hf_adanorm" in out
    assert "hello" not in out


def test_run_starts_a_program_of_another_package_in_this_process(run: Run, capsys: Any) -> None:
    code, out, _ = run("run", "hf", "version")
    assert code == 0
    assert metadata.version("huggingface_hub") in out
    code, _, err = run("run", "transfomers", "serve")
    assert (code, err) == (2, "error: 'transfomers' is not a command of an installed Python package; did you mean "
                              "'transformers'?\n")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "./nowhere"], "./nowhere: no such folder"),
        (["unpatch", "no_where", "{tmp}/out"], "no_where is not a local folder, and the Hub has no such model"),
        (["inspect", "{tmp}"], "has no config.json"),
        (["inspect", "{stock}", "--targets", "both"], "argument --targets: invalid choice: 'both'"),
        (["inspect", "{stock}", "--include", "nope"], "matches the ending of no norm's name"),
        (["inspect", "{stock}", "--nope"], "--nope is not an option of hf-adanorm inspect"),
        (["patch", "{stock}", "{tmp}/out", "--norm", "foo"], "norm must be one of"),
        (["patch", "{stock}", "{tmp}/out", "--C", "-1"], "C must be a finite number > 0"),
        (["patch", "{stock}", "{stock}"], "exists and is not an empty folder"),
        (["unpatch", "{stock}", "{tmp}/out"], "has no swapped norms"),
        (["patch", "{stock}", "{tmp}/out", "--alpha", "0.7"], "is not an option of hf-adanorm patch or a setting"),
        (["patch", "{stock}", "{tmp}/out", "--includ", "x"], "did you mean '--include'?"),
        (["nope"], "invalid choice: 'nope'"),
    ],
)
def test_errors_are_one_line_and_code_2(
    stock: Path, run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    before = sorted(path.name for path in stock.iterdir())
    code, out, err = run(*(a.format(stock=stock, tmp=tmp_path) for a in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.name for path in stock.iterdir()) == before


def test_a_config_with_a_bad_spec_is_one_line(stock: Path, run: Run, tmp_path: Path) -> None:
    config = json.loads((stock / "config.json").read_text())
    config["adanorm"] = {"format": 7, "version": "9.0", "groups": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = run("inspect", tmp_path)
    assert code == 2
    assert err.startswith("error: config.adanorm of hf_adanorm 9.0: ")
    assert err.count("\n") == 1


def test_nothing_half_written_is_left_when_saving_fails(
    stock: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    code, _, err = run("patch", stock, tmp_path / "out")
    assert (code, err) == (2, "error: no space left\n")
    assert list(tmp_path.iterdir()) == []


def test_without_arguments_the_help_is_printed(run: Run) -> None:
    code, _, err = run()
    assert code == 2
    assert all(command in err for command in ("inspect", "patch", "fold"))


def test_fold_writes_a_plain_stock_model_and_says_so(run: Run, tmp_path: Path) -> None:
    model = tied_llama()
    model.save_pretrained(tmp_path / "source")
    code, out, _ = run("fold", tmp_path / "source", tmp_path / "out", "--tied", "untie", "--json")
    report = json.loads(out)
    assert (code, report["folded"], report["stock"], report["untied"]) == (0, 5, True, {"lm_head": 3200})
    written, source = ({path.name for path in (tmp_path / name).iterdir()} for name in ("out", "source"))
    assert written == source | {"README.md"}
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    code, out, _ = run("fold", tmp_path / "source", tmp_path / "kept")
    assert code == 0
    assert "the weight of lm_head is tied to model.embed_tokens" in out
