"""This machine's clock, as every message and table has it."""

import time


def wall_ms() -> int:
    """Milliseconds since 1970, UTC; it may be set while somebody looks."""
    return time.time_ns() // 10**6
