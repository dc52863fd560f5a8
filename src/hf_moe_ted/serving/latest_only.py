"""Of the work that a person asks for while typing, only the last matters."""

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


MAX_SESSIONS = 10_000  # that are remembered after their work is done


class LatestOnly:
    """Runs one work for each session at a time: a newer one ends the older, in whatever order they arrive."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._newest: OrderedDict[str, float] = OrderedDict()

    async def run(self, session: str, order: float, work: Coroutine[Any, Any, T]) -> T | None:
        """What the work returns, or `None` if there is a newer one of the session.

        Cancelling the caller ends the work, too.

        Args:
            session: who asks.
            order: when, by the clock of the session; requests may overtake each other on their way.
            work: to be done; it is never started if there is a newer one.
        """
        if order < self._newest.get(session, order):
            work.close()
            return None
        self._end(session)
        self._remember(session, order)
        task = asyncio.ensure_future(work)
        self._tasks[session] = task
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()  # does nothing to what is done
            if self._tasks.get(session) is task:
                del self._tasks[session]
        return None if task.cancelled() else task.result()

    def forget(self, session: str) -> None:
        """End what a session is waiting for, when its person has gone."""
        self._end(session)
        self._newest.pop(session, None)

    def _end(self, session: str) -> None:
        task = self._tasks.pop(session, None)
        if task is not None:
            task.cancel()

    def _remember(self, session: str, order: float) -> None:
        self._newest[session] = order
        self._newest.move_to_end(session)
        if len(self._newest) > MAX_SESSIONS:
            self._newest.popitem(last=False)

    def __len__(self) -> int:
        """Sessions with work that goes on."""
        return len(self._tasks)


__all__ = ["LatestOnly"]
