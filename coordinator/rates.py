"""How often somebody may call: token buckets, kept as one number each.

The generic cell rate algorithm (ITU-T I.371): of each key only the time is kept at which its bucket
will be full again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from fedia3.errors import TooManyCalls

MAX_KEYS = 10_000  # of one limiter; strangers must not fill the memory


@dataclass(frozen=True)
class Rate:
    """``burst`` calls at once, then ``per_s`` in every second."""

    per_s: float
    burst: int


class Limiter:
    """One bucket for each key; may be used by several threads at once.

    Args:
        rate: of each key.
        now_s: a clock that only goes forward, in seconds.
    """

    def __init__(self, rate: Rate, now_s: Callable[[], float]) -> None:
        self._rate, self._now_s = rate, now_s
        self._full_at: dict[str, float] = {}
        self._lock = Lock()

    def take(self, key: str) -> None:
        """Count one call.

        Raises:
            TooManyCalls: the bucket is empty, and says when it will not be; nothing was counted.
        """
        with self._lock:
            full_at = self._next_full_at(key)
            if len(self._full_at) >= MAX_KEYS:
                self._forget()
            self._full_at[key] = full_at

    def require_some(self, key: str) -> None:
        """Count nothing.

        Raises:
            TooManyCalls: the bucket is empty.
        """
        with self._lock:
            self._next_full_at(key)

    def _next_full_at(self, key: str) -> float:
        """When the bucket is full again after one more call."""
        now, interval = self._now_s(), 1 / self._rate.per_s
        full_at = max(self._full_at.get(key, now), now) + interval
        wait_s = full_at - now - self._rate.burst * interval
        if wait_s > 1e-9:  # below that it is the sum's rounding
            raise TooManyCalls(f"too many calls; come again in {wait_s:.3g} s", wait_s)
        return full_at

    def _forget(self) -> None:
        """Keep the emptier half: who called little loses least by a new bucket."""
        by_time = sorted(self._full_at.items(), key=lambda entry: entry[1])
        self._full_at = dict(by_time[len(by_time) // 2 :])
