"""Limits that Gradio's routes do not have: sizes of request bodies and of stored uploads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Scope = dict[str, Any]
MAX_STORED_BYTES = 500_000_000
JSON_BYTES = 65_536  # of an event, besides its text
FORM_BYTES = 65_536  # of an upload, besides its file
RETRY_AFTER_S = 60


class PageGuard:
    """ASGI middleware of the page.

    Args:
        app: app of the page.
        max_characters: most characters of a text; in JSON a character takes at most twelve bytes.
        max_file_bytes: most bytes of a file.
        folder: folder of uploads and translated files, or a function that returns it.
        max_stored_bytes: most bytes of all files in it; further uploads get status 503.
    """

    def __init__(
        self,
        app: Any,
        max_characters: int,
        max_file_bytes: int,
        folder: Callable[[], str],
        max_stored_bytes: int = MAX_STORED_BYTES,
    ):
        self._app, self._folder, self._max_stored_bytes = app, folder, max_stored_bytes
        self._max_json_bytes = 12 * max_characters + JSON_BYTES
        self._max_upload_bytes = max_file_bytes + FORM_BYTES

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        refused = self._refused(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        if refused is None:
            await self._app(scope, receive, send)
            return
        status, detail = refused
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        if status == 503:
            headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"detail": detail}).encode()})

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason of a refusal; servers enforce the declared length of a body."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return 411, "a request needs a Content-Length"
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        limit = self._max_upload_bytes if is_upload else self._max_json_bytes
        if int(length) > limit:
            return 413, f"a request has {int(length):,} bytes, but this page accepts {limit:,}"
        if is_upload and _num_bytes(Path(self._folder())) + int(length) > self._max_stored_bytes:
            return 503, "too many files are stored here; they are removed after some time: try again later"
        return None


def _num_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; files may be removed at the same time."""
    sizes = []
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size if path.is_file() else 0)
        except FileNotFoundError:
            continue
    return sum(sizes)


__all__ = ["PageGuard"]
