"""This machine's clock, as every message and table has it."""

import time
from collections.abc import Callable


def wall_ms() -> int:
    """Milliseconds since 1970, UTC; it may be set while somebody looks."""
    return time.time_ns() // 10**6


class SetBack:
    """Notices that the wall clock was set back, by the steady clock beside it.

    Args:
        wall_s: seconds since 1970; may be set.
        steady_s: seconds that only ever pass.
    """

    def __init__(
        self,
        wall_s: Callable[[], float] = time.time,
        steady_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall_s, self._steady_s = wall_s, steady_s
        self._ahead_s = wall_s() - steady_s()

    def by_s(self) -> float:
        """By how much since it was last asked; below 0 where it was set ahead."""
        before, self._ahead_s = self._ahead_s, self._wall_s() - self._steady_s()
        return before - self._ahead_s
