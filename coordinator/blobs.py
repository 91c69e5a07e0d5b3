"""Where adapters' bytes lie: content-addressed, so a digest names the same bytes for ever.

The file store's order of steps (write aside, fsync, rename, fsync the folder) makes a blob that
can be seen a blob that is whole: a crash leaves at most a file aside that nobody reads.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from fedia3.coordinator.records import checked_digest
from fedia3.errors import BadSetting, Corrupt, NotFound, StorageFailed
from fedia3.private_files import sync_folder

_ASIDE = "tmp"
_WRITER_S = 60.0  # no writer keeps a file aside for longer, but one that was killed


class BlobStore(Protocol):
    """Bytes by their sha256 in hex."""

    def put(self, data: bytes) -> str:
        """Keep the bytes and return their digest; when it returns they survive a crash.

        Raises:
            StorageFailed: the disk refused the write; nothing was kept.
        """
        ...

    def get(self, digest: str) -> bytes:
        """The bytes, checked against their digest.

        Raises:
            NotFound: there are none.
            Corrupt: what is stored are other bytes.
        """
        ...

    def has(self, digest: str) -> bool:
        """Whether something is stored under this digest; it is not read."""
        ...

    def size(self, digest: str) -> int:
        """How many bytes are stored under this digest; they are not read.

        Raises:
            NotFound: there are none.
            StorageFailed: the disk refused.
        """
        ...

    def delete(self, digest: str) -> None:
        """Keep these bytes no longer, also across a crash; where there are none, nothing happens.

        Raises:
            StorageFailed: the disk refused.
        """
        ...

    def digests(self) -> Iterator[str]:
        """Every stored digest, in no order."""
        ...

    def age_s(self, digest: str) -> float:
        """Seconds since these bytes were last put, also where they were there before.

        Raises:
            NotFound: there are none.
        """
        ...

    def leftovers(self, older_than_s: float) -> Iterator[str]:
        """What killed writers left aside, by names that :meth:`discard` takes, in no order."""
        ...

    def discard(self, leftover: str) -> None:
        """Delete something left aside; where it is gone already, nothing happens.

        Raises:
            StorageFailed: the disk refused.
        """
        ...


class MemoryBlobs:
    """Blobs in a dictionary, for tests and trial runs."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}
        self._put_at: dict[str, float] = {}

    def put(self, data: bytes) -> str:
        """See :meth:`BlobStore.put`."""
        digest = _sha256(data)
        self._blobs[digest] = data
        self._put_at[digest] = time.monotonic()
        return digest

    def get(self, digest: str) -> bytes:
        """See :meth:`BlobStore.get`."""
        if digest not in self._blobs:
            raise _no_blob(digest)
        return _verified(self._blobs[digest], digest)

    def has(self, digest: str) -> bool:
        """See :meth:`BlobStore.has`."""
        return digest in self._blobs

    def size(self, digest: str) -> int:
        """See :meth:`BlobStore.size`."""
        if digest not in self._blobs:
            raise _no_blob(digest)
        return len(self._blobs[digest])

    def delete(self, digest: str) -> None:
        """See :meth:`BlobStore.delete`."""
        self._blobs.pop(digest, None)

    def digests(self) -> Iterator[str]:
        """See :meth:`BlobStore.digests`."""
        return iter(tuple(self._blobs))

    def age_s(self, digest: str) -> float:
        """See :meth:`BlobStore.age_s`."""
        if digest not in self._blobs:
            raise _no_blob(digest)
        return time.monotonic() - self._put_at[digest]

    def leftovers(self, older_than_s: float) -> Iterator[str]:  # noqa: ARG002  # there are none
        """See :meth:`BlobStore.leftovers`."""
        return iter(())

    def discard(self, leftover: str) -> None:
        """See :meth:`BlobStore.discard`."""


class FileBlobs:
    """Blobs as files ``aa/bb/<sha256>`` under ``root``, whose first four digits are ``aabb``.

    Raises:
        BadSetting: ``root`` cannot be created or is not a folder.
    """

    def __init__(self, root: Path) -> None:
        try:
            for folder in (root, root / _ASIDE):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise BadSetting(
                f"cannot keep adapters in {root}: {error.strerror}; choose a folder you can write"
            ) from error
        self._root = root.resolve()

    def put(self, data: bytes) -> str:
        """See :meth:`BlobStore.put`; bytes damaged at rest are replaced by the good ones."""
        digest = _sha256(data)
        path = self._path(digest)
        try:
            if not self._renewed(path, data):
                self._write(path, data)
            # Also where the file was there already: whoever renamed it may have died before this.
            for folder in (path.parent, path.parent.parent, self._root):
                sync_folder(folder)
        except OSError as error:
            raise StorageFailed(
                f"cannot write an adapter of {len(data)} bytes to {self._root}: {error.strerror}; "
                "nothing was published, make room or fix the folder and try again"
            ) from error
        return digest

    def get(self, digest: str) -> bytes:
        """See :meth:`BlobStore.get`."""
        path = self._path(digest)
        try:
            return _verified(_read(path), digest)
        except FileNotFoundError as error:
            raise _no_blob(digest) from error
        except OSError as error:
            raise StorageFailed(f"cannot read {path}: {error.strerror}") from error

    def has(self, digest: str) -> bool:
        """See :meth:`BlobStore.has`."""
        return self._path(digest).is_file()

    def size(self, digest: str) -> int:
        """See :meth:`BlobStore.size`."""
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError as error:
            raise _no_blob(digest) from error
        except OSError as error:
            raise StorageFailed(f"cannot read blob {digest[:12]}: {error.strerror}") from error

    def delete(self, digest: str) -> None:
        """See :meth:`BlobStore.delete`."""
        path = self._path(digest)
        try:
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                sync_folder(path.parent)
        except OSError as error:
            raise _cannot_delete(path, error) from error

    def digests(self) -> Iterator[str]:
        """See :meth:`BlobStore.digests`."""
        return (path.name for path in self._root.glob("??/??/" + "?" * 64) if path.is_file())

    def age_s(self, digest: str) -> float:
        """See :meth:`BlobStore.age_s`."""
        try:
            return time.time() - self._path(digest).stat().st_mtime
        except FileNotFoundError as error:
            raise _no_blob(digest) from error

    def leftovers(self, older_than_s: float) -> Iterator[str]:
        """See :meth:`BlobStore.leftovers`; never younger than a minute, it may be at work."""
        born_before = time.time() - max(older_than_s, _WRITER_S)
        for path in (self._root / _ASIDE).iterdir():
            with suppress(FileNotFoundError):  # it was renamed meanwhile
                if path.stat().st_mtime < born_before:
                    yield path.name

    def discard(self, leftover: str) -> None:
        """See :meth:`BlobStore.discard`."""
        path = self._root / _ASIDE / Path(leftover).name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_delete(path, error) from error

    def _path(self, digest: str) -> Path:
        checked_digest(digest, "a blob's name")
        path = self._root / digest[:2] / digest[2:4] / digest
        # A link could make us serve, or overwrite, what lies outside the store.
        for step in (path, path.parent, path.parent.parent):
            if step.is_symlink():
                raise Corrupt(
                    f"{step.relative_to(self._root)} in the blob store is a symbolic link, "
                    "expected bytes; remove it"
                )
        return path

    def _renewed(self, path: Path, data: bytes) -> bool:
        """Whether the bytes are there; they are as young as any from now on, so not collected."""
        try:
            if not path.is_file() or _read(path) != data:
                return False
            os.utime(path)
        except FileNotFoundError:  # collected meanwhile
            return False
        return True

    def _write(self, path: Path, data: bytes) -> None:
        for folder in (path.parent.parent, path.parent):  # parents of a mkdir get another mode
            folder.mkdir(mode=0o700, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=self._root / _ASIDE)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(aside).replace(path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _verified(data: bytes, digest: str) -> bytes:
    if (got := _sha256(data)) != digest:
        raise Corrupt(
            f"blob {digest[:12]} holds bytes of digest {got[:12]}; it is not served, "
            "restore it from a backup or publish it again"
        )
    return data


def _no_blob(digest: str) -> NotFound:
    return NotFound(f"no blob {digest[:12]} is stored")


def _cannot_delete(path: Path, error: OSError) -> StorageFailed:
    return StorageFailed(f"cannot delete {path}: {error.strerror}; fix the folder and try again")


def _read(path: Path) -> bytes:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read()
