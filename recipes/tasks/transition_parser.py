"""The network of a transition parser with LayerNorm, as the paper trains on the Penn Treebank: a model like any other.

The words, tags and relations around a state (18, 18 and 12 of them, after Chen and Manning 2014) are embedded and
concatenated. Linear layers, each followed by a norm, an activation and dropout, and a linear classifier choose the
next transition: "the norm before the activation of every linear layer". The paper counts three layers: two hidden
ones and the classifier. Importing this module registers the classes with the Auto classes. The file travels with
saved models: elsewhere they load with `AutoModelForSequenceClassification.from_pretrained(folder,
trust_remote_code=True)`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import SequenceClassifierOutput


class TransitionParserConfig(PreTrainedConfig):
    """Sizes of the network, and how its sentences are read and parsed.

    `vocab_size`, `num_tags` and `num_relations` count what is embedded, the ids below that of the first real one
    included. `id2label` names the transitions. `tag_column` says which tags of a file it was trained on ("upos",
    "xpos"); with `single_root` the root of a tree has one dependent.
    """

    model_type = "transition_parser"

    def __init__(
        self,
        vocab_size: int = 4,
        num_tags: int = 4,
        num_relations: int = 2,
        embedding_size: int = 50,
        hidden_size: int = 512,
        num_hidden_layers: int = 2,
        hidden_act: str = "relu",
        dropout: float = 0.2,
        layer_norm_eps: float = 1e-5,
        tag_column: str = "xpos",
        single_root: bool = True,
        **kwargs: object,
    ):
        self.vocab_size = vocab_size
        self.num_tags = num_tags
        self.num_relations = num_relations
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.hidden_act = hidden_act
        self.dropout = dropout
        self.layer_norm_eps = layer_norm_eps
        self.tag_column = tag_column
        self.single_root = single_root
        super().__init__(**kwargs)


class TransitionParserLayer(nn.Module):
    """Linear layer, norm, activation, dropout: (batch, inputs) to (batch, hidden_size)."""

    def __init__(self, num_inputs: int, num_outputs: int, config: TransitionParserConfig):
        super().__init__()
        self.linear = nn.Linear(num_inputs, num_outputs)
        self.layernorm = nn.LayerNorm(num_outputs, eps=config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.activation(self.layernorm(self.linear(x))))


class TransitionParserForSequenceClassification(PreTrainedModel):
    """Scores of all transitions from the features of states. Raises ValueError for sizes below 1."""

    config_class = TransitionParserConfig
    base_model_prefix = "parser"
    main_input_name = "input_ids"
    num_features = (18, 18, 12)  # words, tags, relations

    def __init__(self, config: TransitionParserConfig):
        super().__init__(config)
        for name in ("embedding_size", "hidden_size", "num_hidden_layers"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(config, name)}")
        self.words = nn.Embedding(config.vocab_size, config.embedding_size)
        self.tags = nn.Embedding(config.num_tags, config.embedding_size)
        self.relations = nn.Embedding(config.num_relations, config.embedding_size)
        sizes = [sum(self.num_features) * config.embedding_size, *[config.hidden_size] * config.num_hidden_layers]
        self.layers = nn.ModuleList(TransitionParserLayer(*pair, config) for pair in pairwise(sizes))
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **_: object
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Return logits (batch, transitions) of features (batch, 48); with labels, also the loss."""
        groups = input_ids.split(self.num_features, dim=1)
        embedded = [table(ids).flatten(1) for table, ids in zip(self.embeddings(), groups, strict=True)]
        x = torch.cat(embedded, dim=1)  # (batch, 48 * embedding_size)
        for layer in self.layers:
            x = layer(x)
        logits = self.classifier(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def embeddings(self) -> tuple[nn.Embedding, nn.Embedding, nn.Embedding]:
        """Return the tables of words, tags and relations."""
        return self.words, self.tags, self.relations


AutoConfig.register(TransitionParserConfig.model_type, TransitionParserConfig, exist_ok=True)
AutoModelForSequenceClassification.register(
    TransitionParserConfig, TransitionParserForSequenceClassification, exist_ok=True
)
TransitionParserConfig.register_for_auto_class()
TransitionParserForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
