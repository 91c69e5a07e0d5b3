"""The base models on this machine: those that came with fedia3, and those imported into its home.

An import lies under ``bases/<digest>/`` in the home folder, so that one name can be imported
again, and adapters of the older base keep working.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedia3.adapters.manifest import Manifest, check_name, read_manifest, schema
from fedia3.errors import BadInput, Fedia3Error, NotFound

SHIPPED = Path(__file__).parent / "bases"
SHORTEST_PREFIX = 4  # hexadecimal digits; a shorter one would often be a name


@dataclass(frozen=True)
class BaseEntry:
    """One base model on this machine."""

    name: str
    digest: str
    path: Path
    size: int  # bytes on disk, the manifest left out
    architecture: str
    n_params: int  # length of its adapters
    shipped: bool


def default_home() -> Path:
    """``FEDIA3_HOME``, else this user's data folder as the system has it."""
    if home := os.environ.get("FEDIA3_HOME"):
        return Path(home)
    from platformdirs import user_data_path  # noqa: PLC0415 - only where nothing else was set

    return user_data_path("fedia3", appauthor=False)


class BaseStore:
    """Finds base models by name, digest or path, and imports new ones.

    Only :meth:`import_base` and :meth:`adopt` write; everything else works on a home that is
    missing or read-only.
    """

    def __init__(self, home: Path | None = None, shipped: Path = SHIPPED) -> None:
        self._bases = (home or default_home()) / "bases"
        self._shipped = shipped

    def list(self) -> tuple[BaseEntry, ...]:
        """Every base model, shipped ones first, then imports from oldest to newest."""
        return tuple(
            _entry(folder, shipped=root == self._shipped)
            for root in (self._shipped, self._bases)
            for folder in _base_folders(root)
        )

    def find(self, wanted: str | Path) -> Path:
        """The folder of the base that ``wanted`` means: a path, a name, or a digest's beginning.

        A name means its newest import, and an import comes before a shipped base of that name.

        Raises:
            NotFound: there is none; the message lists what there is.
            BadInput: a digest's beginning fits several.
        """
        if read := _folder_named(wanted):
            return read
        entries = self.list()
        if named := [entry for entry in entries if entry.name == str(wanted)]:
            return named[-1].path
        # The same base may be both shipped and imported: one digest, one answer.
        matches = {entry.digest: entry for entry in entries if _begins(entry.digest, str(wanted))}
        if len(matches) > 1:
            raise BadInput(f"{wanted!s} fits several base models: {_listed(matches.values())}")
        if not matches:
            raise NotFound(f"no base model {str(wanted)!r}; there are: {_listed(entries)}")
        return next(iter(matches.values())).path

    def import_base(
        self,
        source: str | Path,
        name: str,
        *,
        targets: Sequence[str] | None = None,
        feedforward: Sequence[str] | None = None,
        revision: str | None = None,
    ) -> BaseEntry:
        """Quantize ``source`` into the home; arguments and errors as ``base_model.quantize``.

        The finished folder appears under its digest at once or not at all.

        Raises:
            BadInput: the home cannot be written to.
        """
        check_name(name)
        from fedia3.adapters.base_model import quantize  # noqa: PLC0415 - torch only to import

        with tempfile.TemporaryDirectory(prefix=".import-", dir=self.writable_folder()) as work:
            made = Path(work) / "base"
            manifest = quantize(
                source, made, name=name, targets=targets, feedforward=feedforward, revision=revision
            )
            return _entry(self._place(made, manifest), shipped=False)

    def adopt(self, made: Path) -> BaseEntry:
        """Move a finished folder, made in :meth:`writable_folder`, to its place in the home.

        It appears there at once or not at all, in place of a damaged copy if there was one.

        Raises:
            BadInput: its manifest is malformed.
        """
        manifest = read_manifest(made)
        place = self._bases / manifest.digest
        replaced = made.with_name(f".replaced-{manifest.digest}")
        if place.exists():
            place.rename(replaced)
        made.rename(place)
        shutil.rmtree(replaced, ignore_errors=True)
        return _entry(place, shipped=False)

    def writable_folder(self) -> Path:
        """Where imports lie; a folder in it whose name begins with a dot is none yet.

        Raises:
            BadInput: it cannot be made or written to.
        """
        try:
            self._bases.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(_unwritable(self._bases)) from error
        if not os.access(self._bases, os.W_OK):
            raise BadInput(_unwritable(self._bases))
        return self._bases

    def _place(self, made: Path, manifest: Manifest) -> Path:
        place = self._bases / manifest.digest
        if place.exists():
            # The same bytes imported again: now its name's newest, and whole if it was damaged.
            place.rename(made.with_name("replaced"))
        return made.rename(place)


def _folder_named(wanted: str | Path) -> Path | None:
    """``wanted`` itself where it is a base model's folder; a bare name never is."""
    path = Path(wanted)
    is_path = isinstance(wanted, Path) or os.sep in wanted
    if not is_path:
        return None
    read_manifest(path)
    return path


def _base_folders(root: Path) -> Iterator[Path]:
    """Folders with a sound manifest, oldest first; half-made ones begin with a dot."""
    try:
        folders = [f for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")]
    except OSError:  # no home yet, or none that this user may read
        return
    for folder in sorted(folders, key=lambda f: (f.stat().st_mtime_ns, f.name)):
        try:
            read_manifest(folder)
        except (Fedia3Error, OSError):  # one damaged base hides itself, not the others
            continue
        yield folder


def _entry(folder: Path, *, shipped: bool) -> BaseEntry:
    manifest = read_manifest(folder)
    return BaseEntry(
        name=manifest.name,
        digest=manifest.digest,
        path=folder,
        size=manifest.size,
        architecture=manifest.created_from.architecture,
        n_params=schema(manifest).n_params,
        shipped=shipped,
    )


def _begins(digest: str, wanted: str) -> bool:
    return len(wanted) >= SHORTEST_PREFIX and digest.startswith(wanted)


def _listed(entries: Iterable[BaseEntry]) -> str:
    return ", ".join(f"{entry.name} ({entry.digest[:12]})" for entry in entries) or "none"


def _unwritable(bases: Path) -> str:
    return f"cannot write to {bases}; set FEDIA3_HOME to a folder of yours, or make it writable"
