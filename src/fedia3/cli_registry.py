"""``fedia3 registry``: what a registry holds, for who looks after it, on the machine it lies on."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fedia3.console import Json, out, print_json
from fedia3.errors import NotFound

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
def copy(
    to: Annotated[
        str,
        typer.Option(
            help="An empty database, as postgresql://role@host/database.",
            envvar="FEDIA3_DATABASE_URL",
            show_envvar=True,
        ),
    ],
    at: At = Path(),
    as_json: Json = False,
) -> None:
    """Copy what registry.db holds into another database: versions, rounds, devices, tokens.

    Numbers stay as they are, and so do the adapters' bytes in blobs/. A coordinator has to be
    stopped; it uses the new database once its settings name it.
    """
    from fedia3.coordinator.setup import serving_alone  # noqa: PLC0415  # --help stays fast
    from fedia3.coordinator.stores import copy as copying  # noqa: PLC0415  # as above
    from fedia3.coordinator.stores.engine import Database  # noqa: PLC0415  # as above

    folder = _folder(at)
    is_coordinators = (folder.parent / "coordinator.toml").is_file()
    with serving_alone(folder.parent) if is_coordinators else nullcontext():
        rows = copying.copy(Database.url_of(folder / "registry.db"), to)
    if as_json:
        print_json({"rows": rows})
        return
    out.print(
        f"copied {rows} rows; keep {escape(str(folder / 'blobs'))} where it is", soft_wrap=True
    )


def open_registry(at: Path) -> "Registry":
    """The registry of the coordinator in this folder, or that lies in it or in ``registry/`` below.

    Raises:
        NotFound: there is none; none is made.
    """
    from fedia3.coordinator.config import read_config  # noqa: PLC0415  # --help stays fast
    from fedia3.coordinator.registry import Registry  # noqa: PLC0415  # as above

    if (at / "coordinator.toml").is_file() and (config := read_config(at)).database:
        return Registry.open(config.registry, config.database)
    return Registry.open(_folder(at))


def _folder(at: Path) -> Path:
    for folder in (at, at / "registry"):
        if (folder / "registry.db").is_file():
            return folder
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


def _owners(registry: "Registry") -> "list[Owner]":
    found = list(registry.owners("global"))
    after: str | None = None
    while page := registry.owners("user", after):
        found += page
        after = page[-1].name
    return found
