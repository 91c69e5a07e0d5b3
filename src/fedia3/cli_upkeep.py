"""``fedia3 registry``, what keeps it whole: verify, gc, backup, restore, erase."""

import re
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fedia3.cli_registry import (
    At,
    open_registry,
    owner_of,
    registry_app,
    registry_folder,
    registry_place,
)
from fedia3.console import Json, err, out, print_json
from fedia3.errors import BadInput, BadSetting, Corrupt, Fedia3Error

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedia3.adapters.schema import Schema


@registry_app.command()
def verify(at: At = Path(), as_json: Json = False) -> None:
    """Look whether everything is there and whole; leaves with 6 where something is not.

    Reads the database and every adapter's bytes, beside a coordinator at work. Bytes without a
    version are told and no fault: a publish that was cut short leaves them, `gc` collects them.
    """
    from fedia3.coordinator.inspection import inspect  # noqa: PLC0415  # --help stays fast

    with open_registry(at) as registry, err.status("looking at the database") as shown:
        found = inspect(
            registry, _schemas(at), lambda versions: shown.update(f"{versions:,} versions")
        )
    if as_json:
        print_json(vars(found))
    else:
        for fault in found.named:
            out.print(escape(fault), soft_wrap=True)
        if found.faults > len(found.named):
            out.print(f"… and {found.faults - len(found.named)} more")
        out.print(
            f"{found.versions} versions, {found.blob_bytes / 1000:,.1f} kB, {found.decoded} decoded"
            f" for their base model; {found.orphans} blobs without a version; {found.faults} faults"
        )
    if found.faults:
        raise Corrupt(
            f"{found.faults} faults in this registry; restore what they name from a backup"
        )


@registry_app.command()
def backup(
    destination: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    at: At = Path(),
    as_json: Json = False,
) -> None:
    """Copy everything to another place, beside a coordinator at work.

    The folder is a backup once manifest.json is in it; without it, it is unfinished.
    """
    from fedia3.coordinator.backup import back_up  # noqa: PLC0415  # --help stays fast

    with err.status("copying"):
        manifest = back_up(_file_registry(at), destination)
    if as_json:
        print_json(vars(manifest))
        return
    out.print(
        f"backed up {manifest.versions} versions, {manifest.bytes / 1000:,.1f} kB and the "
        f"database, to {escape(str(destination))}"
    )


@registry_app.command()
def restore(
    source: Annotated[Path, typer.Argument(help="A backup's folder.")],
    at: At = Path(),
    erasures: Annotated[
        Path | None,
        typer.Option(
            help="The registry that this one replaces, or a later backup: who was erased by then "
            "does not come back, nor do devices that were shut out."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a registry of a backup, whole or not at all; nothing may lie in its place.

    Move what is broken aside first, and name it with --erasures.
    """
    from fedia3.coordinator.backup import restore as restored  # noqa: PLC0415  # --help stays fast
    from fedia3.coordinator.config import FILE_NAME, read_config  # noqa: PLC0415  # as above

    folder = at / "registry" if (at / FILE_NAME).is_file() else at
    if (at / FILE_NAME).is_file() and read_config(at).database:
        raise BadSetting(
            f"the settings in {at} name a database; restore into a new folder and copy that into "
            "an empty one by `fedia3 registry copy`"
        )
    with err.status("restoring"):
        manifest = restored(source, folder, registry_folder(erasures) if erasures else None)
    if as_json:
        print_json(vars(manifest))
        return
    out.print(f"restored {manifest.made_at}'s backup to {escape(str(folder))}")
    if erasures is None:
        out.print("who was erased since then is back: erase them again, or restore with --erasures")


@registry_app.command()
def erase(
    user: Annotated[str, typer.Option("--user", "-u", help="Whom.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; for scripts.")] = False,
    at: At = Path(),
    as_json: Json = False,
) -> None:
    """Erase a user: their adapters, their devices' access, and every name of theirs.

    What rounds made of their updates stays in everyone's adapter; the receipt says in which.
    """
    from fedia3.coordinator.directory import open_directory  # noqa: PLC0415  # --help stays fast
    from fedia3.coordinator.erasure import erase_user  # noqa: PLC0415  # as above

    owner = owner_of(user)
    if not yes and typer.prompt(f"type the user's name to erase {owner}", err=True) != user:
        raise BadInput("another name was typed; nothing was erased")
    with open_registry(at) as registry, closing(open_directory(*registry_place(at))) as directory:
        receipt = erase_user(registry, directory, owner.name)
    if as_json:
        print_json(vars(receipt))
        return
    out.print(
        f"erased {receipt.versions} versions at {receipt.erased_at:%Y-%m-%d %H:%M:%S} UTC, "
        f"receipt {receipt.receipt}"
    )
    out.print(f"shut out {len(receipt.devices)} devices and forgot whose they were")
    if receipt.global_versions:
        listed = ", ".join(map(str, receipt.global_versions))
        out.print(
            f"stays: everyone's adapter holds their updates since version "
            f"{receipt.global_versions[0]} (they went into {listed}); rounds list them by their "
            "devices' ids, in a simulation's registry by the user's name"
        )
    if not receipt.traceless:
        out.print(
            "the database's files may go on holding the past: of registry.db the log was in use, "
            "erase once more; PostgreSQL lets go of it as it vacuums and uses its log again"
        )


@registry_app.command()
def gc(
    older_than: Annotated[
        str, typer.Option(help="Grace: younger bytes may belong to a publish under way; 90s, 1h.")
    ] = "1h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what there is.")] = False,
    at: At = Path(),
    as_json: Json = False,
) -> None:
    """Delete bytes that no version has, and what killed writers left; publishes may go on."""
    from fedia3.coordinator.janitor import collect  # noqa: PLC0415  # --help stays fast

    grace_s = _seconds(older_than)
    with open_registry(at) as registry:
        collected = collect(registry, grace_s, dry=dry_run)
    if as_json:
        print_json(vars(collected) | {"dry_run": dry_run})
        return
    verb = "would delete" if dry_run else "deleted"
    out.print(
        f"{verb} {collected.blobs} blobs without a version, {collected.blob_bytes / 1000:,.1f} kB, "
        f"and {collected.leftovers} files of killed writers"
    )


def _file_registry(at: Path) -> Path:
    """The folder of a registry whose rows lie in a file."""
    folder, database = registry_place(at)
    if database is not None:
        raise BadSetting(
            "this registry's rows are in PostgreSQL: back the database up with pg_dump, and then "
            f"copy {folder / 'blobs'}"
        )
    return folder


def _seconds(text: str) -> float:
    """``90s``, ``30m``, ``1h`` or ``2d``."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None:
        raise BadSetting(f"--older-than is a number and s, m, h or d, such as 1h; got {text!r}")
    return int(match[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[match[2]]


def _schemas(at: Path) -> "Callable[[str], Schema | None]":
    """The shape of a base model's adapters, by its digest; None where it is not on this machine."""
    from fedia3.adapters.base_store import BaseStore  # noqa: PLC0415  # --help stays fast
    from fedia3.adapters.manifest import read_manifest, schema  # noqa: PLC0415  # as above
    from fedia3.coordinator.config import FILE_NAME, read_config  # noqa: PLC0415  # as above

    bases = BaseStore()
    folders = {entry.digest: entry.path for entry in bases.list()}
    if (at / FILE_NAME).is_file():  # its base may be a folder that no store lists
        with suppress(Fedia3Error):
            folder = bases.find(read_config(at).coordinator.base)
            folders[read_manifest(folder).digest] = folder

    @cache
    def schema_of(base: str) -> "Schema | None":
        return schema(read_manifest(folders[base])) if base in folders else None

    return schema_of
