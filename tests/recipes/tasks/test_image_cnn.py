"""The small CNN of the paper's MNIST."""

import pytest
import torch

from common.options import read_config
from hf_adanorm import inspect_model, patch_model
from tasks.image_cnn import LayerNormCnnConfig, LayerNormCnnForImageClassification


def test_the_cnn_has_a_norm_a_layer_that_patching_finds():
    model = LayerNormCnnForImageClassification(LayerNormCnnConfig(image_size=8, hidden_sizes=[4, 4, 4]))
    patch_model(model, "none")
    pixels = torch.randn(2, 3, 8, 8)
    output = model(pixels, labels=torch.tensor([0, 1]))
    assert output.logits.shape == (2, 2)
    assert output.loss.item() == pytest.approx(
        torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1])).item()
    )
    assert "3 norms, 3 swapped" in str(inspect_model(model))


@pytest.mark.parametrize(
    ("norm_before", "names"),
    [
        ("linear", ["linear_layers.0.layernorm"]),
        ("all", ["layers.0.layernorm", "layers.1.layernorm", "linear_layers.0.layernorm"]),
    ],
)
def test_the_papers_cnn_in_both_readings(norm_before, names):
    sizes = read_config("recipes/configs/mnist.yaml")["model_config"]
    config = LayerNormCnnConfig(**{**sizes, "norm_before": norm_before, "num_labels": 10})
    model = LayerNormCnnForImageClassification(config)
    weights = {name: tuple(value.shape) for name, value in model.named_parameters() if value.ndim > 1}
    assert weights == {
        "layers.0.convolution.weight": (20, 1, 5, 5),
        "layers.1.convolution.weight": (50, 20, 5, 5),
        "linear_layers.0.linear.weight": (500, 50 * 4 * 4),
        "classifier.weight": (10, 500),
    }
    assert [name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)] == names
    pixels = torch.randn(2, 3, 28, 28)
    gray = pixels.mean(1, keepdim=True).expand_as(pixels)
    torch.testing.assert_close(model(pixels).logits, model(gray).logits)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"image_size": 4}, "image_size 4 cannot be halved 3 times: give at least 8"),
        ({"image_size": 21, "padding": "valid"}, "image_size 21 cannot be halved 3 times: give at least 22"),
        ({"norm_before": "relu"}, "norm_before must be linear or all, got 'relu'"),
        ({"padding": 2}, "padding must be same or valid, got 2"),
    ],
)
def test_sizes_the_cnn_cannot_have_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        LayerNormCnnForImageClassification(LayerNormCnnConfig(**sizes))
