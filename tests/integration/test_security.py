"""What a checkpoint from a stranger can and cannot make this package do."""

from __future__ import annotations

import ast
import copy
import json
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2Model

import hf_adanorm
from hf_adanorm import AdaNormSpec, modeling_adanorm, patch_model, unpatch_model, write_model_card
from hf_adanorm.saving.card import BEGIN, END
from tests.zoo.processes import Scripts, alone

ROOT = Path(__file__).parents[2]
TRAVELER = Path(modeling_adanorm.__file__)
SOURCES = sorted((ROOT / "hf_adanorm").rglob("*.py"))
SPEC: dict[str, Any] = {
    "format": 1,
    "version": "0.1.0",
    "groups": [{"norm": "adanorm", "settings": {"C": 1.0, "k": 0.1}, "modules": ["embeddings.LayerNorm"]}],
}


def nodes(path: Path, kind: type[ast.AST]) -> list[Any]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kind)]


def imported(path: Path) -> set[str]:
    """The top-level packages that any import statement of a file names."""
    found = {alias.name.partition(".")[0] for node in nodes(path, ast.Import) for alias in node.names}
    return found | {(node.module or "").partition(".")[0] for node in nodes(path, ast.ImportFrom) if not node.level}


def calls(path: Path) -> list[str]:
    return [ast.unparse(node.func) for node in nodes(path, ast.Call)]


# ------------------------------------------------------------------------------------------------ the traveling file


def test_the_traveling_file_imports_torch_transformers_and_the_standard_library_only() -> None:
    assert imported(TRAVELER) <= {"torch", "transformers", *sys.stdlib_module_names}
    assert not any(node.level for node in nodes(TRAVELER, ast.ImportFrom))
    assert not [call for call in calls(TRAVELER) if "import_module" in call or "find_spec" in call]
    of_sys = [node for node in nodes(TRAVELER, ast.Attribute) if ast.unparse(node.value) == "sys"]
    assert {node.attr for node in of_sys} == {"modules"}  # asked whether the package is there already


def test_the_traveling_file_reaches_for_no_file_process_network_or_code() -> None:
    forbidden = {"open", "eval", "exec", "compile", "__import__", "input", "print"}
    assert forbidden.isdisjoint(calls(TRAVELER))
    unwanted = {"os", "io", "subprocess", "socket", "urllib", "pathlib", "shutil", "ctypes", "pickle", "re"}
    assert unwanted.isdisjoint(imported(TRAVELER))


def test_importing_the_traveling_file_opens_nothing_for_writing_and_starts_nothing(
    tmp_path: Path, elsewhere: Scripts
) -> None:
    """Import it in a process without the package, under an audit hook."""
    copied = tmp_path / TRAVELER.name
    copied.write_bytes(TRAVELER.read_bytes())
    code = f"""
        import importlib.util, json, sys
        sys.dont_write_bytecode = True
        import torch, transformers
        transformers.PreTrainedModel
        events = []
        watching = True

        def watch(event, arguments):
            if watching:
                events.append((event, [str(argument) for argument in arguments]))

        sys.addaudithook(watch)
        spec = importlib.util.spec_from_file_location("modeling_adanorm", {str(copied)!r})
        module = sys.modules["modeling_adanorm"] = importlib.util.module_from_spec(spec)
        before = set(sys.modules)
        spec.loader.exec_module(module)
        watching = False
        print(json.dumps({{"events": events, "modules": sorted(set(sys.modules) - before)}}))
    """
    seen = json.loads(elsewhere.run_code(textwrap.dedent(code)).stdout.splitlines()[-1])
    assert seen["modules"] == []
    modes = [arguments[1] for event, arguments in seen["events"] if event == "open"]
    assert set(modes) <= {"r", "rb"}
    harmless = {"open", "import", "compile", "exec", "marshal.loads", "sys._getframe", "object.__getattr__"}
    assert {event for event, _ in seen["events"]} <= harmless | {"os.listdir", "os.scandir", "code.__new__"}


@pytest.mark.parametrize(
    "name", ["os", "torch", "Trainer", "BertConfig", "AutoTokenizer", "pipeline", "nope", "__loader"]
)
def test_only_model_classes_of_transformers_can_be_asked_for(name: str) -> None:
    with pytest.raises(AttributeError, match="has no attribute"):
        modeling_adanorm.__getattr__(name)
    assert modeling_adanorm.BertModel.__name__ == "BertModel"


# -------------------------------------------------------------------------------------------------------- no pickle


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_neither_reads_nor_writes_pickles(path: Path) -> None:
    assert {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}.isdisjoint(imported(path))
    assert {"torch.load", "torch.save", "eval", "exec"}.isdisjoint(calls(path))


def unpickle_nothing(folder: Path) -> None:
    found: list[Any] = []
    warnings.simplefilter("ignore")
    sys.addaudithook(lambda event, arguments: found.append(arguments) if event == "pickle.find_class" else None)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    patch_model(BertModel(BertConfig(**sizes))).save_pretrained(folder / "out")
    model = AutoModel.from_pretrained(folder / "out")
    write_model_card(folder / "out")
    unpatch_model(model)
    assert not found


def test_patching_saving_loading_and_the_card_unpickle_nothing(tmp_path: Path) -> None:
    alone(unpickle_nothing, tmp_path, tmp_path)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "modeling_adanorm.py"}


# ------------------------------------------------------------------------------------------ what config.json may say


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    patch_model(BertModel(BertConfig(vocab_size=9, **sizes))).save_pretrained(folder)
    return folder


def with_spec(checkpoint: Path, folder: Path, spec: Any) -> Path:
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["adanorm"] = spec
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(SPEC), **changes}


def group(**changes: Any) -> dict[str, Any]:
    return changed(groups=[{**SPEC["groups"][0], **changes}])


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


MALICIOUS: dict[str, Any] = {
    "a string": "adanorm",
    "a list": [SPEC],
    "a number": 1,
    "format as text": changed(format="1"),
    "format zero": changed(format=0),
    "version as a number": changed(version=1),
    "unknown entry": changed(auto_map={"AutoModel": "evil.Model"}),
    "groups as an object": changed(groups={}),
    "a group as text": changed(groups=["adanorm"]),
    "another norm": group(norm="os.system"),
    "a norm that is a list": group(norm=["adanorm"]),
    "an unknown key": group(forward="lambda x: x"),
    "an unknown setting": group(settings={"forward": "lambda x: x"}),
    "a setting of the layout": group(settings={"eps": 1e-5}),
    "a device as a setting": group(settings={"device": "cuda"}),
    "settings as a list": group(settings=[1]),
    "a nested setting": group(settings={"C": {"C": 1}}),
    "C as text": group(settings={"C": "1"}),
    "C as a bool": group(settings={"C": True}),
    "C infinite": group(settings={"C": 1e999}),
    "C beyond float": group(settings={"C": 10**400}),
    "k negative": group(settings={"k": -1.0}),
    "classes as text": changed(classes="my_norms.py"),
    "a class that is built in": changed(classes={"adanorm": {"class": "A", "file": "a.py", "files": {"a.py": "0"}}}),
    "a class of a module": changed(classes={"a": "os.system"}),
    "a file elsewhere": changed(classes={"a": {"class": "A", "file": "../a.py", "files": {"../a.py": "0"}}}),
    "a class that is not known": changed(classes={"a": {"class": "A", "file": "a.py", "files": {"a.py": "0"}}}),
    "an output dtype": group(output_dtype="float8"),
    "eps as a list": group(eps=[1e-5]),
    "modules as text": group(modules="embeddings.LayerNorm"),
    "modules of numbers": group(modules=[1]),
    "a regular expression": group(modules=["embeddings.(LayerNorm|dropout)"]),
    "a catastrophic regular expression": group(modules=["(a+)+$"]),
    "a wildcard in a name": group(modules=["embeddings.Layer*"]),
    "a path": group(modules=["../../etc/passwd"]),
    "an absolute path": group(modules=["/etc/passwd"]),
    "an empty name": group(modules=[""]),
    "a name too long": group(modules=["a." * 600 + "a"]),
    "too many names": group(modules=["a"] * 100_001),
    "too many groups": changed(groups=[SPEC["groups"][0]] * 10_001),
    "a deep shape": group(normalized_shape=nested(400)),
    "a deep module list": group(modules=nested(400)),
    "a negative shape": group(normalized_shape=[-1]),
    "a linear layer": group(modules=["encoder.layer.0.attention.self.query"]),
    "an embedding": group(modules=["embeddings.word_embeddings"]),
    "a whole layer": group(modules=["encoder.layer.0"]),
    "biases as text": changed(biases="encoder"),
    "a bias for a norm": changed(biases=["encoder.layer.0.output.LayerNorm"]),
    "eps for a linear layer": changed(eps={"encoder.layer.0.attention.self.query": 1e-5}),
    "eps as a list of names": changed(eps=["embeddings.LayerNorm"]),
}


@pytest.mark.parametrize("what", MALICIOUS)
def test_a_spec_that_is_none_is_refused_with_a_clear_error(checkpoint: Path, tmp_path: Path, what: str) -> None:
    folder = with_spec(checkpoint, tmp_path, MALICIOUS[what])
    with pytest.raises((TypeError, ValueError)) as caught:
        AutoModel.from_pretrained(folder)
    assert len(str(caught.value)) < 600


def test_a_config_nested_too_deep_to_read_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = with_spec(checkpoint, tmp_path, None)
    deep = "[" * 200_000 + "]" * 200_000
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("null", deep, 1))
    with pytest.raises(ValueError, match="not a JSON file"):
        write_model_card(folder)


def test_long_values_do_not_fill_the_error_message() -> None:
    for spec in (
        group(settings={"C": "x" * 10**6}),
        group(norm="x" * 10**6),
        group(normalized_shape=["x"] * 10**5),
        changed(version=9),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            AdaNormSpec.from_dict(spec)
        assert len(str(caught.value)) < 600


def test_a_spec_of_the_largest_size_is_read_in_a_moment() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=9, **sizes))
    names = [f"encoder.layer.*.a{i}.*.*.*.*" for i in range(100_000)]
    start = time.process_time()
    modeling_adanorm.apply_spec(model, group(modules=names), {})
    assert time.process_time() - start < 20
    assert not hf_adanorm.is_patched(model)


@pytest.mark.parametrize("groups", [1, 10_000])
def test_a_name_that_is_repeated_costs_no_more_than_one(groups: int) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 12, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=9, **sizes))
    one = group(modules=["encoder.layer.*.output.LayerNorm"] * (10_000 // groups))
    spec = {**one, "groups": one["groups"] * groups}
    start = time.process_time()
    modeling_adanorm.apply_spec(model, spec, {})
    assert time.process_time() - start < 5
    assert hf_adanorm.is_patched(model)


@pytest.mark.parametrize("name", ["h.0.attn.c_attn", "h.0.mlp.act", "h.0.mlp.dropout", "drop", "wte", "h.0"])
def test_what_is_no_norm_is_not_swapped_whatever_a_spec_says(name: str) -> None:
    model = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1))
    spec = group(modules=[name, "ln_f"], eps=1e-5, normalized_shape=[8])
    with pytest.raises(ValueError, match="no normalization layer"):
        modeling_adanorm.apply_spec(model, spec, {})
    assert not hf_adanorm.is_patched(model)


def test_names_are_compared_never_run_as_patterns() -> None:
    for path in (TRAVELER, ROOT / "hf_adanorm" / "saving" / "hooks.py", ROOT / "hf_adanorm" / "saving" / "spec.py"):
        assert "re" not in imported(path)
        assert "fnmatch" not in imported(path)


def test_a_spec_that_names_unknown_modules_swaps_nothing(checkpoint: Path, tmp_path: Path) -> None:
    config = BertConfig.from_pretrained(checkpoint)
    config.adanorm = group(modules=["__class__", "forward", "encoder.layer.7.output.LayerNorm"])
    assert not hf_adanorm.is_patched(BertModel(config))


def test_references_to_other_code_are_left_alone_and_not_followed(checkpoint: Path, tmp_path: Path) -> None:
    folder = with_spec(checkpoint, tmp_path, SPEC)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code from the checkpoint ran')\n")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoModel.from_pretrained(folder)


def test_a_card_holds_what_a_config_says_as_text_only(tmp_path: Path) -> None:
    config = {
        "architectures": ["Bert\n# heading <script>"],
        "model_type": "bert",
        "adanorm": changed(version="1```\n<!-- hf_adanorm: end -->\n# heading"),
        "auto_map": {"AutoModel": "x"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = write_model_card(tmp_path).read_text()
    assert "\n# heading" not in text
    assert "<script>" not in text
    write_model_card(tmp_path)
    assert text.count("hf_adanorm: begin") == 1


@pytest.mark.parametrize("nested", [True, False])
def test_keys_of_a_config_cannot_break_out_of_the_card(tmp_path: Path, nested: bool) -> None:
    evil = f"x`\n{END}\n# heading <script>alert(1)</script>\n```python\nimport os\n```\n{BEGIN}"
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "id2label": {"0": evil},
        "auto_map": {evil: "modeling_adanorm.BertModel", "AutoModel": f"modeling_adanorm.{evil}"},
        **({evil: {"adanorm": SPEC}} if nested else {"adanorm": SPEC}),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    first = write_model_card(tmp_path, command=evil).read_text()
    assert first.count(BEGIN) == first.count(END) == 1
    assert write_model_card(tmp_path, command=evil).read_text() == first
    plain = write_model_card(tmp_path).read_text()
    assert "heading" not in plain
    assert "script" not in plain
    assert "import os" not in plain


def test_no_module_option_takes_a_token() -> None:
    source = (ROOT / "hf_adanorm" / "cli.py").read_text()
    names = {node.arg for node in nodes(ROOT / "hf_adanorm" / "cli.py", ast.arg)}
    assert not any("token" in name for name in names)
    assert "get_token" not in source


def test_the_spec_that_is_right_loads(checkpoint: Path, tmp_path: Path) -> None:
    """The cases above fail for their own reason."""
    config = BertConfig.from_pretrained(checkpoint)
    config.adanorm = SPEC
    with torch.device("meta"):
        assert hf_adanorm.is_patched(BertModel(config))
