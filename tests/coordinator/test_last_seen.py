"""Who was heard of is written down, but not at every call."""

import pytest

from fedia3.coordinator.last_seen import LastSeen, is_online
from fedia3.coordinator.stores.memory_directory import MemoryDirectory

NOON = 1_900_000_000_000


class CountedDirectory(MemoryDirectory):
    """A directory that remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[list[str], int]] = []

    def saw(self, device_ids, now_ms):
        self.told.append((list(device_ids), now_ms))


class Clock:
    """A clock that stands until it is moved."""

    now_ms = NOON

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def clock() -> Clock:
    """At noon."""
    return Clock()


@pytest.fixture
def directory() -> CountedDirectory:
    """Told nothing yet."""
    return CountedDirectory()


def test_devices_are_written_down_together(directory: CountedDirectory, clock: Clock) -> None:
    """
    Three calls by two devices are one write of two devices; without calls there is none.
    """
    last_seen = LastSeen(directory, clock)
    for device in ("b", "a", "b"):
        last_seen.note(device)
    last_seen.flush()
    last_seen.flush()
    assert directory.told == [(["a", "b"], NOON)]


def test_a_device_is_written_down_once_a_minute(directory: CountedDirectory, clock: Clock) -> None:
    """
    Calls at 0, 59 and 60 s are two writes.
    """
    last_seen = LastSeen(directory, clock)
    for second in (0, 59, 60):
        clock.now_ms = NOON + second * 1000
        last_seen.note("a")
        last_seen.flush()
    assert directory.told == [(["a"], NOON), (["a"], NOON + 60_000)]


def test_a_clock_that_is_set_back_silences_nobody(
    directory: CountedDirectory, clock: Clock
) -> None:
    """
    An hour back is far from the last note, too.
    """
    last_seen = LastSeen(directory, clock)
    last_seen.note("a")
    last_seen.flush()
    clock.now_ms = NOON - 3_600_000
    last_seen.note("a")
    last_seen.flush()
    assert len(directory.told) == 2


@pytest.mark.parametrize(("ago_ms", "online"), [(0, True), (90_000, True), (90_001, False)])
def test_a_device_is_online_for_a_minute_and_a_half(ago_ms: int, online: bool) -> None:
    """
    A note is a minute old at worst while the device calls, so a bit more than that counts.
    """
    assert is_online(NOON - ago_ms, NOON) == online


def test_a_device_that_never_called_is_not_online() -> None:
    """
    None is no time.
    """
    assert not is_online(None, NOON)
