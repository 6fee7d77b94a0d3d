"""The figures of the paper's tables ("Understanding and Improving Layer Normalization", NeurIPS 2019)."""

from __future__ import annotations

from typing import NamedTuple

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


class Need(NamedTuple):
    """What a row of the paper takes."""

    config: str
    data: str
    license: str
    machine: str
    arguments: str = ""  # of `compare.py`, beside the config
    processes: int = 1

    @property
    def command(self) -> str:
        words = ["python recipes/compare.py", f"--config recipes/configs/{self.config}.yaml", self.arguments]
        return " ".join([*filter(None, words), "--seeds 5", f"--output_dir outputs/{self.config}"])


_TREES = "--train_file 02-21.conllx --validation_file 22.conllx --test_file 23.conllx"
NEEDS = {
    "En-De": Need(
        "wmt14_en_de",
        "WMT14 English-German, 4.5 million pairs, from the Hub",
        "for research, by the terms of its parts",
        "8 GPUs of 16 GB",
        '--launcher "accelerate launch --config_file recipes/launch/ddp_8_gpus.yaml"',
        processes=8,
    ),
    "De-En": Need("iwslt14_de_en", "IWSLT14 German-English, from the Hub", "CC BY-NC-ND", "a GPU of 12 GB"),
    "En-Vi": Need("iwslt15_en_vi", "IWSLT15 English-Vietnamese, from the Hub", "CC BY-NC-ND", "a GPU of 16 GB"),
    "Enwiki8": Need(
        "enwik8", "enwik8, the file", "GFDL and CC BY-SA, as Wikipedia's", "a GPU", "--train_file enwik8.zip"
    ),
    "RT": Need("rt", "RT, from the Hub", "none stated", "a CPU"),
    "SST5": Need("sst5", "SST-5, from the Hub", "none stated", "a CPU"),
    "MNIST": Need("mnist", "MNIST, from the Hub", "CC BY-SA", "a CPU, half an hour of a core for each run"),
    "PTB": Need(
        "ptb",
        "the Penn Treebank, converted to dependencies",
        "of the Linguistic Data Consortium, to be bought",
        "a CPU, two hours of a core for each run",
        _TREES,
    ),
}

# Configs that stand in for a row's own: which, and on what data.
SUBSTITUTES = {
    "enwik_sample": ("Enwiki8", "a sample of Wikipedia"),
    "multi30k_de_en": ("De-En", "Multi30k"),
    "multi30k_prenorm": ("De-En", "Multi30k"),
    "ud_ewt": ("PTB", "UD English-EWT"),
}

# Which column of the paper a config of this folder is compared with.
CONFIGS = {need.config: column for column, need in NEEDS.items()}
CONFIGS |= {config: column for config, (column, _) in SUBSTITUTES.items()}


def row_name(column: str, config: str | None) -> str:
    """A row as it was measured by a config: with the data that stands in for the row's own, or the config's name where
    it is none of this folder's."""
    if config == NEEDS[column].config:
        return column
    return f"{column} ({SUBSTITUTES[config][1] if config in SUBSTITUTES else f'by {config}'})"


def paper_score(column: str, norm: str) -> str:
    """The paper's figure as printed there, "diverges" where it has none, "-" for a norm that is not in the paper."""
    if norm not in ROWS:
        return "-"
    value = COLUMNS[column][1][ROWS.index(norm)]
    if value is None:
        return "diverges"
    return f"{value:.1f}" if COLUMNS[column][0] == "BLEU" else f"{value:.2f}"
