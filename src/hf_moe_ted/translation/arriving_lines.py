"""Lines of standard input that arrive one by one, from a terminal or another program."""

import os
import select
import stat
from typing import BinaryIO

from .text_rows import MAX_LINE_BYTES

_READ_BYTES = 2**16


class ArrivingLines:
    """A file that is read by lines and knows whether the next line has arrived.

    Args:
        file: a file opened for reading; all of it has arrived if it is no file of the system, such as `BytesIO`.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._buffer = bytearray()
        self._is_at_end = False
        try:
            self._descriptor: int | None = file.fileno()
        except OSError:
            self._descriptor = None

    def readline(self, limit: int = -1) -> bytes:
        """Like `readline` of files: a line with its end, or its first `limit` bytes; empty at the end of the file."""
        if self._descriptor is None:
            return self._file.readline(limit)
        while self._line_end(limit) is None and not self._is_at_end:
            self._read()
        end = self._line_end(limit)
        line = bytes(self._buffer if end is None else self._buffer[:end])
        del self._buffer[: len(line)]
        return line

    def has_line(self, wait_s: float = 0.0) -> bool:
        """Whether a line, or the end of the file, has arrived or arrives within this time."""
        if self._descriptor is None:
            return True
        while self._line_end(MAX_LINE_BYTES + 1) is None and not self._is_at_end:
            readable, _, _ = select.select([self._descriptor], [], [], wait_s)
            if not readable:
                return False
            self._read()
        return True

    def num_lines(self) -> int | None:
        """Number of lines left in a regular file; `None` for a stream."""
        if self._descriptor is None or not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            return None
        place = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        count, last = 0, b"\n"
        while block := os.pread(self._descriptor, 2**20, place):
            place, last = place + len(block), block[-1:]
            count += block.count(b"\n")
        return count + (last != b"\n")

    def _line_end(self, limit: int) -> int | None:
        end = self._buffer.find(b"\n") + 1
        if 0 <= limit <= len(self._buffer) and not 0 < end <= limit:
            return limit
        return end or None

    def _read(self) -> None:
        block = os.read(self._descriptor, _READ_BYTES)  # type: ignore[arg-type]
        self._is_at_end = not block
        self._buffer += block


__all__ = ["ArrivingLines"]
