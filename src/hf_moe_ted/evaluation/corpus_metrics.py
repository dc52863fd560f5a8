"""Metrics for translations of a test set: sacreBLEU's BLEU and chrF, lengths and languages.

All of them take `predictions` (translations, one string per sentence) and `references` (one or several strings per
sentence), and raise the `ValueError` of `checked_references`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from ..models.language_codes import did_you_mean
from ..models.language_detection import (
    MIN_DETECTED_LETTERS,
    UNDETERMINED,
    LanguageDetector,
    detector_code,
    detector_codes,
)
from .placeholders import num_letters, without_placeholders

BLEU_TOKENIZERS = ("13a", "intl", "char", "zh", "none")  # tokenizers that need no download
SMOOTH_METHODS = ("none", "floor", "add-k", "exp")

Predictions = Sequence[str]
References = Sequence[str | Sequence[str]]


def bleu(
    predictions: Predictions,
    references: References,
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
    import sacrebleu  # imported here, because compression without evaluation does not need it

    for name, value, known in (
        ("tokenize", tokenize, BLEU_TOKENIZERS),
        ("smooth_method", smooth_method, SMOOTH_METHODS),
    ):
        if value not in known:
            raise ValueError(f"{name} ({value!r}) must be one of: {', '.join(known)}")
    metric = sacrebleu.BLEU(
        tokenize=tokenize,
        lowercase=lowercase,
        smooth_method=smooth_method,
        smooth_value=smooth_value,
        effective_order=use_effective_order,
    )
    names = ("score", "counts", "totals", "precisions", "bp", "sys_len", "ref_len")
    return _corpus_score(metric, predictions, references, names)


def chrf(
    predictions: Predictions,
    references: References,
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
        "score" (0-100) and the "char_order", "word_order" and "beta" of the computation.

    Raises:
        ValueError: `char_order` or `beta` is below 1, or `word_order` below 0.
    """
    import sacrebleu

    if char_order < 1 or word_order < 0 or beta < 1:
        raise ValueError(
            f"char_order ({char_order}) and beta ({beta}) must be at least 1, word_order ({word_order}) at least 0"
        )
    metric = sacrebleu.CHRF(
        char_order=char_order,
        word_order=word_order,
        beta=beta,
        lowercase=lowercase,
        whitespace=whitespace,
        eps_smoothing=eps_smoothing,
    )
    return _corpus_score(metric, predictions, references, ("score", "char_order", "word_order", "beta"))


def length_ratio(predictions: Predictions, references: References, *, threshold: float = 1.1) -> dict[str, Any]:
    """Compute length ratios.

    Args:
        predictions: translations, one string per sentence.
        references: one string or a list of strings per sentence; of several the closest in length counts, or the
            shorter of two equally close ones.
        threshold: ratio above which a translation is too long.

    Returns:
        "mean_ratio", the mean of the ratios of the sentences; "corpus_ratio", the length of all translations over that
        of all references; "share_above_threshold", the share (0-1) of sentences whose ratio exceeds the threshold.

    Raises:
        ValueError: `threshold` is not positive.
    """
    if threshold <= 0:
        raise ValueError(f"threshold ({threshold}) must be positive")
    several = checked_references(predictions, references)
    lengths = [len(text) for text in predictions]
    reference_lengths = [
        min(map(len, texts), key=lambda reference: (abs(reference - length), reference))
        for length, texts in zip(lengths, several, strict=True)
    ]
    ratios = [length / reference for length, reference in zip(lengths, reference_lengths, strict=True)]
    return {
        "mean_ratio": sum(ratios) / len(ratios),
        "corpus_ratio": sum(lengths) / sum(reference_lengths),
        "share_above_threshold": sum(ratio > threshold for ratio in ratios) / len(ratios),
    }


def off_target(
    predictions: Predictions,
    references: References,
    *,
    language: str | None = None,
    candidates: list[str] | None = None,
) -> dict[str, Any]:
    """Compute the share of translations in another language, of those with 25 letters or more.

    In shorter texts the detector is too often wrong: it takes many references of one or two words for another language.
    So only texts with `MIN_DETECTED_LETTERS` count, without their placeholders, as for the `problems` of
    [`TextTranslator`].

    Args:
        predictions: translations, one string per sentence.
        references: one string or a list of strings per sentence. They show how often the detector is wrong.
        language: the target language; required. A code of ISO 639 or NLLB in any form ("de", "deu_Latn", "de-AT").
        candidates: the languages among which the detector chooses; by default all that it knows. With only the model's
            languages it is wrong much less often, above all for short texts.

    Returns:
        "off_target_share", the share (0-1) of translations in another language, or `None` if none has enough letters;
        "reference_off_target_share", the same for the references, which is the detector's error; "detected_languages",
        code -> number of translations, the most frequent first. Text in no language ("und") is not off target.

    Raises:
        ValueError: py3langid is not installed, `language` is missing or not among `candidates`, or the detector does
            not know a language.
    """
    if language is None:
        raise ValueError("language is required: the target language of the translations, such as 'de'")
    target = detector_code(language)
    if target is None:
        near = did_you_mean(language, detector_codes())
        raise ValueError(f"language ({language!r}) is unknown to py3langid{near}")
    if candidates is not None and target not in map(detector_code, candidates):
        raise ValueError(f"language ({language!r}) must be one of candidates ({', '.join(candidates)})")
    reference_texts = [text for texts in checked_references(predictions, references) for text in texts]
    detect = LanguageDetector(candidates).detect
    detected, of_references = (
        Counter(detect(without_placeholders(text)) for text in texts if num_letters(text) >= MIN_DETECTED_LETTERS)
        for texts in (predictions, reference_texts)
    )
    return {
        "off_target_share": _share_of_others(detected, target),
        "reference_off_target_share": _share_of_others(of_references, target),
        "detected_languages": dict(detected.most_common()),
    }


def checked_references(predictions: Sequence[Any] | None, references: Sequence[Any] | None, /) -> list[list[str]]:
    """Check the arguments, and return the list of references of each sentence.

    Raises:
        ValueError: an argument is missing, empty or of another form, their lengths differ, or a reference is empty.
    """
    if predictions is None or references is None:
        raise ValueError("Both predictions and references are required")
    if len(predictions) != len(references):
        raise ValueError(
            f"The number of predictions ({len(predictions)}) must equal the number of references ({len(references)})"
        )
    if len(predictions) == 0:
        raise ValueError("Predictions and references are empty, at least one sentence is required")
    checked = []
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise ValueError(f"Prediction {index} ({prediction!r}) must be a string")
        several = [reference] if isinstance(reference, str) or not isinstance(reference, Iterable) else [*reference]
        if not several or not all(isinstance(text, str) and text for text in several):
            raise ValueError(f"Reference {index} ({reference!r}) must be one or several strings that are not empty")
        checked.append(several)
    return checked


def _corpus_score(
    metric: Any, predictions: Predictions, references: References, names: Sequence[str]
) -> dict[str, Any]:
    """The score of a sacreBLEU metric, which takes columns of references and skips empty padding."""
    columns = [[*column] for column in zip_longest(*checked_references(predictions, references), fillvalue="")]
    score = metric.corpus_score([*predictions], columns)
    return {name: getattr(score, name) for name in names}


def _share_of_others(languages: Counter[str], target: str) -> float | None:
    if not languages:
        return None
    num_on_target = languages[target] + languages[UNDETERMINED]
    return (languages.total() - num_on_target) / languages.total()


__all__ = ["bleu", "checked_references", "chrf", "length_ratio", "off_target"]
