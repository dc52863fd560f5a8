"""chrF and chrF++ as sacrebleu computes them."""

from typing import Any

import sacrebleu

from hf_moe_ted.evaluation.metrics import translation_metric


class Chrf(translation_metric.TranslationMetric):
    """Corpus chrF: F-score of character n-grams, with word n-grams chrF++."""

    description = "Corpus F-score of character n-grams (chrF) or of character and word n-grams (chrF++)."
    citation = """\
@inproceedings{popovic-2015-chrf,
    title = "chr{F}: character n-gram {F}-score for automatic {MT} evaluation",
    author = "Popovi{\\'c}, Maja",
    booktitle = "Proceedings of the Tenth Workshop on Statistical Machine Translation",
    year = "2015",
    url = "https://aclanthology.org/W15-3049",
    pages = "392--395",
}
@inproceedings{popovic-2017-chrf,
    title = "chr{F}++: words helping character n-grams",
    author = "Popovi{\\'c}, Maja",
    booktitle = "Proceedings of the Second Conference on Machine Translation",
    year = "2017",
    url = "https://aclanthology.org/W17-4770",
    pages = "612--618",
}
"""
    reference_urls = ("https://github.com/mjpost/sacrebleu",)

    def _score(
        self,
        predictions: list[str],
        references: list[list[str]],
        *,
        char_order: int = 6,
        word_order: int = 0,
        beta: int = 2,
        lowercase: bool = False,
        whitespace: bool = False,
        eps_smoothing: bool = False,
    ) -> dict[str, Any]:
        """Compute chrF.

        Args:
            predictions: translations, one string per sentence.
            references: one string or a list of strings per sentence.
            char_order: longest character n-gram.
            word_order: longest word n-gram; 0 is chrF, 2 is chrF++.
            beta: how many times more recall counts than precision.
            lowercase: ignore case.
            whitespace: let character n-grams contain whitespace.
            eps_smoothing: smooth as in NLTK and Moses instead of over the effective order.

        Returns:
            "score" (0-100) and the "char_order", "word_order" and "beta" it was computed with.

        Raises:
            ValueError: `char_order` or `beta` is below 1, or `word_order` below 0.
        """
        if char_order < 1 or word_order < 0 or beta < 1:
            raise ValueError(
                f"char_order ({char_order}) and beta ({beta}) must be at least 1, word_order ({word_order}) at least 0"
            )
        chrf = sacrebleu.CHRF(
            char_order=char_order,
            word_order=word_order,
            beta=beta,
            lowercase=lowercase,
            whitespace=whitespace,
            eps_smoothing=eps_smoothing,
        )
        result = chrf.corpus_score(predictions, translation_metric.reference_streams(references))
        return {name: getattr(result, name) for name in ("score", "char_order", "word_order", "beta")}
