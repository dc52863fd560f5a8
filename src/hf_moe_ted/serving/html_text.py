"""Translate HTML: text that a reader sees is translated, everything else stays byte for byte.

There is no tree: the source is cut into tags and text in one pass, by the standard's rules for browsers. So any depth
of nesting works, nothing is added or rewritten, and the time is linear in the length. A construct without an end
extends to the end of the text, as in a browser.
"""

import html
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from .marked_text import Passage, Piece

# elements inside a line of text
_INLINE = {
    *("a", "abbr", "acronym", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i", "img"),
    *("ins", "kbd", "label", "mark", "q", "rp", "rt", "ruby", "s", "samp", "small", "span", "strike", "strong", "sub"),
    *("sup", "time", "tt", "u", "var", "wbr"),
}
_VOID = {
    *("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr"),
}
_RAW = {"iframe", "noembed", "noframes", "script", "style", "textarea", "title", "xmp"}

_KEPT = {"code", "kbd", "math", "object", "samp", "svg", "var", *_RAW} - {"title"}

# elements that end where another begins, because their end tags may be left out
_ENDS_PARAGRAPH = {
    *("address", "article", "aside", "blockquote", "center", "details", "dialog", "dir", "div", "dl", "fieldset"),
    *("figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hgroup", "hr", "main"),
    *("menu", "nav", "ol", "p", "pre", "search", "section", "table", "ul"),
}
_CELLS, _ROWS, _BODIES = {"td", "th"}, {"td", "th", "tr"}, {"tbody", "tfoot", "thead"}
_ENDED_BY = {
    **{name: {"p"} for name in _ENDS_PARAGRAPH},
    **{name: {"dd", "dt", "p"} for name in ("dd", "dt")},
    **{name: {*_CELLS, "p"} for name in _CELLS},
    **{name: {*_ROWS, *_BODIES, "p"} for name in _BODIES},
    "li": {"li", "p"},
    "option": {"option"},
    "optgroup": {"option", "optgroup"},
    "tr": {*_ROWS, "p"},
}
_MAY_CLOSE_THEMSELVES = {"math", "svg"}  # `<svg/>`; in HTML tags the slash has no meaning

_START = re.compile(r"<(?=[a-zA-Z!?]|/[^\s])")
_NAME = re.compile(r"</?([a-zA-Z][^\s/>]*)")
_BETWEEN_ATTRIBUTES = re.compile(r"[\s/]*")
_ATTRIBUTE_NAME = re.compile(r"=?[^\s/>=]*")
_EQUALS = re.compile(r"\s*=\s*")
_UNQUOTED = re.compile(r"[^\s>]*")


class Token(NamedTuple):
    """
    Attributes:
        kind: `text`, `open`, `close`, or `other` for comments and declarations.
        raw: the token as in the source.
        name: name of a tag, in lower case.
        is_kept: from its own attributes: `True` is not translated, `False` is translated, `None` as its surroundings.
    """

    kind: str
    raw: str
    name: str = ""
    is_kept: bool | None = None


def tokens(source: str) -> Iterator[Token]:
    """The tokens of a source; joined they are the source again."""
    position = 0
    while position < len(source):
        found = _START.search(source, position)
        start = len(source) if found is None else found.start()
        if start > position:
            yield Token("text", source[position:start])
        if start == len(source):
            return
        token = _tag(source, start) or Token("other", source[start : _end_of_other(source, start)])
        yield token
        position = start + len(token.raw)
        if token.kind == "open" and token.name in _RAW:
            end = re.compile(rf"</{token.name}(?=[\s/>])", re.IGNORECASE).search(source, position)
            stop = len(source) if end is None else end.start()
            if stop > position:
                yield Token("text", source[position:stop])
            position = stop


def _end_of_other(source: str, start: int) -> int:
    """The end of a comment, a declaration, or what a browser treats as one."""
    mark, skipped = ("-->", 2) if source.startswith("<!--", start) else (">", 2)
    end = source.find(mark, start + skipped)
    return len(source) if end < 0 else end + len(mark)


def _tag(source: str, start: int) -> Token | None:
    """The tag that begins at `start`; a tag without an end extends to the end of the source."""
    name = _NAME.match(source, start)
    if name is None:
        return None
    position = name.end()
    attributes: dict[str, str] = {}
    while True:
        position = _matched(_BETWEEN_ATTRIBUTES, source, position).end()
        if position >= len(source):
            return Token("other", source[start:])
        if source[position] == ">":
            kind = "close" if source[start + 1] == "/" else "open"
            return Token(kind, source[start : position + 1], name[1].lower(), _is_kept(attributes))
        key = _matched(_ATTRIBUTE_NAME, source, position)
        value, position = _value(source, key.end())
        attributes.setdefault(key.group().lower(), value)


def _value(source: str, position: int) -> tuple[str, int]:
    """The value of an attribute, if it has one, and its end."""
    equals = _EQUALS.match(source, position)
    if equals is None:
        return "", position
    position = equals.end()
    quote = source[position : position + 1]
    if quote not in ("'", '"') or not quote:
        unquoted = _matched(_UNQUOTED, source, position)
        return unquoted.group(), unquoted.end()
    end = source.find(quote, position + 1)
    return ("", len(source)) if end < 0 else (source[position + 1 : end], end + 1)


def _matched(pattern: re.Pattern[str], source: str, position: int) -> re.Match[str]:
    found = pattern.match(source, position)
    assert found is not None, "the pattern matches an empty text"
    return found


def _is_kept(attributes: dict[str, str]) -> bool | None:
    """Read `translate="no"` and `class="notranslate"`."""
    translate = attributes.get("translate")
    if translate is not None and translate.lower() in ("", "yes", "no"):
        return translate.lower() == "no"
    return True if "notranslate" in attributes.get("class", "").split() else None


class _OpenElements:
    """The open elements, and whether their content is kept; each step takes constant time at any depth."""

    def __init__(self) -> None:
        self._stack: list[tuple[str, bool]] = []
        self._counts: Counter[str] = Counter()

    @property
    def is_kept(self) -> bool:
        return bool(self._stack) and self._stack[-1][1]

    @property
    def has_lines(self) -> bool:
        return self._counts["pre"] > 0

    def see(self, token: Token) -> None:
        if token.kind == "close" and self._counts[token.name]:
            while self._pop() != token.name:
                pass
            return
        if token.kind != "open":
            return
        while self._stack and self._stack[-1][0] in _ENDED_BY.get(token.name, ()):
            self._pop()
        closes_itself = token.name in _MAY_CLOSE_THEMSELVES and token.raw.endswith("/>")
        if token.name not in _VOID and not closes_itself:
            is_kept = token.is_kept
            if is_kept is None:
                is_kept = self.is_kept or token.name in _KEPT
            self._stack.append((token.name, is_kept))
            self._counts[token.name] += 1

    def _pop(self) -> str:
        name, _ = self._stack.pop()
        self._counts[name] -= 1
        return name


def html_passages(source: str) -> list[Passage | str]:
    """Split a source into passages of text, and the markup between them.

    Block tags, such as `<p>`, end a passage; inline tags, such as `<b>`, are part of it. Scripts, styles, code and
    elements with `translate="no"` are not translated.
    """
    parts: list[Passage | str] = []
    pieces: list[Piece] = []
    elements = _OpenElements()
    depth = 0

    def end_passage() -> None:
        if pieces:
            parts.append(Passage(pieces, _escape, has_lines=elements.has_lines))
            pieces.clear()

    for token in tokens(source):
        if token.kind == "text":
            pieces.append(Piece(token.raw, html.unescape(token.raw), depth, elements.is_kept))
            continue
        if token.kind == "other" or token.name in _INLINE:
            depth += (token.kind == "open" and token.name not in _VOID) - (token.kind == "close" and depth > 0)
            pieces.append(Piece(token.raw, None, depth))
        else:
            end_passage()
            depth = 0
            parts.append(token.raw)
        elements.see(token)
    end_passage()
    return parts


def _escape(text: str) -> str:
    return html.escape(text, quote=False).replace("\xa0", "&nbsp;")


__all__ = ["Token", "html_passages", "tokens"]
