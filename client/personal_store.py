"""The owner's own parts, kept on the device with the gate's decision; the last good one stays.

For each base model a folder, in it the files of the newest part and of the one before it, named by
their digest, what is known about each (``current.json``, ``last.json``), and what the coordinator
was given last (``shared.json``).
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.schema import Schema
from fedia3.errors import BadInput
from fedia3.private_files import write_private

CURRENT, LAST, SHARED = "current.json", "last.json", "shared.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judged:
    """A part's losses, in nats per learned token, and what the gate made of them."""

    choice: Literal["personal", "global"]  # what its owner is served
    global_loss: float  # on the validation split, which the choice rests on
    personal_loss: float
    num_examples: int  # trained on
    data_digest: str  # of the text it grew on
    made_ms: int  # ms since 1970
    test: Mapping[str, float] = field(default_factory=dict)  # of base, global, personal
    began_ms: int | None = None  # when its training began; None before fedia3 kept it


@dataclass(frozen=True)
class KeptPart:
    """A part in the store, without its bytes."""

    digest: str
    base_digest: str
    schema_digest: str
    global_digest: str  # of the global version that it is relative to
    judged: Judged
    shared_version: int | None = None  # in the coordinator's registry; None: it has not this one

    @classmethod
    def from_json(cls, data: bytes) -> "KeptPart":
        """What :meth:`to_json` wrote."""
        fields = json.loads(data)
        return cls(**{**fields, "judged": Judged(**fields["judged"])})

    def to_json(self) -> bytes:
        """As its file holds it."""
        return json.dumps(asdict(self), indent=1).encode()


@dataclass(frozen=True)
class Shared:
    """What the coordinator was given last."""

    digest: str
    version: int  # in its registry


@dataclass(frozen=True)
class Forgotten:
    """What was deleted, and what could not be."""

    deleted: int  # files
    left: tuple[Path, ...] = ()


def ones_digest(schema: Schema) -> str:
    """What names the global version of parts that grew before there was any: round 0's digest."""
    return encoding.digest(encoding.encode(Adapter.ones(schema)))


class PersonalStore:
    """The parts below ``folder``. One process writes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, part: PersonalAdapter, judged: Judged) -> KeptPart:
        """Make this the current part; the one before it stays as the last.

        Raises:
            BadAdapter: nobody could read it back.
            StorageFailed: the disk refused; the current part is as it was.
        """
        data = encoding.encode_personal(part)
        kept = KeptPart(
            digest=encoding.digest(data),
            base_digest=part.schema.base_digest,
            schema_digest=part.schema.digest,
            global_digest=part.global_digest,
            judged=judged,
        )
        folder = self._folder / kept.base_digest
        write_private(_file(folder, kept.digest), data)
        current = _read(folder / CURRENT)
        if current is not None and current.digest != kept.digest:
            write_private(folder / LAST, current.to_json())
        write_private(folder / CURRENT, kept.to_json())
        _drop_others(folder)
        return kept

    def current(self, schema: Schema) -> tuple[KeptPart, PersonalAdapter] | None:
        """The newest part of this base that can be read; None where there is none."""
        folder = self._folder / schema.base_digest
        for name in (CURRENT, LAST):
            kept = _read(folder / name)
            if kept is not None and (part := _part(folder, kept, schema)) is not None:
                shared = self.shared(schema.base_digest)
                if shared is not None and shared.digest == kept.digest:
                    kept = replace(kept, shared_version=shared.version)
                return kept, part
        return None

    def to_share(self, schema: Schema) -> PersonalAdapter | None:
        """What the coordinator has to be given so that it serves what the gate decided.

        The current part where it is served and not shared yet. Where the global is served again
        though a part was shared, zeros: on every global they are exactly the global.
        """
        if (found := self.current(schema)) is None:
            return None
        kept, part = found
        shared = self.shared(schema.base_digest)
        if kept.judged.choice == "global":
            if shared is None:
                return None
            part = replace(part, delta=np.zeros_like(part.delta))
        is_new = shared is None or shared.digest != _digest(part)
        return part if is_new else None

    def shared(self, base_digest: str) -> Shared | None:
        """What the coordinator was given last."""
        try:
            return Shared(**json.loads((self._folder / base_digest / SHARED).read_bytes()))
        except (OSError, ValueError, TypeError):  # to share twice does no harm
            return None

    def note_shared(self, part: PersonalAdapter, version: int) -> None:
        """Write down that the coordinator holds this part as ``version``."""
        facts = json.dumps(asdict(Shared(_digest(part), version)))
        write_private(self._folder / part.schema.base_digest / SHARED, facts.encode())

    def forget(self) -> Forgotten:
        """Delete every part and all that is known of them."""
        return delete_below(self._folder)


def delete_below(folder: Path) -> Forgotten:
    """Delete a folder and all in it; links are deleted, never followed.

    What a disk keeps of deleted files is beyond this: flash and snapshots cannot be overwritten.
    """
    deleted, left = 0, []
    for path in _bottom_up(folder):
        try:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
                deleted += 1
        except OSError:
            left.append(path)
    return Forgotten(deleted, tuple(left))


def _bottom_up(path: Path) -> Iterator[Path]:
    if path.is_dir() and not path.is_symlink():
        for inner in sorted(path.iterdir()):
            yield from _bottom_up(inner)
    if path.exists() or path.is_symlink():
        yield path


def _digest(part: PersonalAdapter) -> str:
    return encoding.digest(encoding.encode_personal(part))


def _file(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.safetensors"


def _read(path: Path) -> KeptPart | None:
    try:
        return KeptPart.from_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be read (%s); going without it", path, type(error).__name__)
        return None


def _part(folder: Path, kept: KeptPart, schema: Schema) -> PersonalAdapter | None:
    try:
        data = _file(folder, kept.digest).read_bytes()
        return encoding.decode_personal(data, schema, claimed_digest=kept.digest)
    except (OSError, BadInput) as error:
        logger.warning("part %s cannot be used: %s", kept.digest[:12], error)
        return None


def _drop_others(folder: Path) -> None:
    known = {kept.digest for name in (CURRENT, LAST) if (kept := _read(folder / name))}
    for path in folder.glob("*.safetensors"):
        if path.stem not in known:
            path.unlink(missing_ok=True)
