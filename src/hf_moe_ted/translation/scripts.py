"""Letters in a script that the language of a text is not written in."""

import functools
from collections import defaultdict
from collections.abc import Iterable

import regex
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES  # such as deu_Latn

from ..models.language_codes import parse_language

# scripts of ISO 15924 that are several of Unicode
_SCRIPTS_OF = {"Hans": ("Hani", "Bopo"), "Hant": ("Hani", "Bopo"), "Jpan": ("Hani", "Hira", "Kana")}

# which NLLB does not have: languageData of CLDR
_SECOND_SCRIPTS = {
    **dict.fromkeys(("ha", "kk", "ku", "ky", "ms", "pa", "tg", "tt"), ("Arab",)),
    **dict.fromkeys(("bs", "tk", "ug"), ("Cyrl",)),
    **dict.fromkeys(("az", "uz"), ("Arab", "Cyrl")),
}


def stray_letters(text: str, language: str, sources: Iterable[str] = ()) -> list[str]:
    """Runs of letters in other scripts than those of a language: `["बार"]` of `"Lesezeichen बार öffnen"` in German.

    Latin letters are never stray: names and abbreviations keep them in any language.

    Args:
        text: the text.
        language: its language, in any form; one that NLLB does not have has no stray letters.
        sources: texts whose scripts the text may have, too.
    """
    of_language = _scripts(language)
    if not of_language:
        return []
    allowed = of_language.union(*({script for script, _ in _runs(source)} for source in sources))
    return [run for script, run in _runs(text) if script not in allowed]


@functools.cache
def _scripts(language: str) -> frozenset[str]:
    """The scripts in which a language is written, as Unicode names them; none of an unknown one."""
    try:
        parsed = parse_language(language)
    except ValueError:
        return frozenset()
    if parsed.script is not None:
        return frozenset(_names(parsed.script))
    return frozenset(_scripts_by_language().get(parsed.language, ())).union(_SECOND_SCRIPTS.get(parsed.language, ()))


@functools.cache
def _scripts_by_language() -> dict[str, set[str]]:
    scripts: dict[str, set[str]] = defaultdict(set)
    for code in map(parse_language, FAIRSEQ_LANGUAGE_CODES):
        scripts[code.language].update(_names(str(code.script)))
    return dict(scripts)


def _names(script: str) -> tuple[str, ...]:
    """A script of ISO 15924, as Unicode names it."""
    return _SCRIPTS_OF.get(script, (script,))


def _runs(text: str) -> list[tuple[str, str]]:
    """Runs of letters of one script, without Latin ones."""
    return [(str(match.lastgroup), match[0]) for match in _pattern().finditer(text)]


@functools.cache
def _pattern() -> regex.Pattern[str]:
    names = set().union(*_scripts_by_language().values()) - {"Latn"}
    return regex.compile("|".join(rf"(?P<{name}>\p{{Script={name}}}+)" for name in sorted(names)))


__all__ = ["stray_letters"]
