"""Length of translations relative to their references."""

from hf_moe_ted.evaluation import corpus_metrics
from hf_moe_ted.evaluation.metrics import translation_metric


class LengthRatio(translation_metric.TranslationMetric):
    """Ratio of the lengths of translation and reference in characters."""

    description = (
        "Ratio of the lengths of translation and reference in characters. It tells translations that stop early or "
        "repeat themselves, which BLEU and chrF show only as a lower score."
    )
    _score = staticmethod(corpus_metrics.length_ratio)
