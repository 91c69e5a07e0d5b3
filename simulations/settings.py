"""What a simulation is asked to do, and the folder it keeps everything in."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from fedia3.adapters.update import TrainingPlan
from fedia3.client.splits import SplitPlan
from fedia3.errors import BadSetting, Corrupt, NotFound

RUNS = Path("fedia3-runs")
DRAFT = "run.json.draft"  # what a crash at the very start leaves behind


@dataclass(frozen=True)
class Settings:
    """A simulation: whose text, which base, how many rounds of how many clients."""

    data: str | None = None  # JSONL file or folder; None = the embedded demo population
    user_field: str = "user"
    order_field: str | None = None  # sorts a user's texts; None = the file's order
    skip_bad_lines: bool = False
    base: str = "tiny"  # name, digest prefix or folder of a base model
    demo_users: int = 24
    demo_texts: int = 60  # of each demo user
    rounds: int = 5
    cohort: int = 8  # clients of a round
    seeds: tuple[int, ...] = (0,)
    split: SplitPlan = field(default_factory=SplitPlan)
    training: TrainingPlan = field(default_factory=lambda: TrainingPlan(learning_rate=3e-2))
    personal: TrainingPlan = field(
        default_factory=lambda: TrainingPlan(learning_rate=3e-2, epochs=6, patience=2)
    )

    def __post_init__(self) -> None:
        for name in ("rounds", "cohort"):
            if getattr(self, name) < 1:
                raise BadSetting(f"{name} is at least 1, got {getattr(self, name)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise BadSetting(f"seeds are different numbers, at least one, got {self.seeds}")

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> "Settings":
        """What ``dataclasses.asdict`` took apart."""
        values = {f.name: values[f.name] for f in fields(cls)}
        values["seeds"] = tuple(values["seeds"])
        values["split"] = SplitPlan(**values["split"])
        values["training"] = TrainingPlan(**values["training"])
        values["personal"] = TrainingPlan(**values["personal"])
        return cls(**values)


@dataclass(frozen=True)
class RunFolder:
    """``run.json``, ``report.txt/json/png``, and for each seed a registry in ``seed-N/``."""

    path: Path

    @classmethod
    def new(cls, path: Path | None = None) -> "RunFolder":
        """A folder for a new run, by default ``./fedia3-runs/DATE``; nothing is written yet.

        Raises:
            BadSetting: there is something in the folder already, or it is a file.
        """
        path = path or RUNS / datetime.now().strftime("%Y-%m-%d-%H%M%S")
        if path.exists() and not path.is_dir():
            raise BadSetting(f"expected a folder for the run, got the file {path}; give another")
        if path.exists() and any(p.name != DRAFT for p in path.iterdir()):
            raise BadSetting(
                f"{path} is not empty; give --out a new folder, or continue that run with "
                f"--resume {path}"
            )
        return cls(path)

    @classmethod
    def latest(cls) -> "RunFolder":
        """The newest run below ``./fedia3-runs``.

        Raises:
            NotFound: there is none.
        """
        runs = [path.parent for path in RUNS.glob("*/run.json")]
        if not runs:
            raise NotFound(f"no run in ./{RUNS}; start one with `fedia3 simulate`, or give --run")
        return cls(max(runs, key=lambda run: ((run / "run.json").stat().st_mtime_ns, run)))

    def begin(self, settings: Settings, *, base: str, data: str, compute: str) -> None:
        """Write down what the run is and what it depends on, or check that nothing has changed.

        Args:
            settings: what it is asked to do.
            base: digest of the base model.
            data: digest of everybody's text.
            compute: number format and threads, without which no bytes are the same.

        Raises:
            BadSetting: base, text, settings or compute are not those the run was started with.
        """
        pinned = {"base": base, "data": data, "compute": compute}
        facts = json.loads(json.dumps({"settings": asdict(settings), **pinned}))
        if not (self.path / "run.json").exists():
            self._write(facts)
        known = self._read()
        changed = [name for name in facts if known.get(name) != facts[name]]
        if changed:
            raise BadSetting(
                f"{self.path} was started with other {' and '.join(changed)}"
                + "".join(
                    f"; {n}: {known.get(n)} then, {facts[n]} now" for n in changed if n in pinned
                )
                + "; put it back as it was, or start a new run"
            )

    def settings(self) -> Settings:
        """What the run was started with."""
        try:
            return Settings.from_fields(self._read()["settings"])
        except (KeyError, TypeError) as error:
            raise Corrupt(f"{self.path / 'run.json'} is not of this version: {error}") from error

    def base(self) -> str:
        """Digest of the base model the run was started with."""
        return str(self._read()["base"])

    def registry(self, seed: int) -> Path:
        """The folder of one seed's registry."""
        return self.path / f"seed-{seed}"

    def _read(self) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        except FileNotFoundError:
            raise NotFound(f"{self.path} holds no run: there is no run.json in it") from None
        except ValueError as error:
            raise Corrupt(f"{self.path / 'run.json'} cannot be read: {error}") from error
        if not isinstance(facts, dict) or facts.keys() != {"settings", "base", "data", "compute"}:
            raise Corrupt(f"{self.path / 'run.json'} is not of this version: other fields")
        return facts

    def _write(self, facts: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        draft = self.path / DRAFT
        draft.write_text(json.dumps(facts, indent=1))
        draft.replace(self.path / "run.json")
