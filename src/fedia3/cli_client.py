"""``fedia3 client``: a device that learns from its owner's text."""

import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fedia3.clock import wall_ms
from fedia3.console import Json, err, out, print_json
from fedia3.errors import NotFound, StorageFailed, Unreachable

if TYPE_CHECKING:
    from fedia3.client.device_status import DeviceStatus

client_app = typer.Typer(
    help="Learn on this device from its owner's text, which never leaves it.\n\n"
    "[bold]fedia3 client run --data ./texts[/bold]  learns alone at once,\n\n"
    "[bold]fedia3 client enroll HOST:PORT --ca ca.pem[/bold]  lets it take part in "
    "rounds,\n\n"
    "[bold]fedia3 client status[/bold]  says what it is doing.\n\n"
    "A device keeps everything in one folder: --state, or client in fedia3's home.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

State = Annotated[
    Path | None,
    typer.Option("--state", help="The device's folder.", show_default="client in fedia3's home"),
]


@client_app.command()
def enroll(
    address: Annotated[str, typer.Argument(help="HOST:PORT of the coordinator.")],
    code: Annotated[
        str | None,
        typer.Argument(help="From the coordinator's operator.", show_default="asked for"),
    ] = None,
    ca: Annotated[
        Path, typer.Option("--ca", help="ca.pem of the coordinator, from its operator.")
    ] = Path("ca.pem"),
    state: State = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What to call this device.", show_default="the host's name"),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make this device one of yours: it makes its keys and proves that it has them.

    The code comes from [bold]fedia3 coordinator invite[/bold], holds for ten minutes
    and for one device. Leave it out and it is asked for: so it stays out of the
    shell's history.
    """
    import platform  # noqa: PLC0415  # --help stays fast

    from fedia3.client.device import DeviceFolder  # noqa: PLC0415  # as above
    from fedia3.client.enrolment import enroll as run  # noqa: PLC0415  # as above

    folder = DeviceFolder(state)
    code = code or typer.prompt("code", hide_input=True, err=True)
    enrolled = run(address, code, _read_ca(ca), folder, name or platform.node() or "device")
    if as_json:
        print_json({"user": enrolled.user, "device_id": enrolled.device_id, "name": enrolled.name,
                    "state": folder.path, "base": enrolled.base_digest})  # fmt: skip
        return
    shown = f" --state {shlex.quote(str(state))}" if state else ""
    out.print(
        f"{escape(enrolled.name)} is a device of {escape(enrolled.user)} now "
        f"({enrolled.device_id[:8]}); next:\n"
        f"  fedia3 client run --data FILE_OR_FOLDER{escape(shown)}",
        soft_wrap=True,
    )


def _read_ca(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFound(
            f"cannot read {path} ({error.strerror}); get ca.pem from the coordinator's operator "
            "and name it with --ca"
        ) from error


@client_app.command()
def run(
    data: Annotated[
        Path,
        typer.Option(help="JSONL file or folder of the owner's text; rows as in `simulate`, "
                     "without a user column. It may grow."),
    ],
    state: State = None,
    base: Annotated[
        str, typer.Option(help="Name, digest or folder; until the coordinator's base is here.")
    ] = "tiny",
    share_personal: Annotated[
        bool, typer.Option("--share-personal", help="Publish the owner's own adapter.")
    ] = False,
    only_when_idle: Annotated[
        bool, typer.Option("--only-when-idle", help="Work while nobody uses the machine.")
    ] = False,
    on_ac_power: Annotated[
        bool, typer.Option("--on-ac-power", help="Do nothing on battery.")
    ] = False,
    quiet_hours: Annotated[
        str | None, typer.Option(help="Do nothing between these times, as 22:00-07:00.")
    ] = None,
    max_cpu: Annotated[
        int, typer.Option(min=1, max=100, help="Percent of all processors, at most.")
    ] = 100,
    max_bytes_a_day: Annotated[
        str | None, typer.Option(help="Over the network, both ways, as 50MB.")
    ] = None,
    check_every: Annotated[
        float, typer.Option(min=0, help="Seconds between questions whether there is a round.",
                            show_default="0: one waits at the coordinator")
    ] = 0,
    personal_every: Annotated[
        float, typer.Option(min=1, help="Seconds between two personalizations, at least.")
    ] = 60,
    order_field: Annotated[
        str | None, typer.Option(help="The column that orders the rows.", show_default="file order")
    ] = None,
    min_examples: Annotated[
        int, typer.Option(min=3, help="With fewer texts the device waits for more.")
    ] = 10,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Learn from the owner's text: alone at once, in rounds as soon as this device is enrolled.

    Lines that cannot be read are left out and counted. The text never leaves this
    device, and the own adapter only with [bold]--share-personal[/bold]. Ctrl-C ends it; so
    does SIGTERM.
    """
    from fedia3.client.agent import Agent, AgentSettings, serve  # noqa: PLC0415  # --help is fast
    from fedia3.client.conditions import (  # noqa: PLC0415  # as above
        Conditions,
        QuietHours,
        parse_bytes,
    )
    from fedia3.client.device import DeviceFolder  # noqa: PLC0415  # as above
    from fedia3.client.device_status import DeviceStatus, clock  # noqa: PLC0415  # as above
    from fedia3.client.splits import SplitPlan  # noqa: PLC0415  # as above

    os.umask(0o077)  # also of what Flower's processes write

    def tell(status: DeviceStatus) -> None:
        if as_json:
            print(json.dumps({"time_ms": status.written_ms, "line": status.line}), flush=True)
        else:
            err.print(escape(f"{clock(status.written_ms)} {status.line}"), soft_wrap=True)

    settings = AgentSettings(
        data=data.absolute(),
        base=str(Path(base).absolute()) if os.sep in base else base,
        order_field=order_field,
        split=SplitPlan(min_examples=min_examples),
        share_personal=share_personal,
        conditions=Conditions(
            only_when_idle=only_when_idle,
            on_ac_power=on_ac_power,
            quiet_hours=QuietHours.parse(quiet_hours) if quiet_hours else None,
            max_bytes_a_day=parse_bytes(max_bytes_a_day) if max_bytes_a_day else None,
        ),
        cpu_share=max_cpu / 100,
        check_every_s=check_every,
        personal_every_s=personal_every,
    )
    folder = DeviceFolder(state.absolute() if state else None)
    serve(Agent(settings, folder, told=tell))


@client_app.command()
def status(state: State = None, as_json: Json = False) -> None:
    """Say what this device is doing."""
    _tell_status(_read_status(state), as_json=as_json)


@client_app.command()
def pause(state: State = None, as_json: Json = False) -> None:
    """Do nothing until [bold]resume[/bold], also after a restart."""
    _wish(state, paused=True)
    _confirm("paused; `fedia3 client resume` goes on", {"paused": True}, as_json=as_json)


@client_app.command()
def resume(state: State = None, as_json: Json = False) -> None:
    """Go on after [bold]pause[/bold]."""
    _wish(state, paused=False)
    _confirm("goes on", {"paused": False}, as_json=as_json)


@client_app.command()
def personalize(
    state: State = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for it.")] = 600,
    as_json: Json = False,
) -> None:
    """Train the owner's own adapter now, on the newest global one."""
    running = _read_status(state)
    if not running.is_alive:
        raise NotFound(
            f"no client runs on {running.state_folder}; start it with `fedia3 client run --data "
            f"{shlex.quote(running.data)}`"
        )
    asked_ms = wall_ms()
    _wish(state, personalize_asked_ms=asked_ms)
    _tell_status(_wait_for(state, asked_ms, timeout), as_json=as_json)


@client_app.command()
def forget(
    state: State = None,
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="At the coordinator too; first of all there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete the owner's own adapters and the logs, and pause. The text stays where it is."""
    from fedia3.client.device import DeviceFolder  # noqa: PLC0415  # --help stays fast
    from fedia3.client.forgetting import forget as here  # noqa: PLC0415  # as above
    from fedia3.client.forgetting import forget_everywhere  # noqa: PLC0415  # as above

    folder = DeviceFolder(state)
    versions = forget_everywhere(folder) if everywhere else None
    forgotten = here(folder, wall_ms())
    facts = {"files": forgotten.deleted, "left": list(forgotten.left), "versions": versions}
    there = "" if versions is None else f" and {versions} versions at the coordinator"
    text = f"forgot {forgotten.deleted} files{there}; paused: `fedia3 client resume` learns anew"
    _confirm(text, facts, as_json=as_json)
    if forgotten.left:
        raise StorageFailed(f"could not delete {', '.join(map(str, forgotten.left))}")


def _read_status(state: Path | None) -> "DeviceStatus":
    from fedia3.client.device import DeviceFolder  # noqa: PLC0415  # --help stays fast
    from fedia3.client.device_status import DeviceStatus  # noqa: PLC0415  # as above

    folder = DeviceFolder(state)
    found = DeviceStatus.read(folder.status_file)
    if found is None:
        raise NotFound(
            f"no client ever ran on {folder.path}; start one with `fedia3 client run --data …`, or "
            "name its folder with --state"
        )
    return found


def _wish(state: Path | None, **changes: bool | int) -> None:
    from fedia3.client.device import DeviceFolder  # noqa: PLC0415  # --help stays fast
    from fedia3.client.device_status import Control  # noqa: PLC0415  # as above

    file = DeviceFolder(state).control_file
    replace(Control.read(file), **changes).write(file)  # type: ignore[arg-type]  # by name


def _wait_for(state: Path | None, asked_ms: int, timeout_s: float) -> "DeviceStatus":
    """The status once the own adapter is newer than ``asked_ms``."""
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        found = _read_status(state)
        if (found.personalized_ms or 0) >= asked_ms:
            return found
        if not found.is_alive:
            raise Unreachable("the client ended meanwhile; its logs say why")
        time.sleep(0.3)
    raise Unreachable(f"not done within {timeout_s:g} s: {_read_status(state).line}")


def _tell_status(found: "DeviceStatus", *, as_json: bool) -> None:
    line = found.line if found.is_alive else f"not running; last: {found.line}"
    if as_json:
        print_json({**asdict(found), "line": line, "is_running": found.is_alive})
        return
    out.print(escape(line), soft_wrap=True)
    for name, value in _facts(found):
        out.print(f"  {name:<12} {escape(value)}", soft_wrap=True)


def _facts(found: "DeviceStatus") -> Iterator[tuple[str, str]]:
    from fedia3.client.device_status import clock  # noqa: PLC0415  # --help stays fast

    skipped = f", {found.skipped} lines left out ({found.first_skipped})" if found.skipped else ""
    yield "text", f"{found.texts} texts in {found.data}{skipped}"
    if found.base:
        yield "base", found.base
    if found.coordinator:
        yield "device", f"{found.device_id} of {found.user}, at {found.coordinator.address}"
    if found.choice and found.personalized_ms:
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in found.losses.items())
        made = clock(found.personalized_ms)
        shared = f"shared as version {found.shared_version}" if found.shared_version else "unshared"
        yield "own adapter", f"served is {found.choice}; made at {made}; {shared}"
        yield "loss", f"{losses} (per token of text held out)"
        if found.global_version:
            yield "global", f"version {found.global_version}"
    if found.last_failure:
        yield "last error", f"{found.last_failure}; {found.state_folder}/logs/trainer.log says more"
    yield "network", f"{found.bytes_today / 1e6:.1f} MB today"
    yield "state", found.state_folder


def _confirm(text: str, facts: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        print_json(facts)
    else:
        out.print(escape(text), soft_wrap=True)
