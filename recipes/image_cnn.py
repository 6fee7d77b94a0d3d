"""A CNN of three convolutions with LayerNorm, as the paper trains on MNIST, as a model like any other.

"3-layer CNN" is all we have of the paper's. Here each layer is a 3x3 convolution, LayerNorm over the channels of every
position (as in ConvNeXt), ReLU and 2x2 max pooling; a linear classifier reads the flattened last layer. Importing this
module registers the classes with the Auto classes. The file travels with saved models: elsewhere they load with
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
    """Sizes of the CNN: `hidden_sizes` are the channels of its layers, images are `image_size` x `image_size`."""

    model_type = "layernorm_cnn"

    def __init__(
        self,
        image_size: int = 28,
        num_channels: int = 3,
        hidden_sizes: tuple[int, ...] | list[int] = (32, 64, 64),
        kernel_size: int = 3,
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        **kwargs: object,
    ):
        self.image_size = image_size
        self.num_channels = num_channels
        self.hidden_sizes = list(hidden_sizes)
        self.kernel_size = kernel_size
        self.dropout = dropout
        self.layer_norm_eps = layer_norm_eps
        super().__init__(**kwargs)


class LayerNormCnnLayer(nn.Module):
    """Convolution, norm over channels, ReLU, pooling: (batch, C, H, W) to (batch, C', H // 2, W // 2)."""

    def __init__(self, num_inputs: int, num_outputs: int, config: LayerNormCnnConfig):
        super().__init__()
        self.convolution = nn.Conv2d(num_inputs, num_outputs, config.kernel_size, padding="same")
        self.layernorm = nn.LayerNorm(num_outputs, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layernorm(self.convolution(x).permute(0, 2, 3, 1))  # channels last: (batch, H, W, C')
        return F.max_pool2d(F.relu(x.permute(0, 3, 1, 2)), 2)


class LayerNormCnnForImageClassification(PreTrainedModel):
    """The CNN with its classifier.

    Raises ValueError when the image is too small for so many poolings.
    """

    config_class = LayerNormCnnConfig
    base_model_prefix = "cnn"
    main_input_name = "pixel_values"

    def __init__(self, config: LayerNormCnnConfig):
        super().__init__(config)
        side = config.image_size >> len(config.hidden_sizes)
        if side < 1:
            raise ValueError(
                f"image_size {config.image_size} cannot be halved {len(config.hidden_sizes)} times: "
                f"give at least {1 << len(config.hidden_sizes)}, or fewer hidden_sizes"
            )
        sizes = [config.num_channels, *config.hidden_sizes]
        self.layers = nn.ModuleList(LayerNormCnnLayer(*pair, config) for pair in pairwise(sizes))
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(sizes[-1] * side * side, config.num_labels)
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
        """Logits (batch, classes) of images (batch, channels, image_size, image_size); with labels, the loss too."""
        x = pixel_values
        for layer in self.layers:
            x = layer(x)
        logits = self.classifier(self.dropout(torch.flatten(x, 1)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register(LayerNormCnnConfig.model_type, LayerNormCnnConfig, exist_ok=True)
AutoModelForImageClassification.register(LayerNormCnnConfig, LayerNormCnnForImageClassification, exist_ok=True)
LayerNormCnnConfig.register_for_auto_class()
LayerNormCnnForImageClassification.register_for_auto_class("AutoModelForImageClassification")
