"""Last good adapters on the disk: checked whenever they are used, replaced whole, never by older.

For each base model and owner a folder with ``current`` (the signed record and the bytes as the
coordinator sent them, in one file, so that they cannot part) and ``floor``, the highest revision
ever kept, which outlives a damaged or deleted ``current``. What an alias points at has a folder of
its own.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from google.protobuf.message import DecodeError

from fedia3.client.records import (
    LATEST,
    AdapterVersion,
    TrustedKeys,
    Which,
    opened_version,
    require_asked_for,
    require_bytes,
)
from fedia3.errors import Corrupt, Fedia3Error
from fedia3.private_files import write_private
from fedia3.proto.adapters_pb2 import FetchResponse


@dataclass(frozen=True)
class Good:
    """A version whose signature, owner, base model, size and digest were checked, and its bytes."""

    version: AdapterVersion
    data: bytes


def checked(
    answer: FetchResponse,
    keys: TrustedKeys,
    user: str | None,
    base_digest: str,
    which: Which = LATEST,
    *,
    floor: int = 0,
) -> Good:
    """What an answer brings, once everything about it holds.

    Raises:
        BadSignature, WrongBaseModel, Corrupt: something does not.
    """
    version = opened_version(answer.record, keys)
    require_asked_for(version, user, base_digest, which, floor=floor)
    require_bytes(version, answer.data)
    return Good(version, answer.data)


class AdapterCache:
    """What every owner's aliases pointed at last, ``latest`` among them, below ``folder``."""

    def __init__(self, folder: Path, keys: TrustedKeys) -> None:
        self._folder, self._keys = folder, keys

    def load(self, user: str | None, base_digest: str, alias: str = LATEST) -> Good | None:
        """The last good version, checked anew; None where there is none.

        Raises:
            BadSignature, WrongBaseModel, Corrupt: what lies there is not what was kept.
        """
        place = self._place(user, base_digest, alias)
        try:
            answer = FetchResponse.FromString((place / "current").read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, DecodeError) as error:
            raise Corrupt(
                f"{place / 'current'} cannot be read ({error}); fetch it again"
            ) from error
        return checked(answer, self._keys, user, base_digest, alias, floor=_floor(place))

    def floor(self, user: str | None, base_digest: str, alias: str = LATEST) -> int:
        """The highest revision ever kept; no lower one is taken for what is served now."""
        return _floor(self._place(user, base_digest, alias))

    def keep(
        self, answer: FetchResponse, user: str | None, base_digest: str, alias: str = LATEST
    ) -> Good:
        """Make an answer the last good version.

        Raises:
            BadSignature, WrongBaseModel, Corrupt: it is not sound, or older than what was here.
            StorageFailed: the disk refused; the last good version is as it was.
        """
        place = self._place(user, base_digest, alias)
        with _locked(place):
            floor = max(_floor(place), self._kept_revision(user, base_digest, alias))
            good = checked(answer, self._keys, user, base_digest, alias, floor=floor)
            write_private(place / "current", answer.SerializeToString())
            write_private(place / "floor", str(good.version.revision).encode())
        return good

    def forget_alias(self, user: str | None, base_digest: str, alias: str) -> None:
        """Delete what an alias pointed at; its floor stays."""
        place = self._place(user, base_digest, alias)
        if place.exists():
            with _locked(place):
                (place / "current").unlink(missing_ok=True)

    def forget(self, user: str | None, base_digest: str) -> None:
        """Delete the bytes, those of aliases too; the floors stay."""
        newest = self._place(user, base_digest)
        for place in newest.parent.glob(f"{newest.name}*"):
            with _locked(place):
                (place / "current").unlink(missing_ok=True)

    def forget_user(self, user: str) -> None:
        """Delete a user's bytes on every base model."""
        for base in self._folder.iterdir() if self._folder.exists() else ():
            self.forget(user, base.name)

    def _kept_revision(self, user: str | None, base_digest: str, alias: str) -> int:
        """What a crash between the two files leaves ahead of the floor."""
        try:
            kept = self.load(user, base_digest, alias)
        except Fedia3Error:
            return 0
        return kept.version.revision if kept else 0

    def _place(self, user: str | None, base_digest: str, alias: str = LATEST) -> Path:
        """A name may hold anything, so a folder is named by its sha256; an alias may not."""
        name = "everyone" if user is None else sha256(user.encode()).hexdigest()
        return self._folder / base_digest / (name if alias == LATEST else f"{name}@{alias}")


def _floor(place: Path) -> int:
    try:
        return int((place / "floor").read_bytes())
    except (FileNotFoundError, ValueError):
        return 0


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One writer at a time, of all processes: or an older answer could land behind a newer one."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(place / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
