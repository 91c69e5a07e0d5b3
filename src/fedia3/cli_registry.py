"""``fedia3 registry``: what a registry holds, for who looks after it, on the machine it lies on."""

import json
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fedia3.console import Json, out, print_json
from fedia3.errors import BadAdapter, BadSetting, NotFound, WrongBaseModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedia3.adapters.adapter import Adapter
    from fedia3.adapters.dial import Alpha
    from fedia3.adapters.manifest import Manifest
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

VERSION_HELP = (
    "Whose, and which one: alice, alice@3, everyone@stable by an alias, or alice@5f0c21aa by the "
    "beginning of its digest."
)
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Base model on this machine: name, digest or folder.",
        show_default="the one that the versions are for",
    ),
]
# Notes in a PEFT folder's metadata:
COMPOSED = "fedia3.composed"  # what it was made of
TRAINED_ON = "fedia3.global"  # digest of the global version that a user's own was trained on


class Operation(StrEnum):
    """How several adapters become one."""

    product = "product"
    sum = "sum"
    interpolate = "interpolate"


class Space(StrEnum):
    """Where the way between two adapters is straight."""

    vector = "vector"
    log = "log"


class Dtype(StrEnum):
    """How a merged model's weights are written."""

    bfloat16 = "bfloat16"
    float16 = "float16"


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

    folder = registry_folder(at)
    is_coordinators = (folder.parent / "coordinator.toml").is_file()
    with serving_alone(folder.parent) if is_coordinators else nullcontext():
        rows = copying.copy(Database.url_of(folder / "registry.db"), to)
    if as_json:
        print_json({"rows": rows})
        return
    out.print(
        f"copied {rows} rows; keep {escape(str(folder / 'blobs'))} where it is", soft_wrap=True
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
    from fedia3.adapters.difference import differences, write_picture  # noqa: PLC0415  # fast --help

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


@registry_app.command()
def compose(
    names: Annotated[list[str], typer.Argument(metavar="VERSION...", help=VERSION_HELP)],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    operation: Annotated[
        Operation,
        typer.Option(
            "--op",
            help="product: ∏ g_i. sum: 1 + Σ w_i (g_i − 1). interpolate: from the first (alpha 0) "
            "to the second (alpha 1).",
        ),
    ],
    alpha: Annotated[
        list[str] | None,
        typer.Option(
            help="interpolate: how far; sum: a weight w_i, given once for each version. A number, "
            "or k=1,v=0.5,ff=0 by kind, or layer:0-3=1,layer:4-7=0.2 by layer.",
            show_default="0.5 for interpolate, 1 for each of a sum",
        ),
    ] = None,
    space: Annotated[
        Space,
        typer.Option(help="interpolate: (1−α) a + α b, or in log space a^(1−α) b^α, which is "
                     "defined only for positive scales."),
    ] = Space.vector,
    base: BaseModel = None,
    at: At = Path(),
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make one adapter of several versions and write it as a PEFT folder.

    A user's version counts on the global version that it was trained on. The folder's metadata
    name the versions' digests; [bold]fedia3 registry import[/bold] publishes it.

    [bold]fedia3 registry compose everyone alice --op interpolate --alpha 0.5 --out half[/bold]
    """
    from fedia3.adapters.dial import parse_alpha  # noqa: PLC0415  # --help stays fast
    from fedia3.adapters.peft_folder import write_peft_folder_for  # noqa: PLC0415  # as above

    alphas = [parse_alpha(text) for text in alpha or ()]
    with open_registry(at) as registry:
        versions = named_versions(registry, names, base)
    adapter = _composed(versions.adapters, operation, alphas, space)
    made = {
        "op": operation.value,
        "of": [record.digest for record in versions.records],
        "alpha": [str(each) for each in alphas],
        "space": space.value,
    }
    write_peft_folder_for(
        versions.base,
        adapter,
        out_folder,
        base_name=str(versions.folder),
        notes={COMPOSED: json.dumps(made)},
    )
    if as_json:
        print_json({"folder": str(out_folder), **made})
        return
    listed = ", ".join(str(record) for record in versions.records)
    out.print(f"{operation.value} of {escape(listed)}")
    out.print(f"written to {escape(str(out_folder))}")


@registry_app.command()
def export(
    version: Annotated[str, typer.Argument(help=VERSION_HELP)],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    merged: Annotated[
        bool,
        typer.Option(
            "--merged", help="A whole model with the scales in its weights, for plain transformers."
        ),
    ] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of a merged model's weights.", show_default="bfloat16"),
    ] = None,
    base: BaseModel = None,
    at: At = Path(),
    as_json: Json = False,
) -> None:
    """Write a version as a PEFT folder, or merged into its base model.

    A user's version counts on the global version that it was trained on.
    """
    if dtype is not None and not merged:
        raise BadSetting("--dtype is for --merged; a PEFT folder's scales are float32")
    with open_registry(at) as registry:
        versions = named_versions(registry, [version], base)
    (record,), (adapter,) = versions.records, versions.adapters
    if merged:
        from fedia3.adapters.merge import write_merged_folder  # noqa: PLC0415  # torch: seconds

        chosen = dtype or Dtype.bfloat16
        write_merged_folder(adapter, versions.folder, out_folder, chosen.value)
    else:
        from fedia3.adapters.peft_folder import write_peft_folder_for  # noqa: PLC0415  # as above

        trained_on = {TRAINED_ON: record.global_digest} if record.global_digest else {}
        write_peft_folder_for(
            versions.base,
            adapter,
            out_folder,
            base_name=str(versions.folder),
            notes=trained_on,
        )
    if as_json:
        print_json({"folder": str(out_folder), "merged": merged, "version": record_facts(record)})
        return
    out.print(escape(f"{record} written to {out_folder}"))


@registry_app.command("import")
def import_folder(
    folder: Annotated[Path, typer.Argument(help="PEFT folder of an IA3 adapter.")],
    user: Annotated[
        str | None,
        typer.Option("--user", "-u", help="Publish it as this user's own.", show_default=False),
    ] = None,
    everyone: Annotated[
        bool,
        typer.Option(
            "--global", help="Publish it as everyone's; rounds go on from their own state."
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="Base model on this machine that it is for: name, digest or folder.",
            show_default="the one of everyone's versions",
        ),
    ] = None,
    at: At = Path(),
    as_json: Json = False,
) -> None:
    """Publish a PEFT folder as a new version.

    A user's own is kept relative to the global version that it was exported with, so that it is
    exported as the same bytes again; any other folder relative to everyone's latest version.
    """
    if everyone == (user is not None):
        raise BadSetting("say whose it is: --user NAME or --global, one of them")
    from fedia3.adapters.manifest import read_manifest, schema  # noqa: PLC0415  # --help stays fast
    from fedia3.adapters.peft_folder import (  # noqa: PLC0415  # as above
        peft_notes,
        read_peft_folder,
    )

    with open_registry(at) as registry:
        wanted = base or registry.base_of(owner_of(None))
        adapter = read_peft_folder(folder, schema(read_manifest(base_folder(wanted))))
        if user is None:
            record = registry.publish_global(adapter)
        else:
            record = _published(registry, user, adapter, peft_notes(folder).get(TRAINED_ON))
        differs = registry.scales(record, adapter.schema) != adapter
    if as_json:
        print_json({"version": record_facts(record), "exact": not differs})
        return
    out.print(escape(f"published {record}, {record.digest[:12]}"))
    if differs:
        out.print("some scales are far from everyone's and were rounded in their last place")


def open_registry(at: Path) -> "Registry":
    """The registry of the coordinator in this folder, or that lies in it or in ``registry/`` below.

    Raises:
        NotFound: there is none; none is made.
    """
    from fedia3.coordinator.registry import Registry  # noqa: PLC0415  # --help stays fast

    return Registry.open(*registry_place(at))


def registry_place(at: Path) -> tuple[Path, str | None]:
    """The registry's folder, and its database's URL where that is not ``registry.db`` in it.

    Raises:
        NotFound: there is none.
    """
    from fedia3.coordinator.config import FILE_NAME, read_config  # noqa: PLC0415  # as above

    if (at / FILE_NAME).is_file() and (config := read_config(at)).database:
        return config.registry, config.database
    return registry_folder(at), None


def registry_folder(at: Path) -> Path:
    """This folder, or ``registry/`` below it: where ``registry.db`` lies.

    Raises:
        NotFound: there is none.
    """
    for folder in (at, at / "registry"):
        if (folder / "registry.db").is_file():
            return folder
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
    from fedia3.adapters.manifest import read_manifest, schema  # noqa: PLC0415  # --help stays fast
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


def _composed(
    adapters: "tuple[Adapter, ...]", operation: Operation, alphas: "list[Alpha]", space: Space
) -> "Adapter":
    from fedia3.adapters.arithmetic import (  # noqa: PLC0415  # --help stays fast
        interpolate,
        product,
        sum_of_deltas,
    )

    if space is not Space.vector and operation is not Operation.interpolate:
        raise BadSetting("--space is for --op interpolate")
    if operation is Operation.product:
        if alphas:
            raise BadSetting("a product takes no --alpha; interpolate or sum instead")
        return product(adapters)
    if operation is Operation.sum:
        return sum_of_deltas(adapters, alphas or [1.0] * len(adapters))
    if len(adapters) != 2 or len(alphas) > 1:
        raise BadSetting(
            f"interpolate goes from one version to another by one --alpha, got {len(adapters)} "
            f"versions and {len(alphas)} of it"
        )
    return interpolate(*adapters, alphas[0] if alphas else 0.5, space.value)


def _published(
    registry: "Registry", user: str, adapter: "Adapter", trained_on: str | None
) -> "AdapterRecord":
    """The adapter as a user's new version, on that global version or else the latest."""
    from fedia3.adapters.adapter import PersonalAdapter  # noqa: PLC0415  # --help stays fast
    from fedia3.adapters.arithmetic import relative_to  # noqa: PLC0415  # as above

    schema = adapter.schema
    everyone, global_adapter = registry.global_adapter(schema)
    if trained_on is not None:
        with suppress(NotFound):  # it comes from another registry
            everyone = registry.store.find_digest(owner_of(None), schema.base_digest, trained_on)
            global_adapter = registry.scales(everyone, schema)
    own = PersonalAdapter(schema, relative_to(adapter, global_adapter), everyone.digest)
    return registry.publish_personal(user, own, num_examples=0)


def _owners(registry: "Registry") -> "list[Owner]":
    found = list(registry.owners("global"))
    after: str | None = None
    while page := registry.owners("user", after):
        found += page
        after = page[-1].name
    return found
