"""Which of Flower's objects a device may touch: those that its own messages are made of.

The SuperLink gives, takes and deletes any object for any node that knows the object's id, which is
the sha256 of its bytes. So that nobody can try what is in another device's reply, or delete its
message, the fleet's door remembers what it handed to whom, and who announced what.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

MESSAGES = 4  # remembered of a device, each way; a node works on one at a time

Tree = Any  # Flower's ObjectTree: an object's id, and its children


@dataclass
class _Known:
    """One device's last messages, each a set of object ids."""

    given: deque[frozenset[str]] = field(default_factory=lambda: deque(maxlen=MESSAGES))
    roots: deque[str] = field(default_factory=lambda: deque(maxlen=MESSAGES))  # of those given
    announced: deque[frozenset[str]] = field(default_factory=lambda: deque(maxlen=MESSAGES))


class HandedObjects:
    """The objects of each device's last messages, by device."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def note_given(self, device_id: str, trees: Iterable[Tree]) -> None:
        """A poll brought the device messages that are made of these."""
        for tree in trees:
            known = self._known.setdefault(device_id, _Known())
            known.given.append(frozenset(object_ids(tree)))
            known.roots.append(tree.object_id)

    def note_announced(self, device_id: str, trees: Iterable[Tree]) -> None:
        """The device's replies, as the SuperLink took them, are made of these."""
        for tree in trees:
            self._known.setdefault(device_id, _Known()).announced.append(
                frozenset(object_ids(tree))
            )

    def may_touch(self, device_id: str, operation: str, request: Any) -> bool:
        """Whether an object that the request names is the device's to pull, push or confirm."""
        known = self._known.get(device_id, _Known())
        match operation:
            case "pull-object":
                return any(request.object_id in ids for ids in known.given)
            case "push-object":
                return any(request.object_id in ids for ids in known.announced)
            case "confirm-message-received":
                return request.message_object_id in known.roots
        return True


def object_ids(tree: Tree) -> Iterator[str]:
    """Every object in the tree."""
    yield tree.object_id
    for child in tree.children:
        yield from object_ids(child)
