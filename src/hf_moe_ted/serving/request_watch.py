"""Middleware around all endpoints: it counts and logs every request, and no error leaves the app.

If an error left the app, the server would log its message, which may contain users' text.
"""

import json
import logging
import time
import traceback
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .server_metrics import ServerMetrics

logger = logging.getLogger("hf_moe_ted.serving")

OTHER = "other"  # label of paths outside of the API: a label for every tried path would grow without end
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestWatch:
    """ASGI middleware.

    Args:
        app: the inner app.
        metrics: metrics that count requests.
        log_texts: whether to log messages of errors, which may contain texts.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, log_texts: bool):
        self._app, self._metrics, self._log_texts = app, metrics, log_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_see)
        except Exception as error:
            self._log_error(error)
            if status == 0:
                await _send_error(send_and_see)
            status = 500
        finally:
            self._count(scope, status, time.monotonic() - start)

    def _log_error(self, error: Exception) -> None:
        message = f": {error}" if self._log_texts else ""
        places = "".join(traceback.format_tb(error.__traceback__)).rstrip()
        logger.error("%s%s\n%s", type(error).__name__, message, places)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        endpoint = getattr(scope.get("route"), "path", OTHER)
        self._metrics.requests.labels(endpoint, str(status)).inc()
        self._metrics.seconds.labels(endpoint).observe(seconds)
        method = scope["method"] if scope["method"] in _METHODS else OTHER  # clients control this value
        logger.info("%s %s %d, %.0f ms", method, endpoint, status, 1000 * seconds)


async def _send_error(send: Send) -> None:
    body: Any = json.dumps({"error": "Internal error; see the log of the server"}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})


__all__ = ["RequestWatch", "logger"]
