"""``fedia3 registry``: what a registry holds, for who looks after it, on the machine it lies on."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fedia3.console import Json, out, print_json
from fedia3.errors import BadAdapter, NotFound, WrongBaseModel

if TYPE_CHECKING:
    from fedia3.adapters.adapter import Adapter
    from fedia3.adapters.manifest import Manifest
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

VERSION_HELP = (
    "Whose, and which one: alice, alice@3, everyone@latest, or alice@5f0c21aa by the beginning of "
    "its digest."
)
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Base model on this machine: name, digest or folder.",
        show_default="the one that the versions are for",
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
def diff(
    left: Annotated[str, typer.Argument(help=VERSION_HELP)],
    right: Annotated[str, typer.Argument(help="What to compare it with, named alike.")],
    png: Annotated[Path | None, typer.Option(help="Draw heat maps into this file.")] = None,
    base: BaseModel = None,
    at: At = Path(),
    as_json: Json = False,
) -> None:
    """Tell how two versions differ, by layer and kind of scales.

    A user's version counts on the global version that it was trained on. The cosine is that of
    both versions' deltas to all-ones, which is the base model: 1 where they turn it the same way.

    [bold]fedia3 registry diff everyone@1 everyone@latest --png moved.png[/bold]
    """
    from fedia3.adapters.difference import differences, write_picture  # noqa: PLC0415  # as below

    with open_registry(at) as registry:
        versions = named_versions(registry, [left, right], base)
    found = differences(*versions.adapters)
    if png is not None:
        write_picture(found, png, *map(str, versions.records))
    if as_json:
        records = [record_facts(record) for record in versions.records]
        print_json({"from": records[0], "to": records[1], "differences": list(map(asdict, found))})
        return
    out.print(escape(f"from {versions.records[0]} to {versions.records[1]}"))
    width = max(len(each.layer) for each in found)
    out.print(f"{'layer':<{width}} kind  scales  L2 distance  largest change   cosine  moved > 1 %")
    for each in found:
        cosine = "–" if each.cosine is None else f"{each.cosine:.3f}"
        out.print(
            f"{each.layer:<{width}} {each.kind:<4} {each.num_scales:>7} {each.distance:>12.4f} "
            f"{each.largest:>15.4f} {cosine:>8} {100 * each.moved:>10.1f} %"
        )
    if png is not None:
        out.print(f"drawn in {escape(str(png))}")


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


@dataclass(frozen=True)
class Versions:
    """Versions of one base model, with their scales."""

    records: "tuple[AdapterRecord, ...]"
    adapters: "tuple[Adapter, ...]"
    base: "Manifest"
    folder: Path  # the base model's


def named_versions(registry: "Registry", names: list[str], base: str | None) -> Versions:
    """The versions that people named; ``base`` is a base model's name, digest or folder.

    Raises:
        BadInput: a name cannot be read.
        NotFound: there is no such version, or the base model is not on this machine.
        WrongBaseModel: the versions are for different base models.
        BadAdapter: same base model, other targets.
    """
    from fedia3.adapters.manifest import read_manifest, schema  # noqa: PLC0415  # as above
    from fedia3.coordinator.version_names import (  # noqa: PLC0415  # as above
        find_version,
        parse_version_name,
    )

    beginning = read_manifest(base_folder(base)).digest if base else ""
    records = []
    for name in map(parse_version_name, names):
        digest = registry.base_of(name.owner, beginning)
        records.append(find_version(registry, name, digest))
    for other in records[1:]:
        _require_same_kind(records[0], other)
    folder = base_folder(base or records[0].base)
    manifest = read_manifest(folder)
    adapters = tuple(registry.scales(record, schema(manifest)) for record in records)
    return Versions(tuple(records), adapters, manifest, folder)


def base_folder(wanted: str) -> Path:
    """The folder of a base model on this machine.

    Raises:
        NotFound: there is none; the message lists what there is.
    """
    from fedia3.adapters.base_store import BaseStore  # noqa: PLC0415  # --help stays fast

    try:
        return BaseStore().find(wanted)
    except NotFound as error:
        raise NotFound(f"{error}. Name the base model's folder with --base") from error


def _require_same_kind(one: "AdapterRecord", other: "AdapterRecord") -> None:
    if one.base != other.base:
        raise WrongBaseModel(
            f"{one} is for base model {one.base[:12]}, {other} for {other.base[:12]}; name "
            "versions of one base model, with --base where an owner has several"
        )
    if one.schema_digest != other.schema_digest:
        raise BadAdapter(f"{one} and {other} scale different targets of the same base model")


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
