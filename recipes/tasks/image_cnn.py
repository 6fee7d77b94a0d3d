"""A small CNN with LayerNorm, as the paper trains on MNIST, as a model like any other.

The paper: two convolutions, 1 to 20 and 20 to 50 channels, then linear layers, the norm before the activation of every
linear layer. Each convolution is followed by ReLU and 2x2 max pooling; hidden linear layers of `linear_sizes` and a
classifier read the flattened last map. The text leaves open whether a convolution, which is linear too, has a norm:
`norm_before` "linear" puts norms in the hidden linear layers alone, "all" in the convolutions as well, over the
channels of every position (as in ConvNeXt). Importing this module registers the classes with the Auto classes. The
file travels with saved models: elsewhere they load with
`AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class LayerNormCnnConfig(PreTrainedConfig):
    """Sizes of the CNN.

    `hidden_sizes` are the channels of its convolutions, `padding` is torch's ("same" or "valid"), `linear_sizes` the
    widths of the hidden linear layers, `norm_before` which activations a norm comes before. Images are `image_size` x
    `image_size` of `num_channels`; with `grayscale` the first convolution reads their mean over the channels.
    """

    model_type = "layernorm_cnn"

    def __init__(
        self,
        image_size: int = 28,
        num_channels: int = 3,
        hidden_sizes: tuple[int, ...] | list[int] = (32, 64, 64),
        kernel_size: int = 3,
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        padding: str = "same",
        linear_sizes: tuple[int, ...] | list[int] = (),
        norm_before: str = "all",
        grayscale: bool = False,
        **kwargs: object,
    ):
        self.image_size = image_size
        self.num_channels = num_channels
        self.hidden_sizes = list(hidden_sizes)
        self.kernel_size = kernel_size
        self.dropout = dropout
        self.layer_norm_eps = layer_norm_eps
        self.padding = padding
        self.linear_sizes = list(linear_sizes)
        self.norm_before = norm_before
        self.grayscale = grayscale
        super().__init__(**kwargs)


class LayerNormCnnLayer(nn.Module):
    """Convolution, norm over channels, ReLU, pooling: (batch, C, H, W) to (batch, C', H' // 2, W' // 2)."""

    def __init__(self, num_inputs: int, num_outputs: int, config: LayerNormCnnConfig):
        super().__init__()
        self.convolution = nn.Conv2d(num_inputs, num_outputs, config.kernel_size, padding=config.padding)
        normed = config.norm_before == "all"
        self.layernorm = nn.LayerNorm(num_outputs, eps=config.layer_norm_eps) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x).permute(0, 2, 3, 1)  # channels last: (batch, H', W', C')
        return F.max_pool2d(F.relu(self.layernorm(x).permute(0, 3, 1, 2)), 2)


class LayerNormCnnLinear(nn.Module):
    """Linear layer, norm, ReLU: (batch, inputs) to (batch, outputs)."""

    def __init__(self, num_inputs: int, num_outputs: int, config: LayerNormCnnConfig):
        super().__init__()
        self.linear = nn.Linear(num_inputs, num_outputs)
        self.layernorm = nn.LayerNorm(num_outputs, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layernorm(self.linear(x)))


class LayerNormCnnForImageClassification(PreTrainedModel):
    """The CNN with its classifier.

    Raises ValueError for an image that is too small to pool, and for an unknown `norm_before` or `padding`.
    """

    config_class = LayerNormCnnConfig
    base_model_prefix = "cnn"
    main_input_name = "pixel_values"

    def __init__(self, config: LayerNormCnnConfig):
        super().__init__(config)
        if config.norm_before not in ("linear", "all"):
            raise ValueError(f"norm_before must be linear or all, got {config.norm_before!r}")
        if config.padding not in ("same", "valid"):
            raise ValueError(f"padding must be same or valid, got {config.padding!r}")
        lost = 0 if config.padding == "same" else config.kernel_size - 1
        side, least = config.image_size, 1
        for _ in config.hidden_sizes:
            side, least = max(side - lost, 0) // 2, 2 * least + lost
        if side < 1:
            raise ValueError(
                f"image_size {config.image_size} cannot be halved {len(config.hidden_sizes)} times: "
                f"give at least {least}, or fewer hidden_sizes"
            )
        sizes = [1 if config.grayscale else config.num_channels, *config.hidden_sizes]
        self.layers = nn.ModuleList(LayerNormCnnLayer(*pair, config) for pair in pairwise(sizes))
        widths = [sizes[-1] * side * side, *config.linear_sizes]
        self.linear_layers = nn.ModuleList(LayerNormCnnLinear(*pair, config) for pair in pairwise(widths))
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(widths[-1], config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **_: object
    ) -> ImageClassifierOutputWithNoAttention | tuple[Tensor, ...]:
        """Return logits (batch, classes) of images (batch, channels, height, width); with labels, also the loss."""
        x = pixel_values.mean(1, keepdim=True) if self.config.grayscale else pixel_values
        for layer in self.layers:
            x = layer(x)
        x = torch.flatten(x, 1)
        for layer in self.linear_layers:
            x = layer(x)
        logits = self.classifier(self.dropout(x))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register(LayerNormCnnConfig.model_type, LayerNormCnnConfig, exist_ok=True)
AutoModelForImageClassification.register(LayerNormCnnConfig, LayerNormCnnForImageClassification, exist_ok=True)
LayerNormCnnConfig.register_for_auto_class()
LayerNormCnnForImageClassification.register_for_auto_class("AutoModelForImageClassification")
