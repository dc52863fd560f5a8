"""Check whether translations copy numbers, placeholders and names, and whether they repeat themselves."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from .placeholders import placeholders, without_placeholders

REPEATS = 3  # repetitions in a row that no text intends
MAX_REPEATED_UNITS = 8

# separators in one number: "1,000.5", "1.000,5", "1'000", "1 000" with a no-break space, Arabic marks
_NUMBER = re.compile(r"\d+(?:[.,'\u2019\u00a0\u202f\u066b\u066c]\d+)*")
_LATIN = r"A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"
_GREEK = r"\u0370-\u0373\u0376-\u03ff\u1f00-\u1fff"
_CYRILLIC = r"\u0400-\u052f"
_ARMENIAN = r"\u0531-\u0587"
_CASED = (_LATIN, _GREEK, _CYRILLIC, _ARMENIAN)
_CASED_WORD = re.compile(
    "|".join(rf"[{letters}](?:[{letters}\d]|[-'\u2019&+.](?=[{letters}\d]))*" for letters in _CASED)
)
_LATIN_LETTER = re.compile(f"[{_LATIN}]")
_OTHER_LETTER = re.compile(rf"[^\W\d_{_LATIN}]")
_SENTENCE_END = re.compile(r"[.!?:;…。\uff01\uff1f]\W*$")
# Thai, Lao, Burmese, Khmer, Chinese and Japanese have no spaces between words: a character is a unit, else a word is
_NO_SPACE = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
# vowel signs of Indic scripts are not \w, but belong to their word
_UNIT = re.compile(rf"[{_NO_SPACE}]|(?:[^\W_{_NO_SPACE}]|[\u0300-\u036f\u0591-\u05c7\u064b-\u0655\u0900-\u0dff])+")


def numbers(text: str) -> list[str]:
    """The numbers of a text in order, outside of placeholders, with digits 0 to 9 and without separators of thousands.

    Digits of all scripts are equal ("٣", "३", "3"), and so are all ways to write thousands and decimals: "1,000.50",
    "1.000,50" and "1000.50" are all "1000.50". One separator before three digits is one of thousands.
    """
    return [_joined(*of_one) for of_one in _groups_and_separators(text)]


def missing_numbers(source: str, translation: str) -> list[str]:
    """The `numbers` of a source that its translation does not have, or has less often.

    Numbers with the same groups of digits are equal: "10:30" is "10.30 Uhr" elsewhere, "12/31/2026" is "31.12.2026",
    and "1 000 000" is "1.000.000".
    """
    left = Counter(numbers(translation))
    of_source, of_translation = _groups_and_separators(source), _groups_and_separators(translation)
    groups_of_source = {group for groups, _ in of_source for group in groups}
    known = [groups for groups, _ in of_translation if groups_of_source.issuperset(groups)]
    groups_of_translation = {group for groups in known for group in groups}
    missing = []
    for groups, separators in of_source:
        number = _joined(groups, separators)
        if left[number]:
            left[number] -= 1
        elif number in left or number.count(".") == 1 or not groups_of_translation.issuperset(groups):
            missing.append(number)
    return missing


def _groups_and_separators(text: str) -> list[tuple[list[str], list[str]]]:
    """Groups of digits, and what stands between them, of each number."""
    found = []
    for number in _NUMBER.findall(without_placeholders(text)):
        digits = "".join(str(unicodedata.decimal(sign)) if sign.isdigit() else sign for sign in number)
        found.append((re.findall(r"\d+", digits), re.findall(r"\D", digits)))
    return found


def _joined(groups: list[str], separators: list[str]) -> str:
    """`["1", "000", "50"]` and `[",", "."]` -> "1000.50"."""
    if len({*separators[:-1]}) <= 1 and all(len(group) in (2, 3) for group in groups[1:-1]):
        is_one_kind = len({*separators}) == 1
        if is_one_kind and len(groups[-1]) == 3 and groups[0] != "0":  # "1,234,567", in India "12,34,567"
            return "".join(groups)
        if not is_one_kind and separators:
            return f"{''.join(groups[:-1])}.{groups[-1]}"
    return ".".join(groups)


def names(text: str) -> list[str]:
    """The words of a text, in order, that look like names and are written the same in other languages.

    In scripts with upper and lower case these are words with a capital letter that do not begin a sentence, and words
    with a capital after their first letter, anywhere ("USB", "WebKit"). If over a quarter of a text's letters are not
    Latin, they are all words of at least two Latin letters ("使用 gzip 压缩").
    """
    text = without_placeholders(text)
    is_other_script = 3 * len(_OTHER_LETTER.findall(text)) > len(_LATIN_LETTER.findall(text))
    found = []
    for match in _CASED_WORD.finditer(text):
        word, before = match[0], text[: match.start()]
        begins = not before.strip(" \t\"'“”«»„(¿¡[-\u2013\u2014•*") or _SENTENCE_END.search(before) is not None
        is_foreign = is_other_script and len(word) > 1 and _LATIN_LETTER.match(word) is not None
        has_capital = any(letter.isupper() for letter in (word[1:] if begins else word))
        if is_foreign or (has_capital and len(word) > 1):
            found.append(word)
    return found


KINDS: dict[str, Callable[[str], list[str]]] = {"numbers": numbers, "placeholders": placeholders, "names": names}


def copied_parts(
    sources: Sequence[str], translations: Sequence[str], references: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """How many numbers, placeholders and names translations had to copy, and how many they copied.

    A part must be copied if it is in the source and unchanged in the reference. So nothing is required for a number
    that the reference spells out, a name that it writes in its own script, or a word that it writes without the
    capital. Each part counts as often as it is in both. Additions of a translation are not counted; see
    `repeats_itself`.

    Returns:
        `"numbers"`, `"placeholders"` and `"names"` -> number of parts to copy in all sentences together, and number of
        those that the translations have.
    """
    result = {}
    for kind, parts_of in KINDS.items():
        num_wanted = num_copied = 0
        for source, translation, reference in zip(sources, translations, references, strict=True):
            wanted = Counter(parts_of(source))
            if wanted:
                wanted &= _occurrences(kind, wanted, reference)
                num_wanted += wanted.total()
                num_copied += (wanted & _occurrences(kind, wanted, translation)).total()
        result[kind] = (num_wanted, num_copied)
    return result


def _occurrences(kind: str, wanted: Counter[str], text: str) -> Counter[str]:
    """How often a text has each part; names are counted among all its words."""
    if kind == "names":
        return Counter(_CASED_WORD.findall(without_placeholders(text)))
    return Counter(KINDS[kind](text))


def repeats_itself(text: str) -> bool:
    """Whether up to 8 units come three times in a row, such as "the the the" or "no more no more no more".

    Units are words, and characters in scripts without spaces between words, where at least six characters must be
    repeats ("哈哈哈" is a word). Punctuation and case are ignored, and numbers alone are no repetition ("0 0 0").
    """
    units = _UNIT.findall(text.casefold())
    for length in range(1, MAX_REPEATED_UNITS + 1):
        run = 0
        for place in range(length, len(units)):
            run = run + 1 if units[place] == units[place - length] else 0
            if run >= (REPEATS - 1) * length:
                repeated = units[place - run - length + 1 : place + 1]
                if _is_repetition(repeated):
                    return True
    return False


def _is_repetition(units: list[str]) -> bool:
    if all(unit.isdigit() for unit in units):
        return False
    return any(len(unit) > 1 for unit in units) or len(units) >= 2 * REPEATS


def repeating_share(texts: Sequence[str]) -> float:
    """Share (0-1) of the texts that repeat themselves."""
    return sum(map(repeats_itself, texts)) / len(texts)


__all__ = ["KINDS", "copied_parts", "missing_numbers", "names", "numbers", "repeating_share", "repeats_itself"]
