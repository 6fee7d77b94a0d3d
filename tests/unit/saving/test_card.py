"""The model card that is written beside a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from huggingface_hub import HfApi, ModelCard
from transformers.utils.hub import create_and_tag_model_card

from hf_adanorm import patch_model, unpatch_model, write_model_card
from hf_adanorm.saving.card import BEGIN, END, render_card, renew_card, without_section
from tests.integration.hub_client import build
from tests.integration.hub_server import HubServer
from tests.zoo.tiny_text import make_tokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build("detachnorm").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_saving_renews_our_section_only_for_other_norms(saved: Path) -> None:
    text = (saved / "README.md").read_text().replace("DetachNorm computes", "changed") + "\nA remark.\n"
    (saved / "README.md").write_text(text)
    build("detachnorm").save_pretrained(saved)
    assert (saved / "README.md").read_text() == text
    build("adanorm").save_pretrained(saved)
    text = (saved / "README.md").read_text()
    assert "changed" not in text
    assert "AdaNorm computes" in text
    assert text.endswith("\nA remark.\n")


def test_a_card_that_a_save_wrote_is_what_write_model_card_writes(saved: Path) -> None:
    before = (saved / "README.md").read_text()
    (saved / "README.md").unlink()
    assert write_model_card(saved).read_text() == before


def test_an_unpatched_save_takes_our_section_away(saved: Path) -> None:
    (saved / "README.md").write_text((saved / "README.md").read_text() + "\nA remark.\n")
    unpatch_model(build("detachnorm")).save_pretrained(saved)
    text = (saved / "README.md").read_text()
    assert BEGIN not in text
    assert "A remark." in text
    assert ModelCard(text).data.tags is None
    assert without_section(text) == text


def test_saving_a_config_alone_writes_no_card(tmp_path: Path) -> None:
    build().config.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "modeling_adanorm.py"]


def test_results_data_and_command_reach_front_matter_and_text(saved: Path) -> None:
    path = write_model_card(
        saved,
        model_id="me/model",
        base_model="google-bert/bert-base-uncased",
        datasets=["cornell-movie-review-data/rotten_tomatoes"],
        dataset_split="test",
        results={"accuracy": 0.772134, "loss": 0.5},
        command="/home/me/env/bin/python recipes/classification.py --norm adanorm --train_file=/data/me/train.csv",
        license="apache-2.0",
        tags=["mine"],
    )
    card = ModelCard(path.read_text())
    with HubServer(tokens={}) as hub:
        HfApi(hub.url)._validate_yaml(path.read_text())
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert card.data.datasets == ["cornell-movie-review-data/rotten_tomatoes"]
    assert card.data.metrics == ["accuracy", "loss"]
    assert [(r.metric_type, r.metric_value, r.dataset_split, r.task_type) for r in card.data.eval_results] == [
        ("accuracy", 0.7721, "test", "text-classification"),
        ("loss", 0.5, "test", "text-classification"),
    ]
    assert "| accuracy | 0.7721 |" in card.text
    assert "\npython recipes/classification.py --norm adanorm --train_file=train.csv\n" in card.text
    assert card.data.license == "apache-2.0"
    assert "\n# model\n" in card.text


def test_the_license_is_that_of_the_base_model_where_its_card_is_at_hand(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    assert ModelCard(write_model_card(saved, base_model=str(tmp_path / "base")).read_text()).data.license == "mit"


def test_refreshing_replaces_our_section_only(saved: Path) -> None:
    path = write_model_card(saved, datasets=["a/b"], results={"accuracy": 0.5})
    text = (
        path.read_text().replace("---\n", "---\nlicense: mit\n", 1).replace(BEGIN, f"Before.\n\n{BEGIN}")
        + "\nAfter.\n"
    )
    path.write_text(text)
    write_model_card(saved, datasets=["a/b"], results={"accuracy": 0.75})
    text = path.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index("Before.") < text.index(BEGIN) < text.index(END) < text.index("After.")
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit"
    (result,) = front["model-index"][0]["results"]
    assert [metric["value"] for metric in result["metrics"]] == [0.75]
    assert "0.75 |" in text
    assert "0.5 |" not in text


@pytest.mark.parametrize("norm", ["adanorm", None])
def test_a_card_brought_up_to_another_model_loses_the_scores_and_tags_of_the_one_before(
    saved: Path, norm: str | None
) -> None:
    path = write_model_card(saved, datasets=["a/b"], results={"accuracy": 0.5}, tags=["mine"])
    model = unpatch_model(build()) if norm is None else build(norm)
    renew_card(saved, model.config.to_dict())
    data = ModelCard(path.read_text()).data
    assert data.eval_results is None
    assert data.tags == (["mine"] if norm is None else ["mine", "hf_adanorm", norm])


@pytest.mark.parametrize("edited", [False, True])
def test_only_an_empty_form_of_transformers_is_replaced(tmp_path: Path, edited: bool) -> None:
    with HubServer(tokens={}) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        form = str(create_and_tag_model_card("me/new", tags=["mine"]))
    (tmp_path / "README.md").write_text(form.replace("[More Information Needed]", "My notes.") if edited else form)
    before = (tmp_path / "README.md").read_text()
    build().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert (text == before) is edited
    assert (BEGIN in text) is not edited
    assert "mine" in ModelCard(text).data.tags


def test_a_base_model_may_be_a_list(saved: Path) -> None:
    (saved / "README.md").write_text("---\nbase_model:\n- org/one\n- org/two\n---\n# Mine\n")
    card = ModelCard(write_model_card(saved).read_text())
    assert card.data.base_model == ["org/one", "org/two"]
    assert "made from [org/one]" in card.text


def test_a_card_without_front_matter_gains_one(saved: Path) -> None:
    (saved / "README.md").write_text("# By hand\n\nText.\n")
    text = write_model_card(saved).read_text()
    assert text.startswith("---\n")
    assert "# By hand\n\nText.\n" in text
    assert BEGIN in text


def test_the_base_model_is_the_hub_id_that_was_loaded_never_a_path(tmp_path: Path) -> None:
    model = build()
    for name, expected in (("org/model", "org/model"), (str(tmp_path), None), ("../up/model", None), ("", None)):
        model.config._name_or_path = name
        model.save_pretrained(tmp_path / "out")
        assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == expected
        (tmp_path / "out" / "README.md").unlink()


def test_long_lists_of_modules_are_cut_in_the_table_and_whole_in_the_spec(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=12, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    model = patch_model(BertModel(config), layers=range(11))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "and 14 more |" in text
    assert all(f"encoder.layer.{i}.output.LayerNorm" in text for i in range(11))


TASKS = {
    "text-classification": (transformers.BertForSequenceClassification, transformers.BertConfig, SIZES),
    "token-classification": (transformers.BertForTokenClassification, transformers.BertConfig, SIZES),
    "fill-mask": (transformers.BertForMaskedLM, transformers.BertConfig, SIZES),
    "text-generation": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {"n_embd": 16, "n_layer": 1, "n_head": 2},
    ),
    "text2text-generation": (
        transformers.BartForConditionalGeneration,
        transformers.BartConfig,
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    ),
}


@pytest.mark.parametrize("task", [*TASKS, "chat"])
def test_the_quickstart_of_a_card_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str) -> None:
    model_class, config_class, sizes = TASKS["text-generation" if task == "chat" else task]
    tokenizer = make_tokenizer()
    tokenizer.mask_token = "[UNK]"
    if task == "chat":
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), 2)
    patch_model(model_class(config_class(vocab_size=64, pad_token_id=0, **special, **sizes))).save_pretrained(tmp_path)
    text = write_model_card(tmp_path, model_id=str(tmp_path)).read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "trust_remote_code=True" in block
    assert ("apply_chat_template" in block) == (task == "chat")
    exec(block, {})
    assert capsys.readouterr().out


def test_the_card_names_the_norm_its_settings_and_how_it_differs(tmp_path: Path) -> None:
    build("detachnorm", detach_mean=False).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| detachnorm | detach_mean = False, detach_variance = True |" in text
    assert "DetachNorm computes y" in text
    assert "AdaNorm computes" not in text


def test_the_card_says_what_became_of_gains_and_biases() -> None:
    spec = {"format": 1, "version": "0.1.0", "groups": [{"norm": "adanorm", "modules": ["h.*.ln_1"]}]}
    own = {**spec, "groups": [{"norm": "dyt", "modules": ["h.*.ln_1"]}]}
    dropped, folded, kept = "replaced norms were dropped", "`folded_norms` in config.json lists were folded", "DyT"
    configs = {
        dropped: {"adanorm": spec},
        folded: {"adanorm": spec, "folded_norms": ["h.0.ln_1"]},
        kept: {"adanorm": own},
    }
    for told, config in configs.items():
        text = render_card(config)
        assert [word in text for word in (dropped, folded)] == [told == dropped, told == folded]


@pytest.mark.parametrize(
    ("left", "lost"),
    [
        ({"biases": ["h.*.attn.q_proj"]}, "biases that the fold added are missing"),
        ({"eps": {"h.0.ln_1": 1e-6}}, "eps the fold adjusted"),
    ],
)
def test_the_limits_are_those_of_the_model(left: dict[str, Any], lost: str) -> None:
    swapped = [{"norm": "adanorm", "modules": ["h.*.ln_1"]}]
    spec: dict[str, Any] = {"format": 1, "version": "0.1.0", "groups": [], **left}
    folded, patched = (render_card({"adanorm": {**spec, "groups": groups}}) for groups in ([], swapped))
    assert "size mismatch" in patched
    assert "ignore_mismatched_sizes" in patched
    assert "**loads without an error" in folded
    assert lost in folded
    assert "size mismatch" not in folded


def test_a_stock_model_gets_a_card_with_its_results_and_a_folded_one_our_tag() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    stock = render_card(config, results={"accuracy": 0.5}, dataset_name="local files")
    assert ModelCard(stock).data.tags is None
    assert "| local files | accuracy | 0.5 |" in stock
    assert "## Norms" not in stock
    folded = render_card({**config, "folded_norms": ["norm"]})
    assert ModelCard(folded).data.tags == ["hf_adanorm"]
    assert "trust_remote_code" not in folded


def test_write_model_card_refuses_a_folder_without_a_valid_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        write_model_card(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON"):
        write_model_card(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("---\na: [\n---\n", "front matter"), (f"{BEGIN}\n", "both markers"), (f"{END}\n{BEGIN}\n", "both markers")],
)
def test_write_model_card_refuses_a_card_it_cannot_keep(saved: Path, text: str, message: str) -> None:
    (saved / "README.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        write_model_card(saved)
    assert (saved / "README.md").read_text() == text
