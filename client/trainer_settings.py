"""What a device's trainer is started with, as the agent writes it down."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedia3.client.splits import SplitPlan
from fedia3.errors import BadSetting
from fedia3.private_files import write_private


@dataclass(frozen=True)
class TrainerSettings:
    """Which base, whose text, how much of the machine."""

    base: Path  # folder of the base model
    data: Path  # a .jsonl file, or a folder of them
    socket: Path
    order_field: str | None = None  # sorts the texts; None = the files' order
    split: SplitPlan = field(default_factory=SplitPlan)
    cpu_share: float = 1.0  # of all cores together

    def __post_init__(self) -> None:
        if not 0 < self.cpu_share <= 1:
            raise BadSetting(f"the share of the processor lies in (0, 1], got {self.cpu_share}")

    @property
    def threads(self) -> int:
        """Threads that suffice for the share."""
        return max(1, round(self.cpu_share * cores() + 0.499))

    def write(self, path: Path) -> None:
        """Put it where :meth:`read` finds it."""
        write_private(path, json.dumps(asdict(self), default=str, indent=1).encode())

    @classmethod
    def read(cls, path: Path) -> "TrainerSettings":
        """What :meth:`write` wrote."""
        fields = json.loads(path.read_text())
        places = {name: Path(fields[name]) for name in ("base", "data", "socket")}
        return cls(**{**fields, **places, "split": SplitPlan(**fields["split"])})


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
