"""``fedia3 coordinator``: set a coordinator up, run it, look after it."""

import typer

coordinator_app = typer.Typer(
    help="Run a federation: hand out the base model, run rounds, keep everybody's adapters.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
