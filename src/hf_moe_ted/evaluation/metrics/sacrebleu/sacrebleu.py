"""BLEU as sacrebleu computes it, with the tokenizers that need no download."""

from typing import Any

import sacrebleu

from hf_moe_ted.evaluation.metrics import translation_metric

TOKENIZERS = ("13a", "intl", "char", "zh", "none")
SMOOTH_METHODS = ("none", "floor", "add-k", "exp")


class Sacrebleu(translation_metric.TranslationMetric):
    """Corpus BLEU on detokenized text."""

    description = "Corpus BLEU on detokenized text, with the tokenizers of sacrebleu that need no download."
    citation = """\
@inproceedings{post-2018-call,
    title = "A Call for Clarity in Reporting {BLEU} Scores",
    author = "Post, Matt",
    booktitle = "Proceedings of the Third Conference on Machine Translation: Research Papers",
    year = "2018",
    url = "https://aclanthology.org/W18-6319",
    pages = "186--191",
}
"""
    reference_urls = ("https://github.com/mjpost/sacrebleu",)

    def _score(
        self,
        predictions: list[str],
        references: list[list[str]],
        *,
        tokenize: str = "13a",
        lowercase: bool = False,
        smooth_method: str = "exp",
        smooth_value: float | None = None,
        use_effective_order: bool = False,
    ) -> dict[str, Any]:
        """Compute BLEU.

        Args:
            predictions: translations, one string per sentence.
            references: one string or a list of strings per sentence.
            tokenize: "13a" (WMT), "intl", "char" (Japanese, Thai and the like), "zh" or "none".
            lowercase: ignore case.
            smooth_method: "exp", "floor", "add-k" or "none".
            smooth_value: the value of "floor" (default 0.1) and "add-k" (default 1).
            use_effective_order: ignore orders without any match, for the BLEU of single sentences.

        Returns:
            "score" (0-100), n-gram "counts", "totals" and "precisions" (0-100) by order, brevity penalty "bp", and the
            lengths "sys_len" and "ref_len" in tokens.

        Raises:
            ValueError: an option is not one of the above.
        """
        if tokenize not in TOKENIZERS:
            raise ValueError(f"tokenize ({tokenize!r}) must be one of: {', '.join(TOKENIZERS)}")
        if smooth_method not in SMOOTH_METHODS:
            raise ValueError(f"smooth_method ({smooth_method!r}) must be one of: {', '.join(SMOOTH_METHODS)}")
        bleu = sacrebleu.BLEU(
            tokenize=tokenize,
            lowercase=lowercase,
            smooth_method=smooth_method,
            smooth_value=smooth_value,
            effective_order=use_effective_order,
        )
        result = bleu.corpus_score(predictions, translation_metric.reference_streams(references))
        names = ("score", "counts", "totals", "precisions", "bp", "sys_len", "ref_len")
        return {name: getattr(result, name) for name in names}
