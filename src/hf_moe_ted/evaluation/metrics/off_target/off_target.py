"""Translations that are not in the target language."""

from hf_moe_ted.evaluation import corpus_metrics
from hf_moe_ted.evaluation.metrics import translation_metric


class OffTarget(translation_metric.TranslationMetric):
    """Share of translations whose detected language is not the target language."""

    description = (
        "Share of translations whose language, as py3langid detects it in 25 letters or more, is not the target "
        "language. Multilingual models answer in another language, often in English, where they are unsure; BLEU and "
        "chrF show it only as a lower score."
    )
    reference_urls = ("https://github.com/adbar/py3langid",)
    _score = staticmethod(corpus_metrics.off_target)
