"""Length of translations relative to their references."""

from typing import Any

from hf_moe_ted.evaluation.metrics import translation_metric


class LengthRatio(translation_metric.TranslationMetric):
    """Ratio of the lengths of translation and reference in characters."""

    description = (
        "Ratio of the lengths of translation and reference in characters. It tells translations that stop early or "
        "repeat themselves, which BLEU and chrF show only as a lower score."
    )

    def _score(self, predictions: list[str], references: list[list[str]], *, threshold: float = 1.1) -> dict[str, Any]:
        """Compute length ratios.

        Args:
            predictions: translations, one string per sentence.
            references: one string or a list of strings per sentence; of several the one closest in length counts, and
                of two equally close the shorter.
            threshold: ratio above which a translation is too long.

        Returns:
            "mean_ratio", the mean of the ratios of the sentences; "corpus_ratio", the length of all translations over
            that of all references; "share_above_threshold", the share (0-1) of sentences whose ratio exceeds the
            threshold.

        Raises:
            ValueError: `threshold` is not positive.
        """
        if threshold <= 0:
            raise ValueError(f"threshold ({threshold}) must be positive")
        lengths = [len(text) for text in predictions]
        reference_lengths = [
            min(map(len, texts), key=lambda reference: (abs(reference - length), reference))
            for length, texts in zip(lengths, references, strict=True)
        ]
        ratios = [length / reference for length, reference in zip(lengths, reference_lengths, strict=True)]
        return {
            "mean_ratio": sum(ratios) / len(ratios),
            "corpus_ratio": sum(lengths) / sum(reference_lengths),
            "share_above_threshold": sum(ratio > threshold for ratio in ratios) / len(ratios),
        }
