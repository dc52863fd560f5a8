"""Limits and access rules of a server."""

import math
from dataclasses import dataclass, fields

from ..translation.glossary import Glossary
from .api_keys import ApiKeys


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits of a server; every limit has a default, so that no client can use all resources.

    Attributes:
        max_characters: most characters of all texts of a request; more gets status 413.
        max_texts: most texts in the list `q` of a request; more gets status 413.
        max_file_bytes: most bytes of a file to translate; more gets status 413.
        max_requests: most requests in progress, from the first byte of a body on; more get status 503.
        requests_per_minute: requests of a key, or of an address if there are no keys; more get status 429.
        max_stored_bytes: most bytes of translated files that wait for download; more get status 503.
        file_lifetime_s: seconds after which a translated file is removed.
        read_timeout_s: seconds for the whole body of a request to arrive; then status 408.
        request_timeout_s: seconds for a translation; then it is cancelled with status 503.
        api_keys: keys that may translate and detect; `None` needs no key.
        cors_origins: other sites whose pages may call the server from a browser; `("*",)` is all.
        glossary: glossary for requests that bring none.
        log_texts: whether to log texts and translations; otherwise only their number is logged.

    Raises:
        ValueError: a limit is not positive.
    """

    max_characters: int = 100_000
    max_texts: int = 1_000
    max_file_bytes: int = 5_000_000
    max_requests: int = 256
    requests_per_minute: int = 6_000
    max_stored_bytes: int = 500_000_000
    file_lifetime_s: float = 1_800.0
    read_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    api_keys: ApiKeys | None = None
    cors_origins: tuple[str, ...] = ()
    glossary: Glossary | None = None
    log_texts: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            number = getattr(self, field.name)
            if field.type in (int, float) and not (number > 0 and math.isfinite(number)):
                raise ValueError(f"{field.name} ({number}) must be positive")

    @property
    def max_body_bytes(self) -> int:
        """Of a request with texts: a character takes at most twelve bytes: two escapes of JSON, `\\ud83d\\ude00`."""
        return 12 * self.max_characters + 65_536

    @property
    def max_upload_bytes(self) -> int:
        """Most bytes of a request with a file, with the form around it."""
        return self.max_file_bytes + 65_536


__all__ = ["ServerSettings"]
