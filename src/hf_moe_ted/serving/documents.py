"""A common form for all document formats: passages to translate, and a function that joins them again."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import PurePath

from .html_text import html_passages
from .marked_text import IN_PARTS, Passage
from .srt_text import Cue, srt_parts

CHUNK_CHARACTERS = 50_000
"""A long text goes to the model in pieces of about this many characters, so it never fills the shared queue."""

_SAMPLE_CHARACTERS = 10_000


@dataclass(frozen=True)
class Document:
    """
    Attributes:
        source: the whole document.
        texts: texts to translate, in order.
        is_shown: for each text, whether its translation appears directly in the result, so that its problems count.
        join: function that makes the document from translations of each of `texts`, the best first; it also returns
            problems.
        has_parts: whether `join` uses other translations than the best.
        sample: its beginning as plain text, to detect its language.
    """

    source: str
    texts: tuple[str, ...]
    is_shown: tuple[bool, ...]
    join: Callable[[Sequence[Sequence[str]]], tuple[str, tuple[str, ...]]]
    sample: str
    has_parts: bool = False


def plain_document(source: str) -> Document:
    """A plain text; a long one is cut at line ends, because lines are never translated together."""
    chunks = _chunks(source)
    return Document(
        source,
        chunks,
        (True,) * len(chunks),
        lambda texts: ("".join(text[0] for text in texts), ()),
        source[:_SAMPLE_CHARACTERS],
    )


def html_document(source: str) -> Document:
    return _of_passages(source, html_passages(source))


def srt_document(source: str) -> Document:
    """
    Raises:
        ValueError: it has no times.
    """
    parts = srt_parts(source)
    flat: list[Passage | str] = []
    for part in parts:
        flat += part.passages if isinstance(part, Cue) else [part]
    inner = _of_passages(source, flat)

    def join(texts: Sequence[Sequence[str]]) -> tuple[str, tuple[str, ...]]:
        rendered, problems = _render(flat, texts)
        pieces, position = [], 0
        for part in parts:
            count = len(part.passages) if isinstance(part, Cue) else 1
            of_part = rendered[position : position + count]
            pieces.append(part.join(of_part) if isinstance(part, Cue) else of_part[0])
            position += count
        return "".join(pieces), problems

    return replace(inner, join=join)


DOCUMENT_OF_SUFFIX = {".txt": plain_document, ".html": html_document, ".srt": srt_document}
"""End of a file's name -> function that reads it."""


def read_file(name: str, content: bytes) -> Document:
    """Read a file by the end of its name. A byte order mark is kept.

    Raises:
        ValueError: the name has another end, the text is not UTF-8, or an SRT has no times.
    """
    suffix = PurePath(name).suffix.lower()
    if suffix not in DOCUMENT_OF_SUFFIX:
        raise ValueError(f"file format not supported: the name must end with {', '.join(DOCUMENT_OF_SUFFIX)}")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is not UTF-8: byte {error.start} cannot be read; save it as UTF-8") from None
    mark, text = ("\ufeff", text[1:]) if text.startswith("\ufeff") else ("", text)
    document = DOCUMENT_OF_SUFFIX[suffix](text)

    def join(texts: Sequence[Sequence[str]]) -> tuple[str, tuple[str, ...]]:
        joined, problems = document.join(texts)
        return mark + joined, problems

    return replace(document, source=mark + text, join=join)


def _of_passages(source: str, parts: Sequence[Passage | str]) -> Document:
    passages = [part for part in parts if isinstance(part, Passage)]
    texts = tuple(text for passage in passages for text in passage.texts)
    is_shown = tuple(index == 0 for passage in passages for index in range(len(passage.texts)))

    def join(translations: Sequence[Sequence[str]]) -> tuple[str, tuple[str, ...]]:
        rendered, problems = _render(parts, translations)
        return "".join(rendered), problems

    firsts = [passage.texts[0] for passage in passages if passage.texts]
    return Document(source, texts, is_shown, join, "\n".join(firsts)[:_SAMPLE_CHARACTERS], not all(is_shown))


def _render(parts: Sequence[Passage | str], translations: Sequence[Sequence[str]]) -> tuple[list[str], tuple[str, ...]]:
    rendered, problems, position = [], [], 0
    for part in parts:
        if isinstance(part, str):
            rendered.append(part)
            continue
        text, is_whole = part.render(translations[position : position + len(part.texts)])
        rendered.append(text)
        if not is_whole:
            problems.append(f"{part.texts[0][:60]!r}: {IN_PARTS}")
        position += len(part.texts)
    return rendered, tuple(problems)


def _chunks(source: str) -> tuple[str, ...]:
    """Chunks of whole lines, of about `CHUNK_CHARACTERS` each."""
    if len(source) <= CHUNK_CHARACTERS:
        return (source,)
    lines = re.findall(r"[^\n]*\n|[^\n]+", source)
    chunks: dict[int, list[str]] = {}
    for end, line in zip(accumulate(map(len, lines)), lines, strict=True):
        chunks.setdefault((end - 1) // CHUNK_CHARACTERS, []).append(line)
    return tuple("".join(chunk) for chunk in chunks.values())


__all__ = [
    "CHUNK_CHARACTERS",
    "DOCUMENT_OF_SUFFIX",
    "Document",
    "html_document",
    "plain_document",
    "read_file",
    "srt_document",
]
