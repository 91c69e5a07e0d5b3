"""Objects that were fetched once, for everybody else."""

import asyncio

import pytest

from fedia3.coordinator import object_cache
from fedia3.coordinator.object_cache import ObjectCache


def test_what_one_fetched_the_next_is_given() -> None:
    """
    The first asks the SuperLink, the second need not.
    """

    async def ask() -> None:
        cache = ObjectCache()
        assert await cache.body("a") is None
        cache.note("a", b"answer")
        assert await cache.body("a") == b"answer"
        assert await cache.body("b") is None

    asyncio.run(ask())


def test_those_who_ask_during_a_fetch_wait_for_it() -> None:
    """
    A cohort asks all at once; one of them fetches.
    """

    async def ask() -> None:
        cache = ObjectCache()
        assert await cache.body("a") is None
        others = [asyncio.create_task(cache.body("a")) for _ in range(20)]
        await asyncio.sleep(0)
        cache.note("a", b"answer")
        assert await asyncio.gather(*others) == [b"answer"] * 20

    asyncio.run(ask())


def test_a_fetch_that_failed_is_the_next_ones_to_make() -> None:
    """
    Nothing is kept of it, and whoever waited asks.
    """

    async def ask() -> None:
        cache = ObjectCache()
        assert await cache.body("a") is None
        waiting = asyncio.create_task(cache.body("a"))
        await asyncio.sleep(0)
        cache.note("a", None)
        assert await waiting is None
        cache.note("a", b"answer")
        assert await cache.body("a") == b"answer"

    asyncio.run(ask())


def test_a_fetch_that_never_ends_holds_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Whoever began it may have hung up.
    """
    monkeypatch.setattr(object_cache, "FETCHED_WITHIN_S", 0.01)

    async def ask() -> None:
        cache = ObjectCache()
        assert await cache.body("a") is None
        assert await cache.body("a") is None
        cache.note("a", b"answer")
        assert await cache.body("a") == b"answer"

    asyncio.run(ask())


def test_what_is_held_has_bounds() -> None:
    """
    Bytes and objects; what was used last stays.
    """

    async def ask() -> None:
        cache = ObjectCache(max_bytes=10, max_objects=3)
        for name in ("a", "b"):
            await cache.body(name)
            cache.note(name, b"four")
        assert await cache.body("a") == b"four"
        await cache.body("c")
        cache.note("c", b"four")
        assert [await cache.body(n) for n in ("a", "c")] == [b"four", b"four"]
        assert await cache.body("b") is None
        for name in ("d", "e", "f"):
            assert await cache.body(name) is None
        assert await cache.body("a") is None

    asyncio.run(ask())
