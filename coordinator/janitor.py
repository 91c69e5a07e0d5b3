"""Collects what a registry keeps for nobody: bytes without a version, files of killed writers.

A publish puts its bytes before its version is known, so bytes without a version may belong to one
under way. Three things keep it whole: putting makes bytes young again, and only those older than a
grace are collected; they are deleted while nobody can publish, after a second look at who refers to
them; and a publisher looks after its commit whether its bytes are still there, and else puts them
again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from fedia3.coordinator.registry import Registry
from fedia3.errors import NotFound

GRACE_S = 3600.0
_AT_ONCE = 64  # digests under one hold of the write lock, a few milliseconds each


@dataclass(frozen=True)
class Collected:
    """What was deleted, or would be."""

    blobs: int  # without a version
    blob_bytes: int
    leftovers: int  # of killed writers


def collect(registry: Registry, older_than_s: float = GRACE_S, *, dry: bool = False) -> Collected:
    """Delete bytes that no version has had for ``older_than_s``, and what killed writers left.

    Publishes may go on meanwhile, in any process. Leftovers are never younger than a minute.
    ``dry`` deletes nothing and says what there is.

    Raises:
        StorageFailed: the disk refused to delete; what was collected before is gone.
    """
    blobs = registry.blobs
    removed: list[int] = []  # bytes of each

    def remove(digest: str) -> None:
        try:
            if blobs.age_s(digest) < older_than_s:
                return  # put again since the first look
            size = blobs.size(digest)
        except NotFound:  # another collector was faster
            return
        if not dry:
            blobs.delete(digest)
        removed.append(size)

    for digests in in_groups(blobs.digests(), _AT_ONCE):
        if unused := registry.store.unused(digests):
            if dry:
                for digest in unused:
                    remove(digest)
            else:
                registry.store.remove_unused(unused, remove)
    leftovers = list(blobs.leftovers(older_than_s))
    if not dry:
        for leftover in leftovers:
            blobs.discard(leftover)
    return Collected(len(removed), sum(removed), len(leftovers))


def in_groups(digests: Iterator[str], size: int) -> Iterator[tuple[str, ...]]:
    """All of them, up to ``size`` at a time."""
    while group := tuple(islice(digests, size)):
        yield group
