"""SRT subtitles: texts are translated; numbers and times stay byte for byte."""

import re

from .marked_text import Passage, Piece

MAX_LINE_CHARACTERS = 42  # the length that is easy to read at once

_TIMES = re.compile(r"[ \t]*\d+:\d+:\d+[,.]\d+[ \t]*-->[ \t]*\d+:\d+:\d+[,.]\d+[^\r\n]*")
_MARK = re.compile(r"</?(?:b|i|u|s|font|c|v|ruby|rt)\b[^<>\n]*>|\{\\[^{}\n]*\}", re.IGNORECASE)
_WORD = re.compile(r"(?:<[^<>]*>|\{\\[^{}]*\}|\S)+")
_SPEAKER = re.compile(r"\s*[-\u2013\u2014]\s*\w")


class Cue:
    """The text of one pair of times. Lines that begin with a dash belong to different speakers and are separate texts.

    Args:
        lines: lines without line ends.
        newline: line end between lines.
    """

    def __init__(self, lines: list[str], newline: str):
        starts = [index for index, line in enumerate(lines) if index == 0 or _SPEAKER.match(line)]
        of_speakers = [lines[start:end] for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]
        self._newline = newline
        self._widths = [max(MAX_LINE_CHARACTERS, *map(_width, of_speaker)) for of_speaker in of_speakers]
        self.passages = [Passage(_pieces("\n".join(of_speaker)), str) for of_speaker in of_speakers]

    def join(self, rendered: list[str]) -> str:
        """Wrap translated passages into lines of at most the source's line length or `MAX_LINE_CHARACTERS`."""
        lines: list[str] = []
        for passage, text, width in zip(self.passages, rendered, self._widths, strict=True):
            lines += _wrapped(text, width) if passage.texts else text.split("\n")
        return self._newline.join(lines)


def srt_parts(source: str) -> list[Cue | str]:
    """Split a source into cues and the parts between them: numbers, times, blank lines.

    Raises:
        ValueError: it has no times.
    """
    lines = re.split(r"(\r\n|\n|\r)", source)
    texts, ends = lines[::2], [*lines[1::2], ""]
    times = [index for index, line in enumerate(texts) if _TIMES.fullmatch(line)]
    if not times:
        if source.strip():
            raise ValueError("there is no line with times, such as 00:00:01,000 --> 00:00:02,500: is it an SRT file?")
        return [source]
    parts: list[Cue | str] = []
    position = 0
    for start, next_time in zip(times, [*times[1:], len(texts)], strict=True):
        stop = start + 1
        while stop < next_time and texts[stop].strip():
            stop += 1
        if stop == next_time < len(texts) and stop > start + 1:
            stop -= 1  # the number of the next cue, without a blank line before it
        parts.append(_joined(texts, ends, position, start + 1))
        if stop > start + 1:
            parts += [Cue(texts[start + 1 : stop], ends[start]), ends[stop - 1]]
        position = stop
    return [*parts, _joined(texts, ends, position, len(texts))]


def _joined(texts: list[str], ends: list[str], start: int, stop: int) -> str:
    return "".join(text + end for text, end in zip(texts[start:stop], ends[start:stop], strict=True))


def _pieces(text: str) -> list[Piece]:
    pieces, position, depth = [], 0, 0
    for mark in _MARK.finditer(text):
        if mark.start() > position:
            raw = text[position : mark.start()]
            pieces.append(Piece(raw, raw, depth))
        if mark.group().startswith("<"):
            depth = max(depth + (-1 if mark.group().startswith("</") else 1), 0)
        pieces.append(Piece(mark.group(), None, depth))
        position = mark.end()
    if position < len(text):
        pieces.append(Piece(text[position:], text[position:], depth))
    return pieces


def _width(text: str) -> int:
    return len(_MARK.sub("", text))


def _wrapped(text: str, width: int) -> list[str]:
    """As few lines as `width` allows, of about the same length; a longer word is not split."""
    words = _WORD.findall(text)
    num_characters = _width(" ".join(words))
    num_lines = -(-num_characters // width)
    even = _greedy(words, min(width, -(-num_characters // max(num_lines, 1)) + 4))
    return even if len(even) <= num_lines else _greedy(words, width)


def _greedy(words: list[str], width: int) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and _width(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return lines


__all__ = ["Cue", "srt_parts"]
