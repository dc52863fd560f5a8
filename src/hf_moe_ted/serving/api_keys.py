"""API keys of a server's clients."""

import hmac
from collections.abc import Iterable
from pathlib import Path


class ApiKeys:
    """The known keys; they are never printed.

    Raises:
        ValueError: there is no key.
    """

    def __init__(self, keys: Iterable[str]):
        self._keys = tuple(dict.fromkeys(key.encode() for key in keys if key))
        if not self._keys:
            raise ValueError("there must be at least one API key")

    @classmethod
    def from_file(cls, path: str | Path) -> "ApiKeys":
        """Read a file with one key per line; empty lines, and lines that begin with `#`, are skipped.

        Raises:
            ValueError: the file cannot be read, is not UTF-8 or has no key.
        """
        try:
            lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
            return cls(line for line in lines if not line.startswith("#"))
        except UnicodeDecodeError:
            raise ValueError(f"api_keys ({path}) must be text in UTF-8, one key per line") from None
        except OSError as error:
            raise ValueError(f"api_keys ({path}) cannot be read: {error.strerror}") from None
        except ValueError:
            raise ValueError(f"api_keys ({path}) has no key: write one per line") from None

    def __contains__(self, key: str) -> bool:
        """Compare with every key in constant time, so that the time reveals nothing about keys."""
        given = key.encode()
        return any([hmac.compare_digest(given, known) for known in self._keys])

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"ApiKeys({len(self)} keys)"


__all__ = ["ApiKeys"]
