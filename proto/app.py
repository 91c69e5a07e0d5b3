"""The one Flower app of every round: no code, only the names of what both sides have installed."""

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from flwr.cli.build import build_fab_from_disk

FOLDER = Path(__file__).parent / "thin_app"


@dataclass(frozen=True)
class App:
    """A Flower app as it travels."""

    content: bytes  # Flower's archive: a zip
    digest: str  # its sha256, by which a node asks for it


@cache
def thin_app() -> App:
    """The app in ``thin_app/``, built by Flower; the same bytes wherever the same Flower is."""
    content = build_fab_from_disk(FOLDER)
    return App(content, sha256(content).hexdigest())
