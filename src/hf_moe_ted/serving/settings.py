"""What a server allows, and to whom."""

import math
from dataclasses import dataclass, fields

from .api_keys import ApiKeys


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits of a server; each is there by default, so that no client can take it all.

    Attributes:
        max_characters: of all texts of a request; more is answered with 413.
        max_texts: in the list `q` of a request; more is answered with 413.
        max_file_bytes: of a file to translate; more is answered with 413.
        max_requests: in flight, from the first byte of a body on; more are answered with 503.
        requests_per_minute: of a key, or of an address where there are no keys; more are answered with 429.
        max_stored_bytes: of translated files that wait for their download; more are answered with 503.
        file_lifetime_s: after which a translated file is removed.
        read_timeout_s: for the whole body of a request to arrive; then 408.
        request_timeout_s: for a translation; then it is given up with 503.
        api_keys: who may translate and detect; `None`: everybody.
        cors_origins: pages of which other sites may call the server from a browser; `("*",)` for all.
        log_texts: whether texts and translations are written to the log; otherwise only their numbers are.

    Raises:
        ValueError: a limit that is not positive.
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
        """Of a request with a file, the form around it included."""
        return self.max_file_bytes + 65_536


__all__ = ["ServerSettings"]
