"""Of several works of a session only the last one ends."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from hf_moe_ted.serving.latest_only import LatestOnly


class Work:
    """Waits for its `gate`."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.is_started = self.is_cancelled = False

    async def run(self, result: str) -> str:
        self.is_started = True
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise
        return result


async def started(*coroutines: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    tasks = []
    for coroutine in coroutines:
        tasks.append(asyncio.ensure_future(coroutine))
        await asyncio.sleep(0.001)
    return tasks


def test_a_newer_work_ends_the_older_of_its_session() -> None:
    async def main() -> None:
        latest, works = LatestOnly(), [Work() for _ in range(4)]
        sessions = ["a", "a", "b", "a"]
        calls = [
            latest.run(session, i, work.run(str(i)))
            for i, (session, work) in enumerate(zip(sessions, works, strict=True))
        ]
        tasks = await started(*calls)
        assert len(latest) == 2
        for work in works:
            work.gate.set()
        assert await asyncio.gather(*tasks) == [None, None, "2", "3"]
        assert [work.is_cancelled for work in works] == [True, True, False, False]
        assert len(latest) == 0

    asyncio.run(main())


def test_caller_that_is_cancelled_ends_its_work() -> None:
    async def main() -> None:
        latest, work = LatestOnly(), Work()
        (task,) = await started(latest.run("a", 0, work.run("x")))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert work.is_cancelled and len(latest) == 0

    asyncio.run(main())


def test_session_that_has_gone() -> None:
    async def main() -> None:
        latest, work = LatestOnly(), Work()
        (task,) = await started(latest.run("a", 0, work.run("x")))
        latest.forget("b")
        assert work.is_started and not work.is_cancelled
        latest.forget("a")
        assert await task is None
        assert work.is_cancelled and len(latest) == 0

    asyncio.run(main())


def test_errors_are_those_of_the_work() -> None:
    async def fail() -> str:
        raise ValueError("wrong")

    async def main() -> None:
        latest = LatestOnly()
        with pytest.raises(ValueError, match="wrong"):
            await latest.run("a", 0, fail())
        assert len(latest) == 0

    asyncio.run(main())


def test_an_older_work_that_comes_late_is_not_started() -> None:
    async def main() -> None:
        latest, works = LatestOnly(), [Work() for _ in range(4)]
        works[1].gate.set()
        (newest,) = await started(latest.run("a", 7.5, works[0].run("newest")))
        assert await latest.run("a", 7.25, works[1].run("late")) is None
        works[0].gate.set()
        assert await newest == "newest"
        assert await latest.run("a", 7.25, works[1].run("later still")) is None
        assert not works[1].is_started
        works[2].gate.set()
        assert await latest.run("b", 1.0, works[2].run("of another")) == "of another"
        latest.forget("a")
        works[3].gate.set()
        assert await latest.run("a", 1.0, works[3].run("anew")) == "anew"

    asyncio.run(main())
