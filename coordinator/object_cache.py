"""What many devices fetch in one round, fetched once from the SuperLink.

A round's request has the same adapter and plan for everybody, so but for its envelope it is the
same Flower objects, each named by its sha256. The SuperLink takes milliseconds for each it gives.
"""

import asyncio
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field

MAX_BYTES = 64 << 20
MAX_OBJECTS = 4096
FETCHED_WITHIN_S = 2.0  # then whoever waits for another's fetch asks too: that one may be gone


@dataclass
class _Object:
    """An object that is held (``body``) or that somebody is fetching."""

    body: bytes | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class ObjectCache:
    """The SuperLink's answers to pulls, by object id; those unused for longest go first."""

    def __init__(self, max_bytes: int = MAX_BYTES, max_objects: int = MAX_OBJECTS) -> None:
        self._max_bytes, self._max_objects = max_bytes, max_objects
        self._objects = OrderedDict[str, _Object]()
        self._bytes = 0

    async def body(self, object_id: str) -> bytes | None:
        """The answer, perhaps after a fetch under way; None: the caller is to fetch it."""
        if (known := self._objects.get(object_id)) is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(known.settled.wait(), FETCHED_WITHIN_S)
            if known.body is not None:
                if object_id in self._objects:
                    self._objects.move_to_end(object_id)
                return known.body
        self._objects.setdefault(object_id, _Object())
        self._make_room()
        return None

    def note(self, object_id: str, body: bytes | None) -> None:
        """How a fetch ended: with an answer that will not change, or with nothing to keep."""
        known = self._objects.get(object_id)
        if known is None or known.body is not None:
            return
        known.body = body
        known.settled.set()
        if body is None:
            del self._objects[object_id]
        else:
            self._bytes += len(body)
            self._make_room()

    def _make_room(self) -> None:
        while self._bytes > self._max_bytes or len(self._objects) > self._max_objects:
            _, oldest = self._objects.popitem(last=False)
            oldest.settled.set()
            self._bytes -= len(oldest.body or b"")
