"""What a simulation looks like on a terminal while it runs."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from fedia3.adapters.base_model import BaseModel
    from fedia3.coordinator.records import Contribution
    from fedia3.coordinator.rounds import RoundResult
    from fedia3.simulations.population import People


class TerminalProgress:
    """A line for each committed round, a bar for what is under way; ``quiet`` shows nothing.

    The watcher of :func:`fedia3.simulations.simulation.simulate`. Written to stderr: stdout is
    for facts.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", visible=False)
        self._began = 0.0

    def __enter__(self) -> "TerminalProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(escape(text), soft_wrap=True)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """A spinner while something of unknown length goes on."""
        with self.console.status(escape(what)):
            yield

    def run_started(self, folder: Path) -> None:
        """Where everything is kept."""
        self.say(f"run folder {folder}")

    def seed_started(self, seed: int, people: "People", base: "BaseModel") -> None:
        """Who takes part, on what base."""
        texts = sum(len(client.train) for client in people.clients.values())
        self.say(
            f"seed {seed}: {len(people.clients)} users train on {texts:,} texts; base "
            f"{base.manifest.name}, one adapter is {base.schema.n_params:,} scales"
        )

    def round_started(self, round_num: int, cohort: Sequence[str]) -> None:
        """A cohort is asked."""
        self._began = time.monotonic()
        self._show(f"round {round_num}", 0, len(cohort))

    def reply_judged(self, round_num: int, contribution: "Contribution") -> None:
        """A client is through."""
        if contribution.verdict == "rejected":
            self.say(f"round {round_num}: rejected {contribution.client}: {contribution.reason}")
        self._bar.advance(self._task)

    def round_committed(self, result: "RoundResult") -> None:
        """The round's line."""
        m = result.metrics
        loss = f"training loss {m['loss_mean']:.3f}  " if "loss_mean" in m else ""
        self.say(
            f"round {result.state.round_num:<3} {m['accepted']:.0f} of {m['clients']:.0f} clients  "
            f"{loss}{m['bytes_down_per_client'] / 1000:.1f} kB down, "
            f"{m['bytes_up_per_client'] / 1000:.1f} kB up each  "
            f"{time.monotonic() - self._began:.1f} s"
        )

    def worked(self, what: str, done: int, total: int) -> None:
        """A step behind the rounds."""
        self._show(what, done, total)
        if done == total:
            self.say(f"{what}: {total} users done")

    def _show(self, what: str, done: int, total: int) -> None:
        self._bar.update(
            self._task, description=escape(what), completed=done, total=total, visible=True
        )
