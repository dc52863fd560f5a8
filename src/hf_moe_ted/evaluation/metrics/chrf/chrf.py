"""chrF and chrF++ as sacrebleu computes them."""

from hf_moe_ted.evaluation import corpus_metrics
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
    _score = staticmethod(corpus_metrics.chrf)
