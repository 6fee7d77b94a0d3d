import dataclasses
import inspect
import re
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import classification
import hf_adanorm
from common.options import OptionError, PatchOptions, check_ranges, parse_options
from tasks.options import ClassificationOptions, LanguageModelingOptions, ParsingOptions, TranslationOptions

ALL_OPTIONS = (ClassificationOptions, LanguageModelingOptions, ParsingOptions, TranslationOptions)
RECIPES = Path(classification.__file__).parent


def test_config_file_sets_options_and_the_command_line_wins(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("norm: detachnorm\nlearning_rate: 1e-3\nmodel_config: {model_type: bert, hidden_size: 8}\n")
    options = parse_options(ClassificationOptions, ["--config", str(config), "--norm", "none", "--layers", "[0, -1]"])
    assert (options.norm, options.learning_rate, options.layers) == ("none", 1e-3, [0, -1])
    assert options.model_config == {"model_type": "bert", "hidden_size": 8}


def test_data_files_in_a_config_are_relative_to_it(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("train_file: data/train.csv\n")
    options = parse_options(ClassificationOptions, [f"--config={config}", "--test_file", "here.csv"])
    assert options.train_file == str(tmp_path / "data" / "train.csv")
    assert options.test_file == "here.csv"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--nrom", "none"], "unknown option --nrom: adanorm has the settings C, k; did you mean '--norm'?"),
        (["--norm", "batchnorm"], "layernorm-simple"),
        (["--norm", "layernorm-simple", "--k", "0.1"], "unknown option --k: layernorm-simple has no settings"),
        (["--norm", "layernorm", "--k", "0.1"], "unknown option --k: layernorm has no settings"),
        (["--norm", "dyt:C=3"], "--norm dyt: 'C' is not a setting of 'dyt'"),
        (["--norm", "absent.py:Mine"], "--norm absent.py:Mine: absent.py does not exist"),
        (["--norm", "adanrom"], "got 'adanrom'; did you mean 'adanorm'?"),
        (["--batch_size", "0"], "--batch_size must be positive, got 0"),
        (["--random_crop_padding", "-1"], "--random_crop_padding must be at least 0, got -1"),
        (["--adam_beta1", "1"], "--adam_beta1 must be in [0, 1), got 1"),
        (["--weight_decay", "-1"], "--weight_decay must be at least 0, got -1"),
        (["--seed", "one"], "--seed: expected a whole number, got 'one'"),
        (["--learning_rate", "abc"], "--learning_rate: expected a number, got 'abc'"),
        (["--lowercase", "maybe"], "--lowercase: expected true or false, got 'maybe'"),
        (["--model_config", "bert"], "--model_config: expected a mapping, got 'bert'"),
        (["--layers", "one"], "--layers: expected a list or null, got 'one'"),
        (["--seed"], "--seed: expected one argument"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config", "absent.yaml"], "absent.yaml: no such file"),
    ],
)
def test_bad_command_lines_end_with_code_2_and_the_reason(argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_options(ClassificationOptions, argv)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "the key 'seed' is repeated"),
        ("seed: [1\n", "not a YAML file"),
        ("- seed\n", "expected a mapping of options to values, got list"),
        ("sede: 1\n", "unknown option 'sede'; did you mean 'seed'?"),
        ("seed: {a: 1}\n", "--seed: expected a whole number, got {'a': 1}"),
    ],
)
def test_a_bad_config_file_is_refused_in_one_line(text, said, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        parse_options(ClassificationOptions, ["--config", str(tmp_path / "run.yaml")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_an_unquoted_no_is_a_precision(tmp_path):
    (tmp_path / "run.yaml").write_text("mixed_precision: no\n")
    assert parse_options(ClassificationOptions, ["--config", str(tmp_path / "run.yaml")]).mixed_precision == "no"


def values(hint):
    """Return a strategy for values of an option's type, as YAML contains them."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(parts)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, parts))
    if origin is list:
        return st.lists(values(parts[0]), max_size=2)
    texts = st.sampled_from(["outputs/a", "löschen", "x.jsonl", "a b", "1984"])
    simple = {types.NoneType: st.none(), bool: st.booleans(), int: st.integers(1, 1000), float: st.floats(0.001, 0.9)}
    simple |= {str: texts, dict: st.dictionaries(st.sampled_from(["a", "b"]), st.integers() | texts, max_size=2)}
    return simple[origin or hint]


@pytest.mark.parametrize("recipe", ALL_OPTIONS, ids=lambda recipe: recipe.__name__)
@settings(max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_option_of_a_config_file_arrives_unchanged(recipe, tmp_path, data):
    hints = typing.get_type_hints(recipe)
    names = sorted({item.name for item in dataclasses.fields(recipe)} - {"norm", "norm_settings"})
    config = {name: data.draw(values(hints[name])) for name in data.draw(st.sets(st.sampled_from(names), max_size=25))}
    try:
        check_ranges(recipe(**config))
    except OptionError:
        assume(False)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    options = parse_options(recipe, ["--config", str(tmp_path / "run.yaml")])
    for name, value in config.items():
        expected = str((tmp_path / value).resolve()) if name.endswith("_file") and value is not None else value
        assert getattr(options, name) == expected, name


@pytest.mark.parametrize("given", ["tensorboard", "[tensorboard]", '["tensorboard"]'])
def test_a_plain_value_is_a_list_of_one(given, tmp_path):
    (tmp_path / "run.yaml").write_text(f"report_to: {given}\nlayers: 3\n")
    for argv in (["--report_to", given, "--layers=3"], ["--config", str(tmp_path / "run.yaml")]):
        options = parse_options(ClassificationOptions, argv)
        assert (options.report_to, options.layers) == (["tensorboard"], [3])
    assert parse_options(ClassificationOptions, ["--layers", "-1"]).layers == [-1]
    assert parse_options(ClassificationOptions, ["--layers", "- 1"]).layers == [1]  # a list of YAML's
    assert parse_options(ClassificationOptions, ["--layers", "null", "--include", "a.*"]).include == "a.*"


SCRIPTS = ("classification", "translation", "language_modeling", "parsing", "compare")
STARTS = [(script, argument) for script in SCRIPTS for argument in ("--help", None)]


@pytest.mark.parametrize(
    ("script", "argument"), [*STARTS, ("parsing", "--learning_rate=x"), ("compare", "--config=absent.yaml")]
)
def test_help_and_mistakes_come_before_torch(script, argument):
    command = [sys.executable, "-X", "importtime", RECIPES / f"{script}.py", *([argument] if argument else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (0 if argument == "--help" else 2)
    assert not re.search(r"\| +(torch|transformers|accelerate|datasets)$", done.stderr, re.MULTILINE)
    if argument is None and script != "compare":
        assert "try --config recipes/configs/" in done.stderr


def test_the_patch_options_are_those_of_patch_model():
    fields = {item.name: item for item in dataclasses.fields(PatchOptions)}
    theirs = dict(inspect.signature(hf_adanorm.patch_model).parameters)
    theirs |= inspect.signature(hf_adanorm.Fold).parameters
    assert fields.keys() - theirs.keys() == {"calibrate_k", "norm_settings", "norm_schedule"}
    for name in fields.keys() & theirs.keys():
        assert fields[name].default == theirs[name].default, name


MY_NORM = """
from torch import nn

class Mine(nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, *, alpha=0.5, seeds=1):
        super().__init__()

    def forward(self, x):
        return x
"""


@pytest.mark.parametrize(
    ("argv", "norm", "settings"),
    [
        (["--k", "0.05"], "adanorm", {"C": 2.0, "k": 0.05}),  # the config sets C of adanorm
        (["--norm", "adanorm:k=0.05,C=3"], "adanorm", {"C": 3, "k": 0.05}),
        (["--norm", "adanorm:k=0.05", "--k=0.02"], "adanorm", {"C": 2.0, "k": 0.02}),
        (["--norm", "detachnorm", "--detach_mean", "false"], "detachnorm", {"detach_mean": False}),
        (["--norm", "{file}:Mine", "--alpha", "0.7", "--seeds", "2"], "{file}:Mine", {"alpha": 0.7, "seeds": 2}),
        (["--norm", "{file}:Mine:alpha=0.7"], "{file}:Mine", {"alpha": 0.7}),
        (["--norm", "layernorm"], "layernorm", {}),
    ],
)
def test_settings_of_a_norm_come_from_flags_its_text_and_the_config(argv, norm, settings, tmp_path):
    (tmp_path / "mine.py").write_text(MY_NORM)
    (tmp_path / "run.yaml").write_text("norm_settings: {adanorm: {C: 2.0}}\nseed: 2\n")
    argv = [word.format(file=tmp_path / "mine.py") for word in argv]
    options = parse_options(ClassificationOptions, ["--config", str(tmp_path / "run.yaml"), *argv])
    assert (options.norm, options.norm_settings) == (norm.format(file=tmp_path / "mine.py"), settings)


def test_the_file_of_a_norm_in_a_config_is_relative_to_it(tmp_path):
    (tmp_path / "mine.py").write_text(MY_NORM)
    (tmp_path / "run.yaml").write_text("norm: mine.py:Mine\nnorm_settings: {alpha: 0.7}\n")
    options = parse_options(ClassificationOptions, ["--config", str(tmp_path / "run.yaml")])
    assert (options.norm, options.norm_settings) == (f"{tmp_path / 'mine.py'}:Mine", {"alpha": 0.7})


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_options(ClassificationOptions, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for item in dataclasses.fields(ClassificationOptions):
        assert f"--{item.name} " in text
        assert item.metadata["help"].split()[0] in text


@pytest.mark.parametrize(("hidden", "script"), [("yaml", "parsing"), ("sacrebleu", "translation")])
def test_what_is_not_installed_is_named_with_the_command(hidden, script):
    hide = "import importlib.util as u, runpy, sys; find = u.find_spec; sys.path.insert(0, sys.argv.pop(1)); "
    hide += f"u.find_spec = lambda name: None if name == {hidden!r} else find(name); "
    hide += f"runpy.run_path(sys.path[0] + '/{script}.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hide, RECIPES, "--seed", "2"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: not installed: {hidden}. In the checkout: pip install -e '.[recipes]'\n",
    )
