"""What every command of the command line shares: where it writes, and how it prints facts."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON, nothing else.")]


def print_json(facts: Any) -> None:
    """Facts for programs, on stdout."""
    print(json.dumps(facts, indent=1, default=str))
