"""Token buckets, on a clock that the test turns."""

import pytest

from fedia3.coordinator import rates
from fedia3.coordinator.rates import Limiter, Rate
from fedia3.errors import TooManyCalls


class Clock:
    """A clock that stands until it is moved."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """At 100 s."""
    return Clock()


@pytest.fixture
def limiter(clock: Clock) -> Limiter:
    """Three at once, then one in two seconds."""
    return Limiter(Rate(per_s=0.5, burst=3), clock)


def test_a_burst_passes_and_the_next_call_waits(limiter: Limiter) -> None:
    """
    The fourth call at one time is told to come again in two seconds.
    """
    for _ in range(3):
        limiter.take("anna")
    with pytest.raises(TooManyCalls) as refused:
        limiter.take("anna")
    assert refused.value.retry_after_s == pytest.approx(2)


def test_waiting_as_told_is_enough(limiter: Limiter, clock: Clock) -> None:
    """
    After two seconds there is one call, and only one.
    """
    for _ in range(3):
        limiter.take("anna")
    clock.now_s += 2
    limiter.take("anna")
    with pytest.raises(TooManyCalls):
        limiter.take("anna")


def test_refused_calls_do_not_count(limiter: Limiter, clock: Clock) -> None:
    """
    Whoever hammers does not push the end of the wait away.
    """
    for _ in range(3):
        limiter.take("anna")
    for _ in range(100):
        with pytest.raises(TooManyCalls):
            limiter.take("anna")
    clock.now_s += 2
    limiter.take("anna")


def test_a_bucket_never_holds_more_than_its_burst(limiter: Limiter, clock: Clock) -> None:
    """
    After a quiet day three calls pass, not more.
    """
    limiter.take("anna")
    clock.now_s += 86_400
    for _ in range(3):
        limiter.take("anna")
    with pytest.raises(TooManyCalls):
        limiter.take("anna")


def test_one_does_not_use_up_anothers_calls(limiter: Limiter) -> None:
    """
    Each key has its own bucket.
    """
    for _ in range(3):
        limiter.take("anna")
    limiter.take("bob")


def test_looking_takes_nothing(limiter: Limiter) -> None:
    """
    Asking whether something is left leaves it there; where nothing is, it says so.
    """
    for _ in range(10):
        limiter.require_some("anna")
    for _ in range(3):
        limiter.take("anna")
    with pytest.raises(TooManyCalls):
        limiter.require_some("anna")


def test_strangers_do_not_fill_the_memory(
    limiter: Limiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    With room for ten keys, a hundred strangers leave at most ten, and the one who called most is
    still known.
    """
    monkeypatch.setattr(rates, "MAX_KEYS", 10)
    for _ in range(3):
        limiter.take("busy")
    for number in range(100):
        limiter.take(f"stranger {number}")
    assert len(limiter._full_at) <= 10
    with pytest.raises(TooManyCalls):
        limiter.take("busy")
