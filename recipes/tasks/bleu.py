"""BLEU and chrF, each under a name that says what it is.

The literature's IWSLT14 De-En figures are BLEU of Moses-tokenized, lower-cased text, which differs from sacreBLEU by
points. Never compare one with the other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from sacrebleu.metrics import BLEU, CHRF
from sacremoses import MosesDetokenizer, MosesTokenizer

# `sacrebleu`: sacreBLEU's default, of plain text as it is written. `sacrebleu_lowercase`: the same, lower-cased.
# `bleu_tokenized_lowercase`: of Moses's tokens, lower-cased. `chrf`: chrF2 of plain text.
SCORES = ("sacrebleu", "sacrebleu_lowercase", "bleu_tokenized_lowercase", "chrf")


def translation_scores(
    hypotheses: Sequence[str], references: Sequence[str], lang: str
) -> tuple[dict[str, float], dict[str, str]]:
    """Return all of `SCORES` (0 to 100) and the signature of each.

    Args:
        hypotheses, references: plain text, one reference each.
        lang: their language, for Moses's rules.

    Raises ValueError when there are none, or their numbers differ.
    """
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"{len(hypotheses)} translations for {len(references)} references")
    tokenized = moses_tokenize(hypotheses, lang), moses_tokenize(references, lang)
    cases = {
        "sacrebleu": (BLEU(), hypotheses, references),
        "sacrebleu_lowercase": (BLEU(lowercase=True), hypotheses, references),
        # force: it would warn that the text is tokenized, which is the point here.
        "bleu_tokenized_lowercase": (BLEU(lowercase=True, tokenize="none", force=True), *tokenized),
        "chrf": (CHRF(), hypotheses, references),
    }
    scores, signatures = {}, {}
    for name, (metric, hypothesis, reference) in cases.items():
        scores[name] = metric.corpus_score(list(hypothesis), [list(reference)]).score
        signatures[name] = str(metric.get_signature())
    signatures["bleu_tokenized_lowercase"] += f"|moses:{lang}"
    return scores, signatures


@functools.cache
def _moses(lang: str) -> tuple[MosesTokenizer, MosesDetokenizer]:
    return MosesTokenizer(lang=lang), MosesDetokenizer(lang=lang)


def moses_tokenize(texts: Sequence[str], lang: str) -> list[str]:
    """Return texts with Moses's tokens separated by spaces; characters such as `&` are not escaped."""
    tokenizer = _moses(_language(lang))[0]
    return [tokenizer.tokenize(text, escape=False, return_str=True) for text in texts]


def moses_detokenize(texts: Sequence[str], lang: str) -> list[str]:
    """Return plain text from Moses's tokens."""
    detokenizer = _moses(_language(lang))[1]
    return [detokenizer.detokenize(text.split(), unescape=False) for text in texts]


def _language(name: str) -> str:
    return name.replace("-", "_").split("_")[0].lower()  # de_DE, de-DE: Moses's rules go by the language
