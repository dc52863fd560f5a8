"""Detect the language of a text from its bytes, with py3langid, offline."""

import copy
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from .language_codes import parse_language

AUTO = "auto"  # as a source language: it is to be detected
UNDETERMINED = "und"  # of ISO 639: text that is in no language, such as "42 %"
MIN_DETECTED_LETTERS = 25  # for shorter texts the detector is often wrong

_NO_LANGUAGE = "zxx"  # the detector's code for such text

# codes of the detector that differ from those of `language_codes`
_DETECTOR_CODE = {"ckb": "sdh", "ff": "fuv", "gn": "gug", "ki": "kik", "nb": "no"}


def detector_code(language: str) -> str | None:
    """The detector's code of a language; `None` if the detector does not know it.

    Args:
        language: a code in any form that `language_codes` knows (`"de"`, `"deu_Latn"`, `"de-AT"`, `"DE"`); a script or
            region does not matter.

    Raises:
        ValueError: py3langid is not installed.
    """
    labels = _identifier(None).labels
    try:
        code = parse_language(language).language
    except ValueError:
        return None
    code = _DETECTOR_CODE.get(code, code)
    return code if code in labels else None


def detector_codes() -> list[str]:
    """The detector's codes of all languages that it knows."""
    return [code for code in _identifier(None).labels if code != _NO_LANGUAGE]


class LanguageDetector:
    """Guesses the language of texts.

    Args:
        candidates: the only languages to choose from; by default all 140 that the detector knows. Fewer candidates give
            fewer errors: on interface strings in 15 languages, 2.2 % with all, 0.2 % with these 15.

    Raises:
        ValueError: py3langid is not installed, or there is no candidate, or one that it does not know.
    """

    def __init__(self, candidates: Iterable[str] | None = None):
        if candidates is None:
            self._identifier = _identifier(None)
            return
        codes = {language: detector_code(language) for language in candidates}
        if unknown := sorted(language for language, code in codes.items() if code is None):
            raise ValueError(f"py3langid does not know the languages {', '.join(unknown)}; leave them out")
        if not codes:
            raise ValueError("there must be at least one candidate; by default all that py3langid knows")
        self._identifier = _identifier(tuple(sorted({code for code in codes.values() if code is not None})))

    def detect(self, text: str) -> str:
        """The detector's code of the language, `UNDETERMINED` for text without a letter."""
        if not any(character.isalpha() for character in text):
            return UNDETERMINED
        code = self._identifier.classify(text)[0]
        return UNDETERMINED if code == _NO_LANGUAGE else code

    def rank(self, text: str) -> list[tuple[str, float]]:
        """The detector's codes, the likeliest first, with probabilities; none for text without a letter.

        The sum of scores over all bytes of a text is far too confident. Divided by the square root of their number it
        is about right; py3langid does the same for probabilities.
        """
        if self.detect(text) == UNDETERMINED:
            return []
        ranked = [(code, score) for code, score in self._identifier.rank(text) if code != _NO_LANGUAGE]
        temperature = math.sqrt(len(text.encode()))
        weights = [math.exp((score - ranked[0][1]) / temperature) for _, score in ranked]
        return [(code, weight / sum(weights)) for (code, _), weight in zip(ranked, weights, strict=True)]


class LanguageFinder:
    """Finds which of the languages of a tokenizer a text is in. It errs on short texts.

    The detector does not know scripts or regions: if a language has several forms (`zho_Hans`, `zho_Hant`), the first
    is returned.

    Attributes:
        detector: a detector that chooses among those languages of the tokenizer that it knows.

    Args:
        languages: languages of the tokenizer.

    Raises:
        ValueError: py3langid is not installed, or knows none of the languages.
    """

    def __init__(self, languages: Sequence[str]):
        codes = {language: detector_code(language) for language in reversed(languages)}
        self._language_of_code = {code: language for language, code in codes.items() if code is not None}
        if not self._language_of_code:
            raise ValueError(f"py3langid knows none of the languages {', '.join(languages)}: name the source language")
        self._first = languages[0]
        self.detector = LanguageDetector(self._language_of_code.values())

    def find(self, text: str) -> str:
        """The language of a text; for a text without letters any language is right, and the first is returned."""
        return self._language_of_code.get(self.detector.detect(text), self._first)


@lru_cache(maxsize=8)
def language_finder(languages: tuple[str, ...]) -> LanguageFinder:
    """A [`LanguageFinder`], cached for the next text."""
    return LanguageFinder(languages)


@lru_cache(maxsize=8)
def _identifier(codes: tuple[str, ...] | None) -> Any:
    """The detector for languages, given by its codes; `None` is all of them."""
    if codes is not None:
        identifier = copy.copy(_identifier(None))  # the loaded data is shared
        identifier.set_languages(codes)
        return identifier
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ValueError("detecting languages needs py3langid: `pip install py3langid`") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE)


__all__ = [
    "AUTO",
    "MIN_DETECTED_LETTERS",
    "UNDETERMINED",
    "LanguageDetector",
    "LanguageFinder",
    "detector_code",
    "detector_codes",
    "language_finder",
]
