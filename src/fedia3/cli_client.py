"""``fedia3 client``: a device that learns from its owner's text."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fedia3.console import Json, out, print_json
from fedia3.errors import NotFound

client_app = typer.Typer(
    help="Learn on this device from its owner's text, which never leaves it.",
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

    The code comes from [bold]fedia3 coordinator invite[/bold], holds for ten minutes and for one
    device. Leave it out and it is asked for: so it stays out of the shell's history.
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
