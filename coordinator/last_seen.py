"""When each device was last heard of, written down at most once a minute for each."""

from collections.abc import Callable
from threading import Lock

from fedia3.coordinator.directory import Directory

EVERY_MS = 60_000
ONLINE_MS = 90_000  # a device that was heard of within this time is online


class LastSeen:
    """Collects devices and writes them down together; may be used by several threads at once."""

    def __init__(self, directory: Directory, now_ms: Callable[[], int]) -> None:
        self._directory, self._now_ms = directory, now_ms
        self._written_ms: dict[str, int] = {}
        self._waiting: set[str] = set()
        self._lock = Lock()

    def note(self, device_id: str) -> None:
        """This device has just called."""
        now_ms = self._now_ms()
        with self._lock:
            written_ms = self._written_ms.get(device_id)
            # A clock that was set back would otherwise silence the device until it catches up.
            if written_ms is None or abs(now_ms - written_ms) >= EVERY_MS:
                self._waiting.add(device_id)

    def flush(self) -> None:
        """Write down who called since the last time; called every few seconds."""
        now_ms = self._now_ms()
        with self._lock:
            waiting, self._waiting = sorted(self._waiting), set()
        if not waiting:
            return
        self._directory.saw(waiting, now_ms)
        with self._lock:
            # Who has not called for a minute would be written anyway.
            self._written_ms = {
                d: ms for d, ms in self._written_ms.items() if abs(now_ms - ms) < EVERY_MS
            } | dict.fromkeys(waiting, now_ms)


def is_online(last_seen_ms: int | None, now_ms: int) -> bool:
    """Whether a device that was last heard of then counts as there now."""
    return last_seen_ms is not None and now_ms - last_seen_ms <= ONLINE_MS
