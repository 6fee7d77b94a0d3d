"""Scores of translations, and Moses's tokens."""

import pytest
import sacrebleu

from tasks.bleu import moses_detokenize, moses_tokenize, translation_scores


def test_scores_are_sacrebleus_and_the_tokenized_one_is_of_moses_tokens():
    hypotheses = ["The cat doesn't sit, on the Mat.", "A dog & a bird run away today"]
    references = ["the cat doesn't sit on the mat.", "A dog and a bird ran away today"]
    scores, signatures = translation_scores(hypotheses, references, "en")
    assert scores["sacrebleu"] == sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(hypotheses, [references]).score
    assert scores["sacrebleu_lowercase"] == sacrebleu.corpus_bleu(hypotheses, [references], lowercase=True).score
    tokens = ["the cat doesn 't sit , on the mat .", "a dog & a bird run away today"]
    reference_tokens = ["the cat doesn 't sit on the mat .", "a dog and a bird ran away today"]
    by_hand = sacrebleu.corpus_bleu(tokens, [reference_tokens], tokenize="none", force=True)
    assert scores["bleu_tokenized_lowercase"] == by_hand.score
    assert "case:mixed" in signatures["sacrebleu"]
    assert "tok:13a" in signatures["sacrebleu"]
    assert "case:lc|eff:no|tok:none" in signatures["bleu_tokenized_lowercase"]
    assert signatures["bleu_tokenized_lowercase"].endswith("moses:en")
    with pytest.raises(ValueError, match="1 translations for 2 references"):
        translation_scores(hypotheses[:1], references, "en")


def test_mosess_tokens_become_plain_text_again():
    texts = ['He said: "It\'s 3.5 % (at most)."', "Well, don't!"]
    assert moses_detokenize(moses_tokenize(texts, "en"), "en") == ['He said: "It\'s 3.5% (at most)."', "Well, don't!"]
