"""Words of a text in any script, and phrases as whole words."""

import unicodedata

import regex

# Characters of words, without scripts that write no spaces between words.
_SCRIPTS_WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_WORD = regex.compile(rf"(?V1)[[\p{{L}}\p{{M}}\p{{N}}_\u200C\u200D]--[{_SCRIPTS_WITHOUT_SPACES}]]+")
_PIECE = regex.compile(rf"{_WORD.pattern}|\s+|.", flags=regex.DOTALL)


def words_with_spans(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Words, and each character between them, with start and end; any white space counts as one space.

    In scripts without spaces each character is a word. Letters are normalized to NFC.
    """
    pieces = [(_normalized(match[0]), match.span()) for match in _PIECE.finditer(text)]
    return [word for word, _ in pieces], [span for _, span in pieces]


def split_words(text: str) -> tuple[str, ...]:
    """The words of a text, from `words_with_spans`."""
    return tuple(map(_normalized, _PIECE.findall(text)))


def count_phrase(phrase: str, text: str, *, may_be_capitalized: bool = False) -> int:
    """How often a text has a phrase as whole words, without overlaps.

    Args:
        may_be_capitalized: whether the first word of the text may begin with a capital letter that the phrase lacks.
    """
    wanted = split_words(phrase)
    if wanted[0].casefold() not in unicodedata.normalize("NFC", text).casefold():
        return 0  # fast check before words are compared
    words = split_words(text)
    first = next((index for index, word in enumerate(words) if any(map(str.isalnum, word))), 0)
    capital = split_words(capitalized(phrase)) if may_be_capitalized else wanted
    count = index = 0
    while index + len(wanted) <= len(words):
        here = words[index : index + len(wanted)]
        is_here = here == wanted or (index == first and here == capital)
        count += is_here
        index += len(wanted) if is_here else 1
    return count


def capitalized(text: str) -> str:
    """The text with its first letter in upper case; other letters do not change."""
    return text[:1].upper() + text[1:]


def starts_in_word(text: str) -> bool:
    """Whether a word before the text would continue into it."""
    return _WORD.match(text) is not None


def ends_in_word(text: str) -> bool:
    """Whether the last word of the text would continue into a word after it."""
    return _WORD.fullmatch(text[-1:]) is not None


def _normalized(piece: str) -> str:
    return " " if piece.isspace() else unicodedata.normalize("NFC", piece)


__all__ = ["capitalized", "count_phrase", "ends_in_word", "split_words", "starts_in_word", "words_with_spans"]
