"""How patched models are saved and loaded: the spec, the hooks in transformers and PEFT, the model card, the files."""

from typing import TYPE_CHECKING

from hf_adanorm._lazy import lazily

if TYPE_CHECKING:
    from .card import CARD_NAME, describes, read_card, read_config, renew_card, write_model_card
    from .files import TEMPORARY, leads_outside, write_file
    from .marks import folded_norms, mark_folded
    from .spec import all_configs, configs_of, left_by_folds, own_configs, resolved_spec, swapped_norms, write_specs
    from .travel import CodeReport, inspect_code
    from .wrapping import when_imported

# `import hf_adanorm` comes through here and must stay cheap: the spec and the card need torch and transformers.
__getattr__, __dir__ = lazily(
    __name__,
    {
        "card": "CARD_NAME describes read_card read_config renew_card write_model_card",
        "files": "TEMPORARY leads_outside write_file",
        "marks": "folded_norms mark_folded",
        "spec": "all_configs configs_of left_by_folds own_configs resolved_spec swapped_norms write_specs",
        "travel": "CodeReport inspect_code",
        "wrapping": "when_imported",
    },
)
