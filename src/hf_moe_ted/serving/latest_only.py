"""Of the work that a person asks for while typing, only the last matters."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LatestOnly:
    """Runs one work for each session at a time: a newer one ends the older."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    async def run(self, session: str, work: Coroutine[Any, Any, T]) -> T | None:
        """What the work returns, or `None` if a newer one of the session has ended it.

        Cancelling the caller ends the work, too.
        """
        self.cancel(session)
        task = asyncio.ensure_future(work)
        self._tasks[session] = task
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()  # does nothing to what is done
            if self._tasks.get(session) is task:
                del self._tasks[session]
        return None if task.cancelled() else task.result()

    def cancel(self, session: str) -> None:
        """End what a session is waiting for, as when its person has gone."""
        task = self._tasks.pop(session, None)
        if task is not None:
            task.cancel()

    def __len__(self) -> int:
        """Sessions with work that goes on."""
        return len(self._tasks)


__all__ = ["LatestOnly"]
