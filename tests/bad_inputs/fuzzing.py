"""How cases are drawn: the same ones in every run, so that what fails once fails again.

``FEDIA3_FUZZ=20`` draws twenty times as many; a run without it has somewhat more than 100,000.
"""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCALE = float(os.environ.get("FEDIA3_FUZZ", "1"))

# An edit takes five bytes: what is done, where (two), and with what (two).
scripts = st.binary(max_size=30)
_LIKELY = b'\0\xff\x7f\x80"{}[]:,\\.-e0919 '  # bytes that mean something to one of the parsers


def fuzzed(cases: int, **strategies: st.SearchStrategy[Any]) -> Callable[..., Any]:
    """A test of so many cases, times the scale."""
    drawn = settings(
        max_examples=max(1, round(cases * SCALE)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    return lambda test: drawn(given(**strategies)(test))


def mutated(sound: bytes, script: bytes) -> bytes:
    """Sound bytes after a script's edits: flips, other bytes, cuts, splices, repeats."""
    data = bytearray(sound)
    for start in range(0, len(script) - 4, 5):
        what, *rest = script[start : start + 5]
        at, more = rest[0] << 8 | rest[1], rest[2] << 8 | rest[3]
        at %= len(data) + 1
        edit = _EDITS[what % len(_EDITS)]
        edit(data, at, more)
    return bytes(data)


def _flip(data: bytearray, at: int, more: int) -> None:
    if at < len(data):
        data[at] ^= 1 << more % 8


def _write(data: bytearray, at: int, more: int) -> None:
    data[at : at + 1] = bytes([_LIKELY[more % len(_LIKELY)]])


def _insert(data: bytearray, at: int, more: int) -> None:
    data[at:at] = more.to_bytes(2)


def _cut(data: bytearray, at: int, more: int) -> None:
    del data[at : at + 1 + more % 16]


def _end(data: bytearray, at: int, _more: int) -> None:
    del data[at:]


def _splice(data: bytearray, at: int, more: int) -> None:
    source = more % (len(data) + 1)
    data[at : at + 8] = data[source : source + 8]


def _repeat(data: bytearray, at: int, more: int) -> None:
    data[at:at] = data[at : at + 4] * (more % 64)


_EDITS = (_flip, _write, _insert, _cut, _end, _splice, _repeat)
