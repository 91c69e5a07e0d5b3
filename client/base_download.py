"""Bring a base model to this machine: in pieces, through cuts and crashes, checked as it comes.

A chunk counts once its sha256 is the manifest's. What counts stays in ``.partial-DIGEST`` beside
the base models, so that a download goes on where the last one ended, whoever ended it; what is
found there is hashed again, for nobody knows what a crash left. The finished folder appears under
its digest at once.
"""

import fcntl
import hashlib
import logging
import os
import random
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedia3.adapters.base_store import BaseEntry, BaseStore
from fedia3.adapters.manifest import (
    FileEntry,
    Manifest,
    read_manifest,
    verify,
    write_manifest,
)
from fedia3.errors import Corrupt, NotFound, StorageFailed, Unreachable
from fedia3.private_files import sync_folder
from fedia3.proto.base_models_pb2 import FilePiece, ReadFileRequest
from fedia3.proto.caller import LONGEST_PAUSE_S, STALL_S, Caller

AHEAD = 4  # chunks in memory between the network and the disk
LOCK_EVERY_S = 0.1  # asked for so often while another process has it
PATIENCE_S = 120.0  # without a single new chunk

Progress = Callable[[int, int], None]  # bytes that count so far, bytes in all

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseDownload:
    """How to fetch base models from one coordinator into one home.

    ``progress`` is told of every chunk that counts.
    """

    caller: Caller
    store: BaseStore = field(default_factory=BaseStore)
    progress: Progress = lambda _done, _total: None
    stall_s: float = STALL_S  # a stream that brings nothing for so long is opened anew
    patience_s: float = PATIENCE_S
    jitter: Callable[[], float] = random.random

    def fetch(self, manifest: Manifest) -> BaseEntry:
        """Have the manifest's base model in the home; one that is there whole is not fetched.

        One process at a time fetches a base; others wait, and find it there.

        Raises:
            Unreachable: nothing new came for ``patience_s``; what came is kept, ask again.
            Corrupt: the coordinator sent a chunk that is not the manifest's; those before it stay.
            StorageFailed: the disk refused; what came is kept, make room and ask again.
        """
        if found := _whole(self.store, manifest):
            return found
        bases = self.store.writable_folder()
        with _alone(bases / f".{manifest.digest}.lock", self.caller):
            return _whole(self.store, manifest) or self._fetched(manifest, bases)

    def _fetched(self, manifest: Manifest, bases: Path) -> BaseEntry:
        partial = bases / f".partial-{manifest.digest}"
        try:
            partial.mkdir(mode=0o700, exist_ok=True)
            files = [_Unfinished(partial, entry, manifest.chunk_size) for entry in manifest.files]
            _require_room(files, partial)
            for file in files:
                self._complete(manifest, file, sum(f.good for f in files if f is not file))
            write_manifest(partial, manifest)
            _sync(partial)
            return self.store.adopt(partial)
        except OSError as error:
            raise StorageFailed(
                f"cannot keep base model {manifest.name} in {bases}: {error.strerror}; what came "
                "is kept, make room and ask again"
            ) from error

    def _complete(self, manifest: Manifest, file: "_Unfinished", others: int) -> None:
        """All chunks of one file, over as many streams as it takes."""
        tries, seen = 0, time.monotonic()
        with file.opened():
            while not file.is_complete:
                before = file.good
                try:
                    with closing(_written(file, self._chunks(manifest, file))) as counts:
                        for done in counts:
                            self.progress(others + done, manifest.size)
                    raise Unreachable(f"{file.entry.path} ended early")
                except Unreachable as error:
                    if file.is_complete:
                        return
                    if file.good > before:
                        tries, seen = 0, time.monotonic()
                    tries += 1
                    self._rest(tries, seen, error)

    def _chunks(self, manifest: Manifest, file: "_Unfinished") -> Iterator[bytes]:
        """The chunks that one stream brings, in order, from the first that does not count yet."""
        at, rest = file.good, b""
        request = ReadFileRequest(digest=manifest.digest, path=file.entry.path, offset=at)
        for piece in self.caller.stream(
            "BaseModels/ReadFile", request, FilePiece, stall_s=self.stall_s
        ):
            if piece.offset != at + len(rest):
                raise Corrupt(
                    f"{file.entry.path}: asked for byte {at + len(rest)}, got {piece.offset}; the "
                    "coordinator is at fault"
                )
            rest = rest + piece.data if rest else piece.data
            while rest and len(rest) >= (size := file.chunk_at(at)):
                if not size:
                    raise Corrupt(f"{file.entry.path} goes on behind its {file.entry.size} bytes")
                chunk, rest = rest[:size], rest[size:]
                at += size
                yield chunk

    def _rest(self, tries: int, seen: float, error: Unreachable) -> None:
        """Wait before the next stream, unless too long went by without a chunk."""
        pause_s = self.jitter() * min(LONGEST_PAUSE_S, 0.05 * 2.0**tries)
        pause_s += error.retry_after_s or 0.0
        if time.monotonic() + pause_s - seen > self.patience_s:
            raise error
        logger.info("the download is cut (%s); it goes on in %.1f s", error, pause_s)
        if self.caller.wait(pause_s):
            raise error


class _Unfinished:
    """One file of a base model on its way: its good chunks, and the next one."""

    def __init__(self, folder: Path, entry: FileEntry, chunk_size: int) -> None:
        self.entry, self._chunk_size = entry, chunk_size
        self._path = folder / entry.path
        self._descriptor = -1
        self.good = 0  # bytes that count
        self._resume()

    @property
    def is_complete(self) -> bool:
        return self.good == self.entry.size

    def chunk_at(self, offset: int) -> int:
        """Bytes of the chunk that begins there; 0 at the end."""
        return min(self._chunk_size, self.entry.size - offset)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Ready for :meth:`add`; afterwards what counts is on the disk, and nothing else is."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        self._descriptor = descriptor
        try:
            os.ftruncate(descriptor, self.good)
            yield
        finally:
            os.ftruncate(descriptor, self.good)
            os.fsync(descriptor)
            os.close(descriptor)

    def add(self, chunk: bytes) -> int:
        """Write the next chunk down; the bytes that count then.

        Raises:
            Corrupt: it is not the manifest's.
            OSError: the disk refused; what counted still does.
        """
        self._require(chunk)
        done = 0
        while done < len(chunk):
            rest = memoryview(chunk)[done:]
            done += os.pwrite(self._descriptor, rest, self.good + done)
        self.good += done
        return self.good

    def _resume(self) -> None:
        """Count the good chunks of what an earlier download left."""
        if not self._path.is_file() or self._path.is_symlink():
            return
        with self._path.open("rb") as file:
            while (size := self.chunk_at(self.good)) and len(chunk := file.read(size)) == size:
                try:
                    self._require(chunk)
                except Corrupt:
                    return
                self.good += size

    def _require(self, chunk: bytes) -> None:
        number = self.good // self._chunk_size
        expected, found = self.entry.chunks[number], hashlib.sha256(chunk).hexdigest()
        if found != expected:
            raise Corrupt(
                f"{self.entry.path}: chunk {number} of {len(self.entry.chunks)} came with sha256 "
                f"{found[:12]}, the manifest says {expected[:12]}; it was dropped, the operator "
                "should check the coordinator's base models"
            )


def _written(file: _Unfinished, chunks: Iterator[bytes]) -> Generator[int]:
    """Hash and write in a thread of its own while the next chunks come; the bytes that count.

    A chunk that came before the stream broke is written too.
    """
    under_way: deque[Future[int]] = deque()
    with ThreadPoolExecutor(1) as writer:
        for chunk in chunks:
            under_way.append(writer.submit(file.add, chunk))
            if len(under_way) == AHEAD:
                yield under_way.popleft().result()
        yield from (done.result() for done in under_way)


def _whole(store: BaseStore, manifest: Manifest) -> BaseEntry | None:
    """The base in the home, unless it is missing or damaged."""
    try:
        folder = store.find(manifest.digest)
        verify(folder, read_manifest(folder))
    except (NotFound, Corrupt) as error:
        logger.debug("to be fetched: %s", error)
        return None
    return next(entry for entry in store.list() if entry.path == folder)


def _require_room(files: list[_Unfinished], folder: Path) -> None:
    missing = sum(file.entry.size - file.good for file in files)
    free = shutil.disk_usage(folder).free
    if free < missing:
        raise StorageFailed(
            f"{missing / 1e6:.0f} MB are to come and {folder.parent} has {free / 1e6:.0f} MB left; "
            "make room and ask again"
        )


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder)


@contextmanager
def _alone(lock: Path, caller: Caller) -> Iterator[None]:
    """One process at a time; the file is gone afterwards."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if _is_taken(descriptor) and _is_still(lock, descriptor):
            break
        os.close(descriptor)  # somebody else has it, or had it and deleted it
        if caller.wait(LOCK_EVERY_S):
            raise Unreachable("stopped while another process fetches the base model")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _is_taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(lock: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(lock.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
