"""The translation recipe as users run it: tiny models, real data files, real processes."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, MBartTokenizer, NllbTokenizer

import hf_adanorm
import translation
from common.options import parse_options
from tasks.translation import decoder_inputs
from tests.recipes.fault_runs import assert_refused, flags, norms_of
from tests.recipes.recipe_process import read_results, same_weights, weights
from tests.recipes.tiny_configs import TINY_TRANSLATOR

RECIPES = Path(translation.__file__).parent
NUM_NORMS = 7
MARIAN = json.dumps({**TINY_TRANSLATOR, "model_type": "marian"})
SCORES = {"sacrebleu", "sacrebleu_lowercase", "bleu_tokenized_lowercase", "chrf"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A language whose words have other names and stand in reverse order; an odd number of validation pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    draw = random.Random(0)
    files = {}
    for split, size in {"train": 160, "validation": 21, "test": 12}.items():
        rows = []
        for _ in range(size):
            numbers = draw.choices(range(12), k=draw.randrange(1, 9))
            rows.append(
                {
                    "de": " ".join(f"wort{chr(97 + n)}" for n in numbers),
                    "en": " ".join(f"{chr(97 + n)}word" for n in reversed(numbers)),
                }
            )
        files[split] = folder / f"{split}.jsonl"
        files[split].write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return files


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def arguments(pairs, cache):
    return lambda folder, **changes: arguments_for(pairs, cache, folder, **changes)


def arguments_for(pairs, cache, folder, **changes):
    options = {
        "train_file": pairs["train"],
        "validation_file": pairs["validation"],
        "model_config": json.dumps(TINY_TRANSLATOR),
        "dropout": 0.1,
        "vocab_size": 80,
        "max_source_length": 32,
        "max_target_length": 32,
        "max_tokens": 128,
        "max_steps": 40,
        "eval_steps": 20,
        "learning_rate": 0.01,
        "num_beams": 2,
        "cache_dir": cache,
        "output_dir": folder,
        **changes,
    }
    return flags(options)


@pytest.fixture(scope="module")
def finished(pairs, cache, tmp_path_factory):
    """A finished run tested on its own validation file: both scores must agree."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    changes = {"C": 1.3, "k": 0.07, "test_file": pairs["validation"], "average_checkpoints": 2, "max_steps": 300}
    changes |= {"eval_steps": 100, "warmup_steps": 20, "lr_schedule": "inverse_sqrt", "initialization": "kaiming"}
    changes |= {"max_target_length": 40}
    translation.main(arguments_for(pairs, cache, folder, **changes))
    return folder


def test_results_hold_what_others_script_against(finished):
    results = read_results(finished)
    assert (results["norm"], results["norm_modules"], results["seed"]) == ("adanorm", NUM_NORMS, 1)
    assert set(results["validation"]) == SCORES | {"loss"}
    assert set(results["test"]) == set(results["signatures"]) == SCORES
    assert results["best_step"] in {100, 200, 300}
    for name in ("train_samples_per_second", "train_target_tokens_per_second", "peak_memory_mb", "parameters"):
        assert results[name] > 0
    assert results["validation"]["loss"] < results["history"][0]["loss"]


def test_scores_in_a_fresh_process_equal_those_in_memory(finished):
    results = read_results(finished)
    for prefix, name in itertools.product(("", "average_"), SCORES):
        assert results[f"{prefix}test"][name] == pytest.approx(results[f"{prefix}validation"][name]), name
    assert results["validation"]["chrf"] > 20  # it learned something: the comparison is not of empty texts


def test_translations_stand_beside_their_references(finished, pairs):
    rows = [json.loads(line) for line in (finished / "test_translations.jsonl").read_text().splitlines()]
    original = [json.loads(line) for line in pairs["validation"].read_text().splitlines()]
    assert [(row["source"], row["reference"]) for row in rows] == [(row["de"], row["en"]) for row in original]
    assert len({row["translation"] for row in rows}) > 5
    rows = (finished / "validation_translations.jsonl").read_text().splitlines()  # of the last evaluation
    assert [json.loads(row)["reference"] for row in rows] == [row["en"] for row in original]


@pytest.mark.parametrize("name", ["best", "last", "average"])
def test_the_saved_model_translates_by_stock_calls_with_its_norms(finished, name):
    model = AutoModelForSeq2SeqLM.from_pretrained(finished / name)
    tokenizer = AutoTokenizer.from_pretrained(finished / name)
    assert tokenizer.model_max_length == 32  # of sources, by which translate.py cuts them
    assert norms_of(model) == [("adanorm", {"C": 1.3, "k": 0.07})] * NUM_NORMS
    assert model.generation_config.num_beams == 2
    output = model.generate(**tokenizer("worta wortb", return_tensors="pt"))
    assert "word" in tokenizer.decode(output[0], skip_special_tokens=True)


def test_the_average_is_the_mean_of_the_last_checkpoints(finished):
    assert read_results(finished)["average_steps"] == [200, 300]
    left, right = weights(finished, 200), weights(finished, 300)
    average = load_file(finished / "average" / "model.safetensors")
    checked = [name for name in average if name in left and left[name].is_floating_point()]
    assert len(checked) > 30
    for name in checked:
        assert torch.allclose(average[name], (left[name] + right[name]) / 2, atol=1e-7), name


def test_early_stopping_counts_evaluations_without_a_better_score(arguments, tmp_path):
    # Updates of no effect: the first evaluation stays the best.
    settings = {"learning_rate": 1e-30, "warmup_steps": 0, "eval_steps": 3, "early_stopping_patience": 2}
    translation.main(arguments(tmp_path, best_metric="loss", **settings))
    results = read_results(tmp_path)
    assert (results["best_step"], results["steps"]) == (3, 9)


@pytest.mark.parametrize("sizes", [{"model_type": "marian"}, {"model_type": "mbart"}, {"model_type": "t5"}])
def test_other_architectures_start_from_a_config(arguments, tmp_path, sizes, capsys):
    changes = {"norm": "layernorm-simple"}
    if sizes["model_type"] == "t5":
        config = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        changes |= {"targets": "rmsnorm", "source_prefix": "- translate: "}
    else:
        config = {**TINY_TRANSLATOR, **sizes}
    translation.main(arguments(tmp_path, model_config=json.dumps(config), max_steps=2, **changes))
    assert read_results(tmp_path)["norm_modules"] > 0
    how = "--output TRANSLATIONS --source_prefix='- translate: '" if "source_prefix" in changes else "TRANSLATIONS\n"
    assert how in capsys.readouterr().out
    config = AutoConfig.from_pretrained(tmp_path / "best")
    assert config.decoder_start_token_id == config.eos_token_id == 2


def test_the_same_text_is_tokenized_once_for_all_runs(pairs, tmp_path):
    cache = tmp_path / "cache"
    translation.main(arguments_for(pairs, cache, tmp_path / "a", max_steps=1, preprocessing_workers=2))
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(written) >= 2
    translation.main(arguments_for(pairs, cache, tmp_path / "b", max_steps=1, norm="layernorm", seed=2))
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == written
    alone = tmp_path / "alone"
    translation.main(arguments_for(pairs, alone, tmp_path / "c", max_steps=1))
    assert same_weights(tmp_path / "a" / "checkpoint-1", tmp_path / "c" / "checkpoint-1")


def start_from(tokenizer, model_type, folder, **codes):
    """Save an untrained model with its tokenizer, and return the options that train it further."""
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    sizes = {**TINY_TRANSLATOR, "model_type": model_type}
    for part in (
        tokenizer,
        AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**sizes, vocab_size=len(tokenizer), **special)),
    ):
        part.save_pretrained(folder)
    return {"model_config": "{}", "model_name_or_path": folder, "max_steps": 2, "max_validation_samples": 3, **codes}


def test_mbarts_decoder_starts_with_the_language(arguments, tmp_path):
    tokenizer = MBartTokenizer(src_lang="de_DE", tgt_lang="en_XX")
    codes = {"source_lang_code": "de_DE", "target_lang_code": "en_XX"}
    translation.main(arguments(tmp_path / "run", **start_from(tokenizer, "mbart", tmp_path / "base", **codes)))
    settings = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "best").generation_config
    assert settings.decoder_start_token_id == tokenizer.convert_tokens_to_ids("en_XX")


def test_a_multilingual_model_is_told_its_languages(arguments, tmp_path):
    """NLLB's tokenizer: the source begins with its language, the target is forced to begin with its own."""
    letters = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"wortabcdefghijkl"]
    tokenizer = NllbTokenizer(vocab={text: n for n, text in enumerate(letters)}, merges=[])
    codes = {"source_lang_code": "deu_Latn", "target_lang_code": "eng_Latn"}
    translation.main(arguments(tmp_path / "run", **start_from(tokenizer, "m2m_100", tmp_path / "base", **codes)))
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "best")
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "run" / "best")
    english = reloaded.convert_tokens_to_ids("eng_Latn")
    assert model.generation_config.forced_bos_token_id == english
    if not hasattr(type(reloaded), "src_lang"):
        pytest.skip("transformers 5.0 reloads it as a tokenizer without languages")
    reloaded.src_lang = "deu_Latn"
    inputs = reloaded("worta", return_tensors="pt")
    assert inputs["input_ids"][0, 0] == reloaded.convert_tokens_to_ids("deu_Latn")
    assert model.generate(**inputs)[0, 1] == english


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_file": "absent.{lang}.gz"}, "--train_file absent.{lang}.gz: no such file for {lang} = de"),
        ({"target_lang": "de"}, "--source_lang and --target_lang are both 'de'"),
        ({"max_tokens": 5}, "--max_tokens 5: the longest training sentence alone has"),
        ({"average_checkpoints": 1}, "--average_checkpoints must be 0 or at least 2"),
        (
            {"model_config": MARIAN, "max_source_length": 99},
            "a length of 99 tokens is beyond the model's 32 positions",
        ),
    ],
)
def test_bad_input_ends_in_one_line_before_training(changes, said, arguments, tmp_path, capsys):
    assert_refused(translation.main, arguments(tmp_path / "run", **changes), said, capsys)


def test_the_loss_of_shifted_labels_is_the_models_own(finished):
    model = AutoModelForSeq2SeqLM.from_pretrained(finished / "best").eval()
    source = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 1]])
    labels = torch.tensor([[9, 8, 2], [7, 2, -100]])
    with torch.no_grad():
        own = model(input_ids=source, labels=labels).loss
        logits = model(input_ids=source, decoder_input_ids=decoder_inputs(model, labels)).logits
    assert torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) == pytest.approx(own.item())


@pytest.mark.parametrize(
    ("name", "norms", "millions"),
    [
        ("iwslt14_de_en", 32, 36),
        ("iwslt15_en_vi", 32, 49),
        ("wmt14_en_de", 32, 61),
        ("multi30k_de_en", 17, 1.5),
        ("multi30k_prenorm", 17, 1.5),
        ("demo_en_de", 12, 1.2),
        ("demo_en_vi", 12, 1.0),
    ],
)
def test_every_config_is_read_and_builds_the_model_it_speaks_of(name, norms, millions):
    options = parse_options(translation.TranslationOptions, ["--config", str(RECIPES / "configs" / f"{name}.yaml")])
    with torch.device("meta"):
        config = AutoConfig.for_model(**options.model_config, vocab_size=options.vocab_size)
        model = AutoModelForSeq2SeqLM.from_config(config)
    hf_adanorm.patch_model(model, options.norm, **options.norm_settings)
    assert len(norms_of(model)) == norms
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.05)
    if name.startswith("demo"):
        assert all(Path(getattr(options, f"{split}_file")).is_file() for split in ("train", "validation", "test"))


@pytest.mark.parametrize("path", sorted((RECIPES / "launch").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_launch_file_is_read_by_accelerate(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == {"one_gpu": 1, "two_nodes": 16}.get(path.stem, 8)
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
