"""Limit the number of requests per client."""

import time
from collections import OrderedDict
from collections.abc import Callable


class RateLimit:
    """A token bucket per client: a full bucket allows the requests of one minute at once, and it refills in one minute.

    Args:
        requests_per_minute: limit for each client.
        clock: function that returns seconds.
    """

    def __init__(self, requests_per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._interval_s = 60.0 / requests_per_minute
        self._clock = clock
        self._empty_until: OrderedDict[str, float] = OrderedDict()  # when each bucket is full again; the oldest first

    def wait_s(self, client: str) -> float:
        """Take a token. Returns 0, or how long to wait if there is none."""
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
        """Number of remembered clients."""
        return len(self._empty_until)

    def _forget_full(self, now: float) -> None:
        """Forget full buckets, which need no memory; at most two per call, so that no request waits for it."""
        for _ in range(2):
            client = next(iter(self._empty_until), None)
            if client is None or self._empty_until[client] > now:
                return
            del self._empty_until[client]


__all__ = ["RateLimit"]
