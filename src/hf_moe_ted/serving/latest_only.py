"""While a person types, only the last request matters."""

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


MAX_SESSIONS = 10_000  # sessions that are remembered after their work is done


class LatestOnly:
    """Runs one work per session: a newer request ends an older one, in any order of arrival."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._newest: OrderedDict[str, float] = OrderedDict()

    async def run(self, session: str, order: float, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of the work; `None` if the session has a newer request.

        Cancelling the caller cancels the work, too.

        Args:
            session: id of the session.
            order: time of the request by the session's clock; requests may arrive in another order.
            work: the work; it is never started if there is a newer request.
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
            task.cancel()  # has no effect on finished work
            if self._tasks.get(session) is task:
                del self._tasks[session]
        return None if task.cancelled() else task.result()

    def forget(self, session: str) -> None:
        """Cancel the work of a session whose user has left."""
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
        """Number of sessions with running work."""
        return len(self._tasks)


__all__ = ["LatestOnly"]
