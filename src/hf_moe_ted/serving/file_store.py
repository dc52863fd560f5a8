"""Translated files that wait for their download."""

import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StoredFile:
    """
    Attributes:
        path: path of the file.
        name: its name for a download.
        num_bytes: its size.
        expires_at: time of the store's clock at which it expires.
    """

    path: Path
    name: str
    num_bytes: int
    expires_at: float


class FileStore:
    """Stores files in a folder that only this user can read; `close` removes it.

    Args:
        lifetime_s: seconds after which a file is removed.
        max_bytes: most bytes of all files together.
        clock: function that returns seconds.
    """

    def __init__(self, lifetime_s: float, max_bytes: int, clock: Callable[[], float] = time.monotonic):
        self._lifetime_s, self._max_bytes, self._clock = lifetime_s, max_bytes, clock
        self._folder = Path(tempfile.mkdtemp(prefix="hf-moe-ted-files-"))
        self._files: dict[str, StoredFile] = {}  # the oldest first

    def has_room(self, num_bytes: int) -> bool:
        self.remove_expired()
        return sum(file.num_bytes for file in self._files.values()) + num_bytes <= self._max_bytes

    def seconds_to_room(self) -> float:
        """Seconds until the oldest file is removed."""
        oldest = next(iter(self._files.values()), None)
        return 0.0 if oldest is None else max(oldest.expires_at - self._clock(), 0.0)

    def put(self, name: str, content: bytes) -> str:
        """Store a file and return its key, which cannot be guessed and ends with its name."""
        key = f"{uuid.uuid4()}.{name}"
        path = self._folder / key.split(".")[0]
        path.write_bytes(content)
        self._files[key] = StoredFile(path, name, len(content), self._clock() + self._lifetime_s)
        return key

    def get(self, key: str) -> StoredFile | None:
        """The file of a key; `None` if it does not exist, or no longer."""
        self.remove_expired()
        return self._files.get(key)

    def remove_expired(self) -> None:
        now = self._clock()
        for key in [key for key, file in self._files.items() if file.expires_at <= now]:
            self._files.pop(key).path.unlink(missing_ok=True)

    def close(self) -> None:
        self._files.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


__all__ = ["FileStore", "StoredFile"]
