"""Answers that are good for a second: looked up once for requests that follow each other."""

import asyncio
import time
from collections.abc import Iterable
from typing import Generic, TypeVar

REMEMBERED_S = 1.0

Key = TypeVar("Key")
Value = TypeVar("Value")


class TTLCache(Generic[Key, Value]):
    """Cache of values that are at most a second old, bounded in number.

    Answers leave by themselves, at most a second after they became too old, whether anybody asks or
    not: those of thousands of runners, kept between what their connections use, would hold all of
    that memory long after the connections have gone.
    """

    def __init__(self) -> None:
        self._young: dict[Key, tuple[float, Value]] = {}
        self._old: dict[Key, tuple[float, Value]] = {}
        self._turning = False

    def get(self, key: Key) -> Value | None:
        """Return the answer for `key`, None when there is none of this second."""
        known = self._young.get(key) or self._old.get(key)
        return known[1] if known and time.monotonic() - known[0] < REMEMBERED_S else None

    def put(self, answers: Iterable[tuple[Key, Value]]) -> None:
        """Remember answers that were just learnt."""
        now = time.monotonic()
        self._young.update((key, (now, value)) for key, value in answers)
        if not self._turning:
            self._turn()

    def forget(self, key: Key) -> None:
        """Drop one answer."""
        self._young.pop(key, None)
        self._old.pop(key, None)

    def clear(self) -> None:
        """Drop all answers."""
        self._young.clear()
        self._old.clear()

    def _turn(self) -> None:
        """Drop what is two turns old; go on for as long as there is something left."""
        self._old, self._young = self._young, {}
        self._turning = bool(self._old)
        if self._turning:
            asyncio.get_running_loop().call_later(REMEMBERED_S, self._turn)
