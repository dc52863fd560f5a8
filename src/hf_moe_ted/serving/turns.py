"""Turns on the device."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """One batch runs at a time. A short batch runs between two tokens of a long one, which then gets the same time.

    One thread takes the short turns, and one thread the long turns.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_busy = self._wants_short = self._is_long = False
        self._owed_s = 0.0  # what short turns took from the long one
        self._start_s = 0.0  # of what runs

    @contextmanager
    def short(self) -> Iterator[None]:
        """A turn of a short batch."""
        with self._changed:
            self._wants_short = True
            self._changed.wait_for(lambda: not self._is_busy and self._short_may_start)
            self._wants_short = False
            self._take()
        try:
            yield
        finally:
            with self._changed:
                if self._is_long:
                    self._owed_s += time.perf_counter() - self._start_s
                self._free()

    @contextmanager
    def long(self) -> Iterator[None]:
        """A turn of a long batch, which calls `between_tokens`."""
        with self._changed:
            self._is_long = True
            self._wait_for_long()
        try:
            yield
        finally:
            with self._changed:
                self._is_long = False
                self._pay()
                self._free()

    def between_tokens(self) -> None:
        """Called in a long batch: a waiting short batch gets its turn if it is due."""
        with self._changed:
            self._pay()
            if self._wants_short and self._short_may_start:
                self._free()
                self._wait_for_long()

    @property
    def _short_may_start(self) -> bool:
        return self._owed_s <= 0 or not self._is_long

    def _wait_for_long(self) -> None:
        self._changed.wait_for(lambda: not self._is_busy and not (self._wants_short and self._short_may_start))
        self._take()

    def _pay(self) -> None:
        now = time.perf_counter()
        self._owed_s = max(0.0, self._owed_s - (now - self._start_s))
        self._start_s = now

    def _take(self) -> None:
        self._is_busy = True
        self._start_s = time.perf_counter()

    def _free(self) -> None:
        self._is_busy = False
        self._changed.notify_all()


__all__ = ["Turns"]
