"""Required phrases of a translation (glossary terms and placeholders), and their tokens."""

import functools
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.placeholders import count_placeholder, placeholder_spans, placeholders
from ..models.language_codes import languages_kept
from .glossary import Glossary
from .words import capitalized, count_phrase, ends_in_word, starts_in_word


@dataclass(frozen=True)
class Phrase:
    """
    Attributes:
        text: text that the translation must have.
        count: how often.
        source: the glossary term that it translates, as written in the sentence; `None` for a placeholder. A term is
            separate from the words around it. A placeholder must be separate only if an adjacent letter would change
            it, as in an address.
        may_be_capitalized: whether it may begin with a capital letter at the start of the translation.
    """

    text: str
    count: int = 1
    source: str | None = None
    may_be_capitalized: bool = False

    @property
    def is_term(self) -> bool:
        return self.source is not None

    @property
    def ends_word(self) -> bool:
        """Whether no letter may follow."""
        if not ends_in_word(self.text):
            return False
        return self.is_term or placeholders(f"{self.text}a") != placeholders(self.text)

    @property
    def starts_word(self) -> bool:
        """Whether no letter may precede it."""
        return starts_in_word(self.text) and (self.is_term or bool(placeholders(self.text)))

    def count_in(self, translation: str) -> int:
        """How often a text has it."""
        if not self.is_term:
            return count_placeholder(self.text, translation)
        return count_phrase(self.text, translation, may_be_capitalized=self.may_be_capitalized)

    def is_in(self, translation: str) -> bool:
        """Whether a text has it as often as required."""
        return self.count_in(translation) >= self.count


def phrases_of(sentence: str, glossary: Glossary | None, *, keep_placeholders: bool = True) -> tuple[Phrase, ...]:
    """The required phrases for a sentence: its terms in the glossary's form, and its placeholders unchanged.

    A placeholder that is part of a term belongs to the term.
    """
    terms = [] if glossary is None else glossary.terms_in(sentence)
    counts = Counter((term.target, term.is_any_case) for term in terms)
    sources = {term.target: term.source for term in reversed(terms)}
    names = Counter(
        sentence[start:end]
        for start, end in (placeholder_spans(sentence) if keep_placeholders else ())
        if not any(term.start < end and start < term.end for term in terms)
    )
    return (
        *(Phrase(text, count, sources[text], is_any_case) for (text, is_any_case), count in counts.items()),
        *(Phrase(name, count) for name, count in names.items()),
    )


@dataclass(frozen=True)
class Spelling:
    """One way to write a phrase in tokens.

    Attributes:
        tokens: one or more.
        is_at_start: whether it is for the start of a translation, or for later places.
        is_after_word: whether it can follow a letter or a digit.
    """

    tokens: tuple[int, ...]
    is_at_start: bool
    is_after_word: bool


class PhraseTokens:
    """How a tokenizer writes phrases, and which of its tokens end words. Threads may share it.

    Args:
        tokenizer: a tokenizer for translation.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._lock = threading.Lock()
        self.spellings = functools.lru_cache(2**12)(self._spellings)
        self.continues_word = functools.lru_cache(2**16)(self._continues_word)
        self.ends_in_word = functools.lru_cache(2**16)(self._ends_in_word)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, without special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def _spellings(self, phrase: Phrase) -> tuple[Spelling, ...]:
        """Spellings at the start (with a capital letter if allowed), after a space, and after other text."""
        may_follow_word = not phrase.starts_word
        at_start = [phrase.text, capitalized(phrase.text)] if phrase.may_be_capitalized else [phrase.text]
        found = [
            *(Spelling(self._tokens("", text), True, False) for text in at_start),
            Spelling(self._tokens("a", f" {phrase.text}"), False, True),
            Spelling(self._tokens("(", phrase.text), False, may_follow_word),
        ]
        return tuple(spelling for spelling in dict.fromkeys(found) if spelling.tokens)

    def _tokens(self, before: str, text: str) -> tuple[int, ...]:
        """Tokens of a text after other text; empty if a token belongs to both."""
        first, both = self._encode(before), self._encode(before + text)
        return both[len(first) :] if both[: len(first)] == first else ()

    def _encode(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        with languages_kept(self._tokenizer):
            return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _continues_word(self, token_id: int) -> bool:
        """Whether a token continues the preceding word."""
        token = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        is_apart = token.startswith("▁") or token_id in self._special_ids
        return not is_apart and starts_in_word(self._text(token))

    def _ends_in_word(self, token_id: int) -> bool:
        """Whether a letter after a token would continue its word."""
        text = self._text(self._tokenizer.convert_ids_to_tokens(token_id) or "")
        return text.endswith("\N{REPLACEMENT CHARACTER}") or ends_in_word(text)  # its bytes may belong to a letter

    def _text(self, token: str) -> str:
        return self._tokenizer.convert_tokens_to_string([token]) if token else ""


__all__ = ["Phrase", "PhraseTokens", "Spelling", "phrases_of"]
