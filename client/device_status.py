"""What a device is doing, for its owner: one line, and the facts; and what its owner wants of it.

The agent writes ``status.json`` and reads ``control.json``; the command line does the opposite.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from fedia3.errors import Corrupt
from fedia3.private_files import write_private

ALONE = "learning on this device alone"
SAME_START_S = 0.05  # two readings of one process's start differ by clock ticks at most


@dataclass(frozen=True)
class Control:
    """What the owner wants; times are ms since 1970."""

    paused: bool = False
    personalize_asked_ms: int = 0
    forgotten_ms: int = 0  # what began before is not to be kept

    @classmethod
    def read(cls, path: Path) -> "Control":
        """What was last written.

        Raises:
            Corrupt: something else was.
        """
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError) as error:
            raise Corrupt(f"{path} cannot be read ({error}); delete it") from error

    def write(self, path: Path) -> None:
        """Replace it whole."""
        write_private(path, json.dumps(asdict(self)).encode())


@dataclass(frozen=True)
class Coordinator:
    """How a device stands with its coordinator."""

    address: str
    silent_since_ms: int | None = None  # no answer since; None: it answers
    shut_out: str | None = None  # what it said when it shut this device out
    withheld: str | None = None  # why the device itself keeps off the network


@dataclass(frozen=True)
class DeviceStatus:
    """Everything the owner may ask; losses are nats per learned token."""

    pid: int
    started: float  # when that process was made, s since 1970
    written_ms: int
    state_folder: str
    data: str
    waiting: str | None = None  # why nothing may be done now
    trainer: str = "starting"  # state of its process
    problem: str | None = None  # why there is no trainer, or why it cannot work
    base: str | None = None  # name and digest
    texts: int = 0
    skipped: int = 0
    first_skipped: str | None = None
    too_little: str | None = None
    doing: str | None = None
    last_round: int | None = None
    last_round_ms: int | None = None
    last_loss: float | None = None
    last_failure: str | None = None  # class of the trainer's last error; its log says more
    coordinator: Coordinator | None = None  # None: not enrolled
    device_id: str | None = None
    user: str | None = None
    node: str = "stopped"  # state of Flower's process
    choice: str | None = None  # what the owner is served; None before the first part
    global_version: int | None = None
    personalized_ms: int | None = None
    losses: Mapping[str, float] = field(default_factory=dict)  # on text held out
    shared_version: int | None = None
    bytes_today: int = 0

    @property
    def line(self) -> str:
        """What is going on, in one line."""
        if self.waiting is not None:
            return f"waiting: {self.waiting}"
        if self.problem is not None:
            return f"stopped: {self.problem}"
        if self.trainer != "running":
            return "loading the base model"
        if self.doing is not None:
            return self.doing
        if self.too_little is not None:
            return f"waiting for text: {self.too_little}"
        return f"{_standing(self.coordinator)}{_last_round(self)}"

    @property
    def is_alive(self) -> bool:
        """Whether the process that wrote this still runs."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) <= SAME_START_S
        except psutil.Error:
            return False

    def to_json(self) -> bytes:
        """As its file holds it."""
        return json.dumps({"line": self.line, **asdict(self)}, indent=1).encode()

    def write(self, path: Path) -> None:
        """Replace the file at once; a power cut may lose it, for it is written often.

        Raises:
            StorageFailed: the disk refused.
        """
        write_private(path, self.to_json(), lasting=False)

    @classmethod
    def read(cls, path: Path) -> "DeviceStatus | None":
        """What an agent last wrote; None where there was none.

        Raises:
            Corrupt: it is of another version.
        """
        try:
            fields: dict[str, Any] = json.loads(path.read_bytes())
            del fields["line"]
            coordinator = fields.pop("coordinator")
            status = cls(**fields)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise Corrupt(f"{path} cannot be read ({error}); restart the client") from error
        return replace(status, coordinator=Coordinator(**coordinator) if coordinator else None)


def _standing(coordinator: Coordinator | None) -> str:
    if coordinator is None:
        return f"not enrolled; {ALONE}"
    if coordinator.shut_out is not None:
        return f"shut out by {coordinator.address} ({coordinator.shut_out}); {ALONE}"
    if coordinator.withheld is not None:
        return f"offline: {coordinator.withheld}; {ALONE}"
    if coordinator.silent_since_ms is not None:
        since = clock(coordinator.silent_since_ms)
        return f"offline: {coordinator.address} does not answer since {since}; {ALONE}"
    return f"ready for a round of {coordinator.address}"


def _last_round(status: DeviceStatus) -> str:
    if status.last_round is None or status.last_round_ms is None:
        return ""
    loss = "" if status.last_loss is None else f", loss {status.last_loss:.3f}"
    return f"; trained round {status.last_round} at {clock(status.last_round_ms)}{loss}"


def clock(ms: int) -> str:
    """A time of day here."""
    return time.strftime("%H:%M", time.localtime(ms / 1000))
