"""A registry's backup: its database as it is at one moment, and the bytes that its versions name.

The database is copied first: bytes are there before the versions that name them, so whatever the
copy names can be copied after it. The manifest is written last, once everything is on the disk; a
folder without one is no backup. The database's digest stands in it, and the database holds the
digest of every blob.

A backup remembers users that were erased after it was made. Tombstones lie in the database, so the
registry that a restore replaces, or any later backup, still knows of them: `erasures` names it.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedia3.coordinator.blobs import FileBlobs
from fedia3.coordinator.directory import FORGOTTEN, Device, Directory, open_directory
from fedia3.coordinator.inspection import every_version, inspect
from fedia3.coordinator.registry import Registry
from fedia3.errors import BadInput, BadSetting, Corrupt, NotFound, StorageFailed
from fedia3.private_files import sync_folder, write_private

FORMAT = "fedia3.registry.backup.v1"
MANIFEST, DATABASE, BLOBS = "manifest.json", "registry.db", "blobs"


@dataclass(frozen=True)
class Manifest:
    """What a finished backup says of itself."""

    made_at: str  # UTC, ISO 8601
    database_sha256: str
    versions: int
    bytes: int  # of the versions' files
    format: str = FORMAT


def back_up(folder: Path, destination: Path) -> Manifest:
    """Copy the registry in ``folder``, which may be at work, into a new or empty place.

    Raises:
        BadSetting: something lies at the destination.
        Corrupt: a version's bytes are damaged or gone.
        StorageFailed: the disk refused; what is there by then has no manifest.
    """
    from fedia3.coordinator.stores.sql import SqlStore  # noqa: PLC0415 slow, unused in memory

    _require_empty(destination)
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    with Registry.open(folder) as running:
        with closing(SqlStore.at(folder / DATABASE)) as store:
            _made(destination)
            store.copy_to(destination / DATABASE)
        with Registry.open(destination) as copy:
            _copy_blobs(running, copy)
            _replay(folder, destination, copy)  # whoever was erased meanwhile
            found = inspect(copy)
    if found.faults:
        raise Corrupt(f"what was copied is not whole: {found.named[0]}; `verify` says more")
    manifest = Manifest(
        made_at=made_at,
        database_sha256=_sha256(destination / DATABASE),
        versions=found.versions,
        bytes=found.blob_bytes,
    )
    write_private(destination / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())
    return manifest


def restore(source: Path, folder: Path, erasures: Path | None = None) -> Manifest:
    """Make a registry of a backup, in a new or empty place; whole or not at all.

    ``erasures`` is the folder of a registry or of a later backup: whom it knows as erased, and
    whose devices it knows as shut out, does not come back.

    Raises:
        BadSetting: something lies in the place.
        NotFound: ``erasures`` holds no registry.
        BadInput: the source is no finished backup, or ``erasures`` belongs to another registry.
        Corrupt: the backup is damaged.
        StorageFailed: the disk refused; nothing was restored.
    """
    manifest = read_manifest(source)
    _require_empty(folder)
    if erasures is not None and not (erasures / DATABASE).is_file():
        raise NotFound(f"no {DATABASE} in {erasures}; name the folder of a registry or a backup")
    if _sha256(source / DATABASE) != manifest.database_sha256:
        raise Corrupt(f"{source / DATABASE} is not what was backed up; take another backup")
    aside = folder.parent / f".{folder.name}.restoring"
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a restore that was killed
        _made(aside)
        shutil.copyfile(source / DATABASE, aside / DATABASE)
        (aside / DATABASE).chmod(0o600)
        with Registry.open(aside) as restored:
            if erasures is not None:
                _replay(erasures, aside, restored)
            _copy_blobs(Registry(restored.store, _blobs_of(source)), restored)
            if named := inspect(restored).named:
                raise Corrupt(f"the backup in {source} is damaged: {named[0]}")
        aside.replace(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise StorageFailed(
            f"cannot restore into {folder}: {error.strerror}; make room or fix the folder"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def read_manifest(source: Path) -> Manifest:
    """What a backup says of itself.

    Raises:
        BadInput: it has no manifest, because it is unfinished or no backup, or a broken one.
    """
    try:
        fields: dict[str, Any] = json.loads((source / MANIFEST).read_bytes())
        manifest = Manifest(**fields)
    except OSError as error:
        raise BadInput(
            f"{source} is no finished backup: it has no {MANIFEST} ({error.strerror}), which is "
            "written last; take another"
        ) from error
    except (ValueError, TypeError) as error:
        raise BadInput(f"{source / MANIFEST} is no backup's manifest; take another") from error
    if manifest.format != FORMAT:
        raise BadInput(f"expected a backup of form {FORMAT}, got {manifest.format!r:.60}")
    return manifest


def _copy_blobs(source: Registry, target: Registry) -> None:
    """The bytes of every version that the target knows, as far as the source has them."""
    done = ""
    for record in every_version(target):
        if record.digest != done:
            with suppress(NotFound):  # erased since, or a fault that is found later
                target.blobs.put(source.blobs.get(record.digest))
        done = record.digest


def _replay(erasures: Path, folder: Path, registry: Registry) -> None:
    """Erase from the registry in ``folder`` whom the one in ``erasures`` knows as erased."""
    from fedia3.coordinator.stores.sql import SqlStore  # noqa: PLC0415 slow, unused in memory

    with (
        closing(SqlStore.at(erasures / DATABASE)) as theirs,
        closing(SqlStore.at(folder / DATABASE)) as ours,
    ):
        ours.replay_erasures(theirs, registry.blobs.delete)
    with closing(open_directory(erasures)) as known, closing(open_directory(folder)) as restored:
        for device in _devices(known):
            if device.revoked_ms is not None:
                _shut_out(restored, device, device.revoked_ms)


def _shut_out(directory: Directory, known: Device, revoked_ms: int) -> None:
    """A device is shut out; where nobody knows its user any more, its user's name goes too."""
    with suppress(NotFound):  # it was enrolled after the backup
        remembered = directory.revoke(known.device_id, revoked_ms)
        if known.user == FORGOTTEN != remembered.user:
            directory.forget_user(remembered.user, revoked_ms)


def _devices(directory: Directory) -> Iterator[Device]:
    last: str | None = None
    while page := directory.devices(last):
        yield from page
        last = page[-1].device_id


def _blobs_of(source: Path) -> FileBlobs:
    if not (source / BLOBS).is_dir():
        raise Corrupt(f"{source} has no {BLOBS}; take another backup")
    return FileBlobs(source / BLOBS)


def _require_empty(place: Path) -> None:
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise BadSetting(f"something lies in {place}; name a place that is new or empty")


def _made(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_folder(folder.parent)
    except OSError as error:
        raise BadSetting(
            f"cannot make {folder}: {error.strerror}; name a place you can write"
        ) from error


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Corrupt(f"cannot read {path}: {error.strerror}; take another backup") from error
