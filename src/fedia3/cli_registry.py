"""``fedia3 registry``: what a registry holds, for who looks after it, on the machine it lies on."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fedia3.console import Json, out, print_json
from fedia3.errors import BadSetting, NotFound

if TYPE_CHECKING:
    from fedia3.coordinator.records import AdapterRecord, Owner
    from fedia3.coordinator.registry import Registry

registry_app = typer.Typer(
    help="Look after a registry: every published adapter, everyone's and each user's.\n\n"
    "Commands work on the files themselves, with the coordinator running or not; they are for "
    "whoever may read its folder.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

At = Annotated[
    Path,
    typer.Option(
        "--at",
        help="A coordinator's folder, one seed's folder of a run, or a registry's own.",
        envvar="FEDIA3_REGISTRY",
    ),
]
User = Annotated[
    str | None,
    typer.Option("--user", "-u", help="Whose adapters.", show_default="everyone's"),
]
Base = Annotated[
    str,
    typer.Option(
        "--base",
        help="Digest of the base model, or its beginning.",
        show_default="the only one there is",
    ),
]


@registry_app.command()
def owners(at: At = Path(), as_json: Json = False) -> None:
    """List whose adapters it holds."""
    with open_registry(at) as registry:
        found = list(_owners(registry))
    if as_json:
        print_json([{"kind": owner.kind, "name": owner.name} for owner in found])
        return
    for owner in found:
        out.print(escape(str(owner)))


@registry_app.command()
def versions(user: User = None, base: Base = "", at: At = Path(), as_json: Json = False) -> None:
    """List an owner's versions, newest first."""
    with open_registry(at) as registry:
        owner = owner_of(user)
        found = registry.versions(owner, registry.base_of(owner, base))
    if as_json:
        print_json([record_facts(record) for record in found])
        return
    for record in found:
        out.print(
            f"v{record.version:<4} {record.created_at:%Y-%m-%d %H:%M:%S}  round "
            f"{record.round_num:<4} {record.num_examples:>6} texts  {record.digest[:12]}"
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


def open_registry(at: Path) -> "Registry":
    """The registry in this folder, or in ``registry/`` below it; none is made.

    Raises:
        NotFound: there is none.
    """
    from fedia3.coordinator.registry import Registry  # noqa: PLC0415  # --help stays fast

    for folder in (at, at / "registry"):
        if (folder / "registry.db").is_file():
            return Registry.open(folder)
    raise NotFound(
        f"no registry in {at}: name a coordinator's folder, a run's seed-N folder or a folder "
        "with registry.db in it by --at"
    )


def owner_of(user: str | None) -> "Owner":
    """A user, or everyone where none is named."""
    from fedia3.coordinator.records import Owner  # noqa: PLC0415  # --help stays fast

    return Owner.everyone() if user is None else Owner.user(user)


def record_facts(record: "AdapterRecord") -> dict[str, Any]:
    """For JSON."""
    return {**vars(record), "owner": {"kind": record.owner.kind, "name": record.owner.name}}


def _seconds(text: str) -> float:
    """``90s``, ``30m``, ``1h`` or ``2d``."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None:
        raise BadSetting(f"--older-than is a number and s, m, h or d, such as 1h; got {text!r}")
    return int(match[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[match[2]]


def _owners(registry: "Registry") -> "list[Owner]":
    found = list(registry.owners("global"))
    after: str | None = None
    while page := registry.owners("user", after):
        found += page
        after = page[-1].name
    return found
