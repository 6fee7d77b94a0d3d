"""The figures of the paper's tables ("Understanding and Improving Layer Normalization", NeurIPS 2019)."""

from __future__ import annotations

from hf_adanorm import norms

BASELINE = "layernorm"
ROWS = ["none", BASELINE, "layernorm-simple", "detachnorm", "adanorm"]  # in the paper's order
# Every norm's name for people, those of the paper first.
TITLES = {norm: norms.TITLES[norm] for norm in dict.fromkeys([*ROWS, *norms.TITLES])}

# Column: its metric, then the rows in the order above; None where training diverged.
COLUMNS: dict[str, tuple[str, tuple[float | None, ...]]] = {
    "En-De": ("BLEU", (None, 28.3, 28.4, None, 28.5)),
    "De-En": ("BLEU", (34.0, 35.5, 35.5, 33.9, 35.6)),
    "En-Vi": ("BLEU", (28.4, 31.2, 31.6, 27.7, 31.4)),
    "Enwiki8": ("BPC", (1.04, 1.07, 1.07, 1.12, 1.07)),
    "RT": ("accuracy", (76.85, 77.21, 76.66, 76.40, 77.50)),
    "SST5": ("accuracy", (38.55, 39.23, 40.54, 40.04, 40.54)),
    "MNIST": ("accuracy", (99.14, 99.13, 99.09, 99.10, 99.35)),
    "PTB": ("UAS", (88.31, 89.12, 89.19, 89.79, 89.23)),
}


# A difference that counts, by the score of a task; fixed before the runs. Within it two norms are level.
MARGINS = {
    "accuracy": 0.5,
    "bleu_tokenized_lowercase": 0.3,
    "uas_without_punctuation": 0.3,
    "bits_per_character": 0.02,
}


def margin(score: str, column: str | None) -> float:
    """Return the equivalence margin of a score; that of MNIST is smaller because its errors are few."""
    return 0.1 if column == "MNIST" else MARGINS[score]


# Which column of the paper a config of this folder is compared with, and the data that stands in for the row's own.
CONFIGS = {
    "wmt14_en_de": ("En-De", ""),
    "iwslt14_de_en": ("De-En", ""),
    "iwslt15_en_vi": ("En-Vi", ""),
    "enwik8": ("Enwiki8", ""),
    "rt": ("RT", ""),
    "sst5": ("SST5", ""),
    "mnist": ("MNIST", ""),
    "ptb": ("PTB", ""),
    "enwik_sample": ("Enwiki8", "a sample of Wikipedia"),
    "multi30k_de_en": ("De-En", "Multi30k"),
    "multi30k_prenorm": ("De-En", "Multi30k"),
    "ud_ewt": ("PTB", "UD English-EWT"),
}


def row_name(config: str) -> str:
    """Return the name of a config's row, with the data that stands in for the row's own."""
    column, data = CONFIGS[config]
    return f"{column} ({data})" if data else column


def paper_score(column: str, norm: str) -> str:
    """The paper's figure as printed there, "diverges" where it has none, "-" for a norm that is not in the paper."""
    if norm not in ROWS:
        return "-"
    value = COLUMNS[column][1][ROWS.index(norm)]
    if value is None:
        return "diverges"
    return f"{value:.1f}" if COLUMNS[column][0] == "BLEU" else f"{value:.2f}"
