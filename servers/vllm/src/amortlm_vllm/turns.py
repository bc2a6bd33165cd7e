"""Turns of things of which there can be one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


class Turns:
    """One of several things at a time, for any number of users of it; the next comes when nobody uses it any more."""

    def __init__(self, begin: Callable[[str], Awaitable[None]]):
        """begin: makes a thing, by its name, the present one."""
        self._begin, self._now, self._users = begin, "", 0
        self._waiting: list[str] = []
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def of(self, name: str) -> AsyncIterator[None]:
        """In the block it is this thing's turn. Raises what `begin` raises."""
        async with self._changed:
            self._waiting.append(name)
            try:
                await self._changed.wait_for(lambda: name == self._now or self._is_next(name))
                if name != self._now:
                    self._now = ""  # should `begin` fail half-way
                    await self._begin(name)
                    self._now = name
                self._users += 1
            finally:
                self._waiting.remove(name)
                self._changed.notify_all()
        try:
            yield
        finally:
            async with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def _is_next(self, name: str) -> bool:
        return not self._users and self._waiting[0] == name
