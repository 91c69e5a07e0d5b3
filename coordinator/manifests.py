"""The base models that a coordinator hands out: the one its rounds train, and its machine's others.

A manifest never changes under its digest, so each is read once.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.manifest import FileEntry, Manifest, read_manifest, schema
from fedia3.adapters.schema import Schema
from fedia3.coordinator.records import checked_digest
from fedia3.errors import NotFound


@dataclass(frozen=True)
class OfferedBase:
    """A base model and where its files lie."""

    manifest: Manifest
    folder: Path

    @cached_property
    def schema(self) -> Schema:
        """The shape of its adapters."""
        return schema(self.manifest)

    @cached_property
    def files(self) -> dict[str, FileEntry]:
        """What may be read, by path; nothing else in the folder is."""
        return {entry.path: entry for entry in self.manifest.files}


class Manifests:
    """Base models by digest and by name; may be used by several threads at once.

    Args:
        trained: the folder of the base model that rounds train.
        bases: the others on this machine.

    Raises:
        NotFound: ``trained`` holds no base model.
        BadInput: its manifest is malformed.
    """

    def __init__(self, trained: Path, bases: BaseStore) -> None:
        self.trained = OfferedBase(read_manifest(trained), trained)
        self._bases = bases
        self._known = {self.trained.manifest.digest: self.trained}

    def find(self, digest: str) -> OfferedBase:
        """The base model of this very digest.

        Raises:
            BadInput: it is no digest.
            NotFound: this coordinator does not have it.
        """
        checked_digest(digest, "a base model's digest")
        if digest not in self._known:
            self._read(digest)
        return self._known[digest]

    def named(self, name: str) -> OfferedBase:
        """The base model of this name: the trained one, else the newest import.

        Raises:
            NotFound: this coordinator has none of that name.
        """
        if name == self.trained.manifest.name:
            return self.trained
        digests = [entry.digest for entry in self._bases.list() if entry.name == name]
        if not digests:
            raise NotFound(f"this coordinator has no base model {name[:64]!r}; ask for the default")
        return self.find(digests[-1])

    def _read(self, digest: str) -> None:
        for entry in self._bases.list():
            if entry.digest == digest:
                self._known[digest] = OfferedBase(read_manifest(entry.path), entry.path)
                return
        raise NotFound(
            f"this coordinator has no base model {digest[:12]}; its rounds train "
            f"{self.trained.manifest.digest[:12]}"
        )
