"""Connections that cannot keep the server waiting forever."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 30.0
_ENDLESS = "/gradio_api/heartbeat/"  # a stream that stays open as long as a browser shows the page


class PatientConnection(H11Protocol):
    """A connection that is closed if the head of a request does not arrive, or if the client stops reading.

    uvicorn itself closes only idle connections after an answer. For `uvicorn.Config(http=...)`.
    """

    head_timeout_s = HEAD_TIMEOUT_S  # from the connection, or from the first byte after an answer
    write_timeout_s = WRITE_TIMEOUT_S  # without a byte being taken

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._waits_for_head:
            self._stop(self._head_timer)
            self._head_timer = None
        elif self._head_timer is None:
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._head_timer)
        self._stop(self._write_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_writing()

    def shutdown(self) -> None:
        """Stop a server without waiting for streams that never end."""
        super().shutdown()
        if not self._waits_for_head and _ENDLESS in self.scope["path"]:
            self.transport.close()

    @property
    def _waits_for_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._close_without_head)

    def _close_without_head(self) -> None:
        self._head_timer = None
        if self._waits_for_head:
            self.transport.abort()

    def _watch_writing(self) -> None:
        """Close the connection if the client has not read any data for a while."""
        if self._write_timer is None and self.transport.get_write_buffer_size():
            num_bytes = self.transport.get_write_buffer_size()
            self._write_timer = self.loop.call_later(self.write_timeout_s, self._check_writing, num_bytes)

    def _check_writing(self, num_bytes_before: int) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size() >= num_bytes_before:
            self.transport.abort()
        else:
            self._watch_writing()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


__all__ = ["PatientConnection"]
