"""What is remembered for a second: gone by itself afterwards, whether anybody asks or not."""

import asyncio
import gc
import weakref

import pytest

from broker.concurrency import ttl_cache
from broker.concurrency.ttl_cache import TTLCache


class Answer:
    """Something that a weak reference can watch."""


@pytest.mark.gen_test
async def test_an_answer_is_known_for_its_second_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: TTLCache[str, int] = TTLCache()
    assert answers.get("a") is None
    answers.put([("a", 1), ("b", 2)])
    assert (answers.get("a"), answers.get("b")) == (1, 2)
    answers.forget("a")
    assert (answers.get("a"), answers.get("b")) == (None, 2)
    monkeypatch.setattr(ttl_cache, "REMEMBERED_S", 0)
    assert answers.get("b") is None


@pytest.mark.gen_test
async def test_clearing_forgets_also_what_was_put_a_turn_ago() -> None:
    answers: TTLCache[str, int] = TTLCache()
    answers.put([("a", 1)])
    answers.put([("b", 2)])
    answers.clear()
    assert (answers.get("a"), answers.get("b")) == (None, None)


@pytest.mark.gen_test
async def test_what_is_too_old_leaves_memory_though_nobody_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ttl_cache, "REMEMBERED_S", 0.01)
    answers: TTLCache[str, Answer] = TTLCache()
    gone = asyncio.Event()
    answer = Answer()
    watched = weakref.ref(answer, lambda _: gone.set())
    answers.put([("a", answer)])
    del answer
    gc.collect()
    assert watched() is not None
    await gone.wait()
