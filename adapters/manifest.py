"""What a base model is made of: every file in hashed chunks, how it was quantized, its targets.

The manifest's sha256 is the base model's identity: adapters name it, and a device that holds the
digest can check every byte that it was sent, from whomever it came.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedia3.adapters.schema import Schema, Target
from fedia3.errors import BadInput, Corrupt, NotFound

MANIFEST_FILE = "fedia3.json"
CHUNK_SIZE = 1 << 20  # bytes
MAX_CHUNK = 16 << 20  # bytes; a device holds a few of a stranger's in memory

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
# Letters, digits and ._- only: such a path means the same on every system, and no part of it can
# be "..", a drive or a hidden separator.
_PATH = re.compile(r"(?!\.{1,2}(/|$))[\w.-]+(/(?!\.{1,2}(/|$))[\w.-]+)*", re.ASCII)


@dataclass(frozen=True)
class Quantization:
    """How the linear layers were stored (QLoRA: Dettmers et al., 2023, §3)."""

    method: str = "nf4"
    double_quant: bool = True
    block_size: int = 64  # weights that share one scale
    compute_dtype: str = "bfloat16"


@dataclass(frozen=True)
class Origin:
    """Where the weights come from: the transformers class and, from a hub, the exact commit."""

    architecture: str
    source: str | None = None  # hub id; None for a local folder, whose path means nothing elsewhere
    revision: str | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(value, str | None) for value in asdict(self).values()):
            raise BadInput(f"created_from holds text only, got {self}")


@dataclass(frozen=True)
class FileEntry:
    """One file: its path below the folder, its size in bytes, the sha256 (hex) of each chunk."""

    path: str
    size: int
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """A base model as a value.

    Raises:
        BadInput: a path leaves the folder, files are not sorted and unique, a file has another
            number of chunks than its size says, or a name or hash is malformed.
    """

    name: str
    created_from: Origin
    files: tuple[FileEntry, ...]  # sorted by path, without the manifest itself
    targets: tuple[Target, ...]  # what IA3 scales, in schema order
    quantization: Quantization = field(default_factory=Quantization)
    chunk_size: int = CHUNK_SIZE  # bytes; a file's last chunk is shorter
    license: str | None = None
    pretraining: str | None = None  # the file that names the users it was pretrained on

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.quantization != Quantization():
            raise BadInput(
                f"this version of fedia3 reads {Quantization()}, got {self.quantization}; update it"
            )
        if type(self.chunk_size) is not int or not 1 <= self.chunk_size <= MAX_CHUNK:
            raise BadInput(f"chunk_size is 1 to {MAX_CHUNK} bytes, got {self.chunk_size!r}")
        for entry in self.files:
            _check_entry(entry, self.chunk_size)
        paths = [entry.path for entry in self.files]
        if not paths or paths != sorted(set(paths)):
            raise BadInput("a manifest lists at least one file, sorted by path, none twice")
        if not isinstance(self.license, str | None):
            raise BadInput(f"license is text, got {self.license!r}")
        if self.pretraining is not None and self.pretraining not in paths:
            raise BadInput(f"pretraining names one of the files, got {self.pretraining!r}")

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the canonical bytes: the base model's identity."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, ASCII."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read :meth:`to_json`'s form, and no other.

        Raises:
            BadInput: not a manifest, or not in canonical form, where one base model could have
                several digests.
        """
        try:
            manifest = _from_fields(json.loads(text))
            canonical = manifest.to_json()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"not a base model's manifest: {error!r}") from error
        if canonical != text:
            raise BadInput(
                "the manifest is not in canonical form (known fields only, sorted keys, no "
                "spaces), so its digest is not its own; fetch it again or import the base anew"
            )
        return manifest


def schema(manifest: Manifest) -> Schema:
    """The shape of every adapter of this base model."""
    return Schema(base_digest=manifest.digest, targets=manifest.targets)


def manifest_of(
    folder: Path,
    *,
    name: str,
    created_from: Origin,
    targets: tuple[Target, ...],
    license: str | None = None,
    pretraining: str | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Manifest:
    """Hash every file in ``folder``, a manifest left there from before excepted.

    Raises:
        BadInput: the folder holds a link, or a file whose name a manifest cannot carry.
    """
    return Manifest(
        name=name,
        created_from=created_from,
        files=tuple(
            _entry_of(folder / path, path, chunk_size) for path in sorted(_paths_in(folder))
        ),
        targets=targets,
        chunk_size=chunk_size,
        license=license,
        pretraining=pretraining,
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest in ``folder``; the files beside it are not looked at, see :func:`verify`.

    Raises:
        NotFound: the folder holds no manifest.
        BadInput: the manifest is malformed.
    """
    try:
        text = (folder / MANIFEST_FILE).read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(
            f"no {MANIFEST_FILE} in {folder}, so it is not a fedia3 base model; if it is a "
            "transformers model, import it first"
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{folder / MANIFEST_FILE} is not text: {error}") from error
    return Manifest.from_json(text)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest beside the files it lists."""
    (folder / MANIFEST_FILE).write_bytes(manifest.to_json().encode())


def verify(folder: Path, manifest: Manifest) -> None:
    """Check that ``folder`` holds exactly the manifest's files, byte for byte.

    Raises:
        BadInput: the folder holds a link, or a file whose name no manifest carries.
        Corrupt: a file is missing, too many, of another size, or a chunk differs.
    """
    listed, found = {entry.path for entry in manifest.files}, set(_paths_in(folder))
    if listed != found:
        raise Corrupt(
            f"base model {manifest.name} in {folder} is not what its manifest lists: "
            f"missing {sorted(listed - found)}, extra {sorted(found - listed)}"
        )
    for entry in manifest.files:
        _verify_file(folder / entry.path, entry, manifest.chunk_size)


def check_name(name: str) -> None:
    """Raise BadInput unless ``name`` can name a base model everywhere, a folder included."""
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"a base model's name is up to 64 lower-case letters, digits, '.', '_' or '-', "
            f"got {name!r}"
        )


def _entry_of(file: Path, path: str, chunk_size: int) -> FileEntry:
    return FileEntry(path, file.stat().st_size, tuple(_hashes(file, chunk_size)))


def _verify_file(path: Path, entry: FileEntry, chunk_size: int) -> None:
    if path.stat().st_size != entry.size:
        raise Corrupt(
            f"{entry.path}: expected {entry.size} bytes, got {path.stat().st_size}; "
            "fetch the base model again"
        )
    for index, (found, expected) in enumerate(
        zip(_hashes(path, chunk_size), entry.chunks, strict=True)
    ):
        if found != expected:
            raise Corrupt(
                f"{entry.path}: chunk {index} of {len(entry.chunks)} has sha256 {found[:12]}, "
                f"expected {expected[:12]}; fetch the base model again"
            )


def _hashes(path: Path, chunk_size: int) -> Iterator[str]:
    with path.open("rb") as file:
        while chunk := file.read(chunk_size):
            yield hashlib.sha256(chunk).hexdigest()


def _paths_in(folder: Path) -> Iterator[str]:
    """Relative paths of all files below, the manifest excepted."""
    for path in folder.rglob("*"):
        relative = path.relative_to(folder).as_posix()
        # A link could point out of the folder, or elsewhere after it was checked.
        if path.is_symlink():
            raise BadInput(f"{relative} in {folder} is a symbolic link; a base model holds files")
        if path.is_file() and relative != MANIFEST_FILE:
            yield relative


def _check_entry(entry: FileEntry, chunk_size: int) -> None:
    if not _PATH.fullmatch(entry.path) or entry.path == MANIFEST_FILE:
        raise BadInput(
            f"a manifest's paths stay below its folder, with letters, digits and ._-/ only, "
            f"got {entry.path!r}"
        )
    if type(entry.size) is not int or entry.size < 0:
        raise BadInput(f"{entry.path}: a file has 0 bytes or more, got {entry.size!r}")
    if len(entry.chunks) != -(-entry.size // chunk_size):
        raise BadInput(
            f"{entry.path}: {entry.size} bytes make {-(-entry.size // chunk_size)} chunks of "
            f"{chunk_size}, got {len(entry.chunks)}"
        )
    if not all(_DIGEST.fullmatch(chunk) for chunk in entry.chunks):
        raise BadInput(f"{entry.path}: a chunk's sha256 is 64 hexadecimal digits")


def _from_fields(fields: dict[str, Any]) -> Manifest:
    targets = Schema.from_json(
        json.dumps({"base_digest": "", "targets": fields["targets"]})
    ).targets
    return Manifest(
        name=fields["name"],
        created_from=Origin(**fields["created_from"]),
        files=tuple(
            FileEntry(entry["path"], entry["size"], tuple(entry["chunks"]))
            for entry in fields["files"]
        ),
        targets=targets,
        quantization=Quantization(**fields["quantization"]),
        chunk_size=fields["chunk_size"],
        license=fields["license"],
        pretraining=fields["pretraining"],
    )
