"""``fedia3 registry``: what a registry holds, for who looks after it, on the machine it lies on."""

from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fedia3.console import Json, out, print_json
from fedia3.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedia3.coordinator.records import AdapterRecord, AliasEvent, Owner
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


AliasName = Annotated[str, typer.Argument(help="Its name.")]
Expected = Annotated[
    int | None,
    typer.Option(
        "--expected",
        help="Only if nobody moved it since this revision; 0 for a new alias.",
        show_default="wherever it points",
    ),
]
Reason = Annotated[str, typer.Option(help="Why; kept in the alias's history.")]


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
            f"{'  yanked' if record.yanked else ''}"
        )


@registry_app.command()
def aliases(user: User = None, base: Base = "", at: At = Path(), as_json: Json = False) -> None:
    """List an owner's aliases and where they point."""
    with open_registry(at) as registry:
        owner = owner_of(user)
        found = registry.store.aliases(owner, registry.base_of(owner, base))
    _tell_moves(found, as_json)


@registry_app.command()
def history(
    alias: AliasName,
    user: User = None,
    on: Annotated[
        datetime | None,
        typer.Option(help="Only where it pointed then, UTC.", show_default="every move"),
    ] = None,
    base: Base = "",
    at: At = Path(),
    as_json: Json = False,
) -> None:
    """Tell where an alias pointed when, newest first, and who moved it."""
    with open_registry(at) as registry:
        owner = owner_of(user)
        base = registry.base_of(owner, base)
        if on is None:
            found = registry.store.alias_events(owner, base, alias)
        else:
            found = (registry.store.alias(owner, base, alias, on.replace(tzinfo=UTC)),)
    _tell_moves(found, as_json)


@registry_app.command()
def promote(
    alias: AliasName,
    version: Annotated[int, typer.Argument(help="Where it shall point; 0 drops it.")],
    user: User = None,
    expected: Expected = None,
    reason: Reason = "",
    base: Base = "",
    at: At = Path(),
    as_json: Json = False,
) -> None:
    """Point an alias, such as stable or canary, at a version."""
    from fedia3.coordinator.records import AliasMove  # noqa: PLC0415  # --help stays fast

    with open_registry(at) as registry:
        owner = owner_of(user)
        base = registry.base_of(owner, base)
        move = AliasMove(owner=owner, base=base, name=alias, version=version or None, reason=reason)
        moved = registry.promote(move, expected)
    _tell_moves([moved], as_json)


@registry_app.command()
def rollback(
    alias: AliasName,
    user: User = None,
    expected: Expected = None,
    reason: Reason = "",
    base: Base = "",
    at: At = Path(),
    as_json: Json = False,
) -> None:
    """Point an alias at the version where it pointed before. The history keeps both moves."""
    with open_registry(at) as registry:
        owner = owner_of(user)
        moved = registry.roll_back(
            owner, registry.base_of(owner, base), alias, expected_rev=expected, reason=reason
        )
    _tell_moves([moved], as_json)


@registry_app.command()
def yank(
    version: Annotated[int, typer.Argument(help="Its number.")],
    user: User = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take it back.")] = False,
    base: Base = "",
    at: At = Path(),
) -> None:
    """Let nobody be given a version who does not name it: the one before is the latest then.

    Rounds go on from what they trained last, yanked or not.
    """
    with open_registry(at) as registry:
        owner = owner_of(user)
        base = registry.base_of(owner, base)
        (registry.store.unyank if undo else registry.store.yank)(owner, base, version)
        out.print(f"the latest is v{registry.find(owner, base).version} now")


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


def record_facts(record: "AdapterRecord | AliasEvent") -> dict[str, Any]:
    """For JSON."""
    return {**vars(record), "owner": {"kind": record.owner.kind, "name": record.owner.name}}


def _tell_moves(moves: "Sequence[AliasEvent]", as_json: bool) -> None:
    if as_json:
        print_json([record_facts(move) for move in moves])
        return
    for move in moves:
        where = f"v{move.version}" if move.version else "dropped"
        said = f"  {move.reason}" if move.reason else ""
        out.print(
            f"{move.name:<12} {where:<8} rev {move.rev:<3} {move.at:%Y-%m-%d %H:%M:%S}  "
            f"{escape(move.actor)}{escape(said)}"
        )


def _owners(registry: "Registry") -> "list[Owner]":
    found = list(registry.owners("global"))
    after: str | None = None
    while page := registry.owners("user", after):
        found += page
        after = page[-1].name
    return found
