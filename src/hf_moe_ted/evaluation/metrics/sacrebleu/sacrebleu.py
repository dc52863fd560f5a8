"""BLEU as sacrebleu computes it, with the tokenizers that need no download."""

from hf_moe_ted.evaluation import corpus_metrics
from hf_moe_ted.evaluation.metrics import translation_metric


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
    _score = staticmethod(corpus_metrics.bleu)
