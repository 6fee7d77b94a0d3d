"""The network of the parser: a model of transformers like any other."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_adanorm import inspect_model, patch_model
from tasks.transition_parser import TransitionParserConfig, TransitionParserForSequenceClassification

SIZES = {"vocab_size": 20, "num_tags": 8, "num_relations": 4, "embedding_size": 4, "hidden_size": 8, "num_labels": 7}


def some_features(count=3):
    draw = torch.Generator().manual_seed(0)
    groups = [torch.randint(size, (count, width), generator=draw) for size, width in ((20, 18), (8, 18), (4, 12))]
    return torch.cat(groups, dim=1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TransitionParserForSequenceClassification(TransitionParserConfig(**SIZES)).eval()


def test_a_norm_comes_before_the_activation_of_every_hidden_layer(model):
    assert "2 norms, 2 swapped" in str(inspect_model(patch_model(model, "none")))
    features = some_features()
    words, tags, relations = features.split([18, 18, 12], dim=1)
    embedded = (model.words(words), model.tags(tags), model.relations(relations))
    x = torch.cat([part.flatten(1) for part in embedded], 1)  # (3, 48 * 4)
    for layer in model.layers:
        x = torch.relu(layer.linear(x))
    torch.testing.assert_close(model(features).logits, model.classifier(x))


def test_with_labels_it_gives_the_loss(model):
    output = model(some_features(), labels=torch.tensor([0, 3, 6]))
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 3, 6]))
    assert output.loss.item() == pytest.approx(expected.item())
    assert model(some_features(), return_dict=False)[0].shape == (3, 7)


def test_it_is_saved_and_loads_by_the_stock_call_and_by_the_code_it_travels_with(model, tmp_path):
    patch_model(model, "adanorm", k=0.07).save_pretrained(tmp_path / "parser")
    here = AutoModelForSequenceClassification.from_pretrained(tmp_path / "parser")
    expected = model(some_features()).logits
    torch.testing.assert_close(here(some_features()).logits, expected)
    torch.save(some_features(), tmp_path / "features.pt")
    code = (
        "import torch, hf_adanorm\n"
        "from transformers import AutoModelForSequenceClassification\n"
        "model = AutoModelForSequenceClassification.from_pretrained('parser', trust_remote_code=True)\n"
        "norms = [(m.norm_name, m.k) for m in model.modules() if getattr(m, 'is_adanorm_module', False)]\n"
        "assert norms == [('adanorm', 0.07)] * 2, norms\n"
        "torch.save(model(torch.load('features.pt')).logits.detach(), 'logits.pt')\n"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert there.returncode == 0, there.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected.detach())


@pytest.mark.parametrize("name", ["embedding_size", "hidden_size", "num_hidden_layers"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        TransitionParserForSequenceClassification(TransitionParserConfig(**{**SIZES, name: 0}))
