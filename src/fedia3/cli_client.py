"""``fedia3 client``: a device that learns from its owner's text."""

import typer

client_app = typer.Typer(
    help="Learn on this device from its owner's text, which never leaves it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
