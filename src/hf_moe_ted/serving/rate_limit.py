"""How often somebody may ask."""

import time
from collections import OrderedDict
from collections.abc import Callable


class RateLimit:
    """A bucket of tokens for each client: full, it allows the requests of a minute at once, and it fills in a minute.

    Args:
        requests_per_minute: of each client.
        clock: seconds.
    """

    def __init__(self, requests_per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._interval_s = 60.0 / requests_per_minute
        self._clock = clock
        self._empty_until: OrderedDict[str, float] = OrderedDict()  # when each bucket is full again; the oldest first

    def wait_s(self, client: str) -> float:
        """Takes a token; how long to wait where there is none, 0 where there was one."""
        now = self._clock()
        self._forget_full(now)
        full_at = max(self._empty_until.get(client, now), now) + self._interval_s
        wait_s = full_at - now - 60.0
        if wait_s > 1e-6:
            return wait_s
        self._empty_until[client] = full_at
        self._empty_until.move_to_end(client)
        return 0.0

    def __len__(self) -> int:
        """Clients that are remembered."""
        return len(self._empty_until)

    def _forget_full(self, now: float) -> None:
        """A bucket that is full needs no memory: at most two at a time, so that no request waits for it."""
        for _ in range(2):
            client = next(iter(self._empty_until), None)
            if client is None or self._empty_until[client] > now:
                return
            del self._empty_until[client]


__all__ = ["RateLimit"]
