"""``fedia3 coordinator``: set a coordinator up, run it, look after it."""

import shlex
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fedia3.console import Json, err, out, print_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedia3.coordinator.operator import CoordinatorStatus, DeviceState, Operator

coordinator_app = typer.Typer(
    help="Run a federation: hand out the base model, run rounds, keep everybody's adapters.\n\n"
    "[bold]fedia3 coordinator init ./federation --host fl.example.org[/bold]  makes one,\n\n"
    "[bold]fedia3 coordinator serve --config ./federation[/bold]  runs it,\n\n"
    "[bold]fedia3 coordinator invite --user alice[/bold]  lets a device in.\n\n"
    "Commands that speak to a running coordinator read operator.json beside its settings: give "
    "--config, or set FEDIA3_COORDINATOR_CONFIG.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="coordinator.toml, or the folder that holds it.",
        show_default="$FEDIA3_COORDINATOR_CONFIG, else ./coordinator.toml",
    ),
]
OperatorFile = Annotated[
    Path | None,
    typer.Option(
        "--operator",
        help="operator.json, where it lies elsewhere, as on another machine.",
        show_default="beside the settings",
    ),
]


@coordinator_app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(help="Where everything of the coordinator will lie.")
    ] = Path("federation"),
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or address that devices reach this machine by; repeat it. The first is "
            "handed out.",
            show_default="localhost: devices on this machine only",
        ),
    ] = None,
    base: Annotated[
        str, typer.Option(help="Base model: name, digest or folder; see `fedia3 base list`.")
    ] = "tiny",
    bind: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on.",
            show_default="0.0.0.0; 127.0.0.1 where the only host is localhost",
        ),
    ] = None,
    grpc_port: Annotated[int, typer.Option(help="The services; devices reach it.")] = 8443,
    fleet_port: Annotated[int, typer.Option(help="The rounds; devices reach it.")] = 8444,
    superlink_port: Annotated[int, typer.Option(help="Flower, on 127.0.0.1 only.")] = 8441,
    force: Annotated[
        bool,
        typer.Option("--force", help="Begin anew; what is there is moved into a folder inside."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a coordinator: settings, certificates, keys, database, the operator's file.

    Everything lies in one folder that only its owner can read. Nothing is started.
    """
    from fedia3.coordinator.setup import Setting, set_up  # noqa: PLC0415  # --help stays fast

    hosts = host or ["localhost"]
    is_local = set(hosts) <= {"localhost", "127.0.0.1", "::1"}
    setting = Setting(
        hosts=hosts,
        base=base,
        bind=bind or ("127.0.0.1" if is_local else "0.0.0.0"),
        grpc_port=grpc_port,
        fleet_port=fleet_port,
        superlink_port=superlink_port,
    )
    config = set_up(folder, setting, datetime.now(UTC), force=force)
    next_command = f"fedia3 coordinator serve --config {shlex.quote(str(folder))}"
    invite_command = f"fedia3 coordinator invite --config {shlex.quote(str(folder))} --user NAME"
    if as_json:
        print_json(
            {
                "folder": config.folder,
                "config": config.file,
                "address": config.address,
                "fleet_address": config.fleet_address,
                "ca": config.ca,
                "operator": config.operator,
                "base": config.coordinator.base,
                "next": next_command,
            }
        )
        return
    out.print(f"a coordinator for {escape(config.address)} in {escape(str(folder))}")
    out.print("  coordinator.toml  its settings: rounds, devices in each, training")
    out.print("  ca.pem            devices need it to enrol; it is no secret")
    out.print("  operator.json     speaks for you to the coordinator; keep it to yourself")
    if is_local:
        out.print("only this machine can reach it; give --host NAME for devices elsewhere")
    out.print(f"next:\n  {escape(next_command)}", soft_wrap=True)
    out.print("and while it runs, from another shell, for each device:")
    out.print(f"  {escape(invite_command)}", soft_wrap=True)


@coordinator_app.command()
def serve(config: Config = None) -> None:
    """Run everything: services, rounds, Flower behind its own door.

    What dies is started again. What happens is told on stderr, a line each: time,
    part, message. Each part's own output is in logs/ beside the settings.
    Ctrl-C or SIGTERM stops it: what is under way has ten seconds.
    """
    from fedia3.coordinator.config import config_path, read_config  # noqa: PLC0415  # as above
    from fedia3.coordinator.parts import log_to_stderr  # noqa: PLC0415  # as above
    from fedia3.coordinator.serve import serve as run  # noqa: PLC0415  # as above

    settings = read_config(config_path(config))
    log_to_stderr("serve")
    run(settings)


@coordinator_app.command()
def status(config: Config = None, operator: OperatorFile = None, as_json: Json = False) -> None:
    """Say how the coordinator is: rounds, devices, parts."""
    with _operator(config, operator) as admin:
        answer = admin.status()
    if as_json:
        print_json(asdict(answer))
    else:
        _tell_status(answer)


@coordinator_app.command()
def pause(config: Config = None, operator: OperatorFile = None, as_json: Json = False) -> None:
    """Start no more rounds; the one under way ends."""
    with _operator(config, operator) as admin:
        admin.pause()
    _say(
        "no more rounds are started; `fedia3 coordinator resume` starts them", as_json, paused=True
    )


@coordinator_app.command()
def resume(config: Config = None, operator: OperatorFile = None, as_json: Json = False) -> None:
    """Start rounds again."""
    with _operator(config, operator) as admin:
        admin.resume()
    _say("rounds are started again", as_json, paused=False)


@coordinator_app.command("run-now")
def run_now(config: Config = None, operator: OperatorFile = None, as_json: Json = False) -> None:
    """Run one round as soon as enough devices are online, also while paused."""
    with _operator(config, operator) as admin:
        admin.run_now()
    _say(
        "a round runs as soon as enough devices are online; `fedia3 coordinator status` says how "
        "far it is",
        as_json,
        requested=True,
    )


@coordinator_app.command()
def devices(config: Config = None, operator: OperatorFile = None, as_json: Json = False) -> None:
    """List the devices, revoked ones too, in the order they enrolled."""
    with _operator(config, operator) as admin:
        found = list(admin.devices())
    if as_json:
        print_json([asdict(device) for device in found])
        return
    for device in found:
        out.print(_device_line(device), soft_wrap=True)
    if not found:
        out.print("no device is enrolled; `fedia3 coordinator invite --user NAME` lets one in")


@coordinator_app.command()
def revoke(
    device: Annotated[str, typer.Argument(help="The device's id, or its beginning.")],
    config: Config = None,
    operator: OperatorFile = None,
    as_json: Json = False,
) -> None:
    """Shut a device out for good: its token, its place in rounds, its connection."""
    with _operator(config, operator) as admin:
        device_id = _whole_id(device, admin)
        admin.revoke(device_id)
    _say(f"device {device_id} is out; what it published stays", as_json, device_id=device_id)


@coordinator_app.command()
def invite(
    user: Annotated[str, typer.Option("--user", "-u", help="Whose device it will be.")],
    config: Config = None,
    operator: OperatorFile = None,
    as_json: Json = False,
) -> None:
    """Make a code with which one device of a user may enrol, once, within ten minutes."""
    with _operator(config, operator) as admin:
        code, address = admin.invite(user), admin.address
    if as_json:
        print_json(asdict(code) | {"address": address})
        return
    out.print(
        f"[bold]{code.code}[/]  for one device of {escape(user)}, until {_time(code.expires_ms)}",
        soft_wrap=True,
    )
    out.print("give it to its owner with ca.pem; on the device:")
    out.print(f"  fedia3 client enroll {escape(address)} {code.code} --ca ca.pem", soft_wrap=True)


@coordinator_app.command()
def token(
    name: Annotated[str, typer.Option(help="What it is for, in the log.")],
    days: Annotated[int, typer.Option(help="How long it is good, 1 to 366.")] = 90,
    config: Config = None,
    operator: OperatorFile = None,
    as_json: Json = False,
) -> None:
    """Make a token for a service that reads everybody's adapters, such as one that answers them.

    It is shown once; the coordinator keeps only its sha256.
    """
    with _operator(config, operator) as admin:
        issued, address = admin.issue_service_token(name, days), admin.address
    if as_json:
        print_json(asdict(issued) | {"address": address})
        return
    print(issued.token)
    err.print(
        f"good until {_time(issued.expires_ms)}; keep it in a file that only the service reads:"
    )
    err.print(
        f"  fedia3 fetch --user NAME --out DIR --coordinator {escape(address)} --ca ca.pem "
        "--token-file FILE",
        soft_wrap=True,
    )


@contextmanager
def _operator(config: Path | None, file: Path | None) -> "Iterator[Operator]":
    from fedia3.coordinator.operator import Operator  # noqa: PLC0415  # --help stays fast

    with Operator.open(file or _operator_file(config)) as admin:
        yield admin


def _operator_file(config: Path | None) -> Path:
    from fedia3.coordinator.config import config_path  # noqa: PLC0415  # as above

    path = config_path(config)
    return (path if path.is_dir() else path.parent) / "operator.json"


def _whole_id(beginning: str, admin: "Operator") -> str:
    """The one device whose id begins so."""
    from fedia3.errors import BadInput, NotFound  # noqa: PLC0415  # as above

    found = [d.device_id for d in admin.devices() if d.device_id.startswith(beginning)]
    if len(found) > 1:
        raise BadInput(f"{beginning} fits {len(found)} devices; give more of the id")
    if not found:
        raise NotFound(f"no device's id begins with {beginning}; see `fedia3 coordinator devices`")
    return found[0]


def _say(text: str, as_json: bool, **facts: object) -> None:
    if as_json:
        print_json(facts)
    else:
        out.print(text, soft_wrap=True)


def _tell_status(answer: "CoordinatorStatus") -> None:
    out.print(f"rounds    {escape(_rounds(answer))}", soft_wrap=True)
    if answer.waiting_for:
        out.print(f"waiting   {escape(answer.waiting_for)}", soft_wrap=True)
    out.print(f"devices   {answer.devices} enrolled, {answer.devices_online} online")
    out.print(f"base      {answer.base_digest[:12]}")
    for part in answer.parts:
        pid = f"pid {part.pid}" if part.pid else ""
        again = f"{part.restarts} restarts, last {part.last_exit}" if part.restarts else ""
        color = "green" if part.state == "running" else "yellow"
        out.print(f"{part.name:<9} [{color}]{part.state:<8}[/] {pid:<12} {escape(again)}".rstrip())


def _rounds(answer: "CoordinatorStatus") -> str:
    wanted = ["paused"] if answer.paused else []
    wanted += ["one is asked for"] if answer.run_requested else []
    if answer.round_num is None or answer.round_committed_ms is None:
        return ", ".join(["none yet", *wanted])
    counts = answer.round_metrics
    told = f"{counts['accepted']:.0f} of {counts['clients']:.0f} devices" if counts else "the start"
    last = f"{answer.round_num} at {_time(answer.round_committed_ms)}, {told}"
    return ", ".join([last, *wanted])


def _device_line(device: "DeviceState") -> str:
    if device.revoked_ms:
        state = f"revoked {_time(device.revoked_ms)}"
    elif device.online:
        state = "[green]online[/]"
    elif device.last_seen_ms:
        state = f"last seen {_time(device.last_seen_ms)}"
    else:
        state = "never seen"
    return f"{device.device_id}  {escape(device.user):<16} {escape(device.name):<20} {state}"


def _time(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms / 1000).astimezone():%Y-%m-%d %H:%M:%S}"
