"""Languages for clients: codes in LibreTranslate's form (`en`, `zh-Hans`), names, and detection."""

from collections.abc import Iterable
from typing import Any

from ..models.language_codes import parse_language, resolve_language
from ..models.language_detection import LanguageDetector, detector_code

AUTO = "auto"


class ServedLanguages:
    """The languages of a model.

    Args:
        languages: languages by their names in the tokenizer.

    Attributes:
        code_of: language -> the code that clients see.
    """

    def __init__(self, languages: Iterable[str]):
        self.languages = tuple(languages)
        self.code_of = {language: _shortest_code(language, self.languages) for language in self.languages}
        codes = {language: detector_code(language) for language in reversed(self.languages)}
        self._of_detector = {code: language for language, code in codes.items() if code is not None}
        self._detector = LanguageDetector(self._of_detector.values()) if self._of_detector else None

    def resolve(self, code: str) -> str:
        """The tokenizer's name for a client's language code in any form.

        Raises:
            ValueError: the code means no language of the model, or several.
        """
        named = [language for language, known in self.code_of.items() if known.lower() == code.lower()]
        if named:
            return named[0]
        try:
            return resolve_language(code, self.languages, name="language", owner="the model")
        except ValueError as error:
            raise ValueError(f"{code[:40]} is not supported: {str(error)[:1000]}") from None

    def detect(self, text: str) -> list[tuple[str, float]]:
        """Possible languages of a text, the likeliest first, with a confidence of at most 100; at least one.

        A text without letters gets the first language with confidence 0.
        """
        ranked = self._detector.rank(text) if self._detector else []
        found = [(self._of_detector[code], round(100 * share, 1)) for code, share in ranked[:3]]
        return [pair for index, pair in enumerate(found) if index == 0 or pair[1] >= 1] or [(self.languages[0], 0.0)]

    def described(self) -> list[dict[str, object]]:
        """The answer of `/languages`: every language can be translated into every other."""
        codes = list(self.code_of.values())
        return [{"code": code, "name": language_name(code), "targets": codes} for code in codes]


def language_name(language: str) -> str:
    """English name of a language from the CLDR: `zh-Hans` -> `Chinese (Simplified)`; the code itself without a name."""
    from babel import Locale

    english: Any = Locale("en")  # its tables are made on access, without types
    try:
        code = parse_language(language)
    except ValueError:
        return language
    name = english.languages.get(code.language)
    if name is None:
        return language
    details = [
        english.scripts.get(code.script or "", code.script),
        english.territories.get(code.region or "", code.region),
        code.variant,
    ]
    return f"{name} ({', '.join(shown)})" if (shown := [detail for detail in details if detail]) else name


def _shortest_code(language: str, languages: tuple[str, ...]) -> str:
    """The shortest code that means no other of `languages`; Chinese always has its script if the model names one."""
    try:
        code = parse_language(language)
    except ValueError:
        return language
    base, script, region = code.language, code.script, code.region
    forms: list[list[str | None]] = [[base], [base, script], [base, region], [base, script, region]]
    if base == "zh" and script:
        del forms[0]
    for form in forms:
        short = "-".join(part for part in form if part)
        if _means(short, languages) == language:
            return short
    return language


def _means(code: str, languages: tuple[str, ...]) -> str | None:
    try:
        return resolve_language(code, languages)
    except ValueError:
        return None


__all__ = ["AUTO", "ServedLanguages", "language_name"]
