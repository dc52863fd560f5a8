"""Translations that are not in the language they should be in."""

from collections import Counter
from typing import Any

from hf_moe_ted.evaluation import language_detection
from hf_moe_ted.evaluation.metrics import translation_metric


class OffTarget(translation_metric.TranslationMetric):
    """Share of translations whose detected language is not the target language."""

    description = (
        "Share of translations whose language, as py3langid detects it, is not the target language. Multilingual "
        "models answer in another language, often in English, where they are unsure; BLEU and chrF show it only as a "
        "lower score."
    )
    reference_urls = ("https://github.com/adbar/py3langid",)

    def _score(
        self,
        predictions: list[str],
        references: list[list[str]],
        *,
        language: str | None = None,
        candidates: list[str] | None = None,
    ) -> dict[str, Any]:
        """Compute the share of translations in another language.

        Args:
            predictions: translations, one string per sentence.
            references: one string or a list of strings per sentence. They say how often the detector errs.
            language: the target language; required. A code of ISO 639 or NLLB in any form ("de", "deu_Latn", "de-AT").
            candidates: the languages that the detector chooses from, by default all that it knows. With those of the
                model it errs much less, above all in short texts.

        Returns:
            "off_target_share", the share (0-1) of translations in another language; "reference_off_target_share", the
            same of the references: what a share of translations cannot be told from; "detected_languages", code ->
            number of translations, the most frequent first. Text without a letter is in no language ("und") and not
            off target.

        Raises:
            ValueError: py3langid is not installed, `language` is missing or none of `candidates`, or the detector does
                not know one of them.
        """
        if language is None:
            raise ValueError("language is required: the one that the translations should be in, such as 'de'")
        target = language_detection.detector_code(language)
        if target is None:
            raise ValueError(f"language ({language!r}) is not one that py3langid knows")
        if candidates is not None and target not in map(language_detection.detector_code, candidates):
            raise ValueError(f"language ({language!r}) must be one of candidates ({', '.join(candidates)})")
        detect = language_detection.LanguageDetector(candidates).detect
        detected = Counter(map(detect, predictions))
        of_references = Counter(detect(text) for texts in references for text in texts)
        return {
            "off_target_share": _share_of_others(detected, target),
            "reference_off_target_share": _share_of_others(of_references, target),
            "detected_languages": dict(detected.most_common()),
        }


def _share_of_others(languages: Counter[str], target: str) -> float:
    num_on_target = languages[target] + languages[language_detection.UNDETERMINED]
    return (languages.total() - num_on_target) / languages.total()
