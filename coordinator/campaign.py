"""The deployed ServerApp's work: rounds with the enrolled devices, until its run's share is done.

A round is opened in the directory once its requests lie at the SuperLink and closed when it is
over, which is how the fleet's door knows whose polls have something to fetch.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path

import psutil

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.manifest import read_manifest, schema
from fedia3.clock import wall_ms
from fedia3.coordinator.config import CoordinatorConfig, RoundsConfig
from fedia3.coordinator.directory import Directory, OpenRound
from fedia3.coordinator.records import Contribution
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.rounds import Fleet, RoundPlan, RoundResult, run_rounds
from fedia3.errors import QuorumNotMet
from fedia3.private_files import write_private
from fedia3.processes import birth

CLIENTS_WITHIN_S = 60.0  # for as many devices as a round needs
LOOK_EVERY_S = 1.0
LOG_BYTES = 16 << 20

Clock = Callable[[], int]  # ms since 1970
Sleep = Callable[[float], None]


class Bookkeeper:
    """Opens and closes each round in the directory, and tells of it in a line."""

    def __init__(
        self, directory: Directory, deadline_s: float, log: logging.Logger, now_ms: Clock
    ) -> None:
        self._directory = directory
        self._deadline_ms = round(deadline_s * 1000)
        self._log = log
        self._now_ms = now_ms
        self._began_ms = 0
        self._requested_ms: int | None = None
        self._round: OpenRound | None = None

    def round_started(self, round_num: int, cohort: Sequence[str]) -> None:
        """What the operator asked for until now is met by this round."""
        self._began_ms = self._now_ms()
        self._requested_ms = self._directory.round_control().run_requested_ms
        self._round = OpenRound(round_num, tuple(cohort), self._began_ms + self._deadline_ms)
        self._log.info("round %d begins with %d devices", round_num, len(cohort))

    def requests_sent(self) -> None:
        """Let the cohort's polls through: now they find something."""
        self._directory.open_round(self._round)

    def reply_judged(self, round_num: int, contribution: Contribution) -> None:
        """Say what kept a device's work out of the round."""
        if contribution.verdict != "accepted":
            self._log.warning(
                "round %d: %s is %s: %s",
                round_num,
                contribution.client,
                contribution.verdict,
                contribution.reason,
            )

    def round_committed(self, result: RoundResult) -> None:
        """Close the round; a request that it met is met."""
        self._directory.open_round(None)
        if self._requested_ms is not None:
            self._directory.run_started(self._requested_ms)
        self._log.info(
            "round %d is committed after %.1f s: %s",
            result.state.round_num,
            (self._now_ms() - self._began_ms) / 1000,
            counts(result),
        )


def counts(result: RoundResult) -> str:
    """``3 accepted, 1 missing; 120 examples``."""
    verdicts = ("accepted", "rejected", "missing")
    told = [f"{result.metrics[v]:.0f} {v}" for v in verdicts if result.metrics[v]]
    return f"{', '.join(told)}; {result.metrics['num_examples']:.0f} examples"


@dataclass(frozen=True)
class Campaign:
    """One Flower run's rounds."""

    registry: Registry
    directory: Directory
    fleet: Fleet
    book: Bookkeeper
    plan: RoundPlan
    rounds: RoundsConfig
    start: Adapter
    log: logging.Logger
    now_ms: Clock = wall_ms
    sleep: Sleep = time.sleep
    is_draining: Callable[[], bool] = lambda: False  # the coordinator is about to stop

    def run(self, rounds: int) -> int:
        """Run up to ``rounds`` rounds; how many were committed. A pause ends it in between.

        Raises:
            QuorumNotMet: too few devices were there, or too few usable replies came.
            Conflict: another coordinator runs rounds on the same registry.
        """
        done = 0
        try:
            while done < rounds and self._may_go_on(done):
                self._require_clients()
                run_rounds(
                    self.registry,
                    self.fleet,
                    self.plan,
                    start=self.start,
                    until_round=self._next_round(),
                    observer=self.book,
                )
                done += 1
        finally:
            self.directory.open_round(None)
        return done

    def _next_round(self) -> int:
        last = self.registry.latest_round()
        return 1 if last is None else last.round_num + 1

    def _may_go_on(self, done: int) -> bool:
        """Wait until the next round is due; False where the operator wants no more."""
        due_ms = self.now_ms() + (round(self.rounds.every_s * 1000) if done else 0)
        while not self.is_draining():
            control = self.directory.round_control()
            if control.run_requested_ms is not None:
                return True
            if control.paused:
                return False
            if self.now_ms() >= due_ms:
                return True
            self.sleep(LOOK_EVERY_S)
        return False

    def _require_clients(self) -> None:
        """Wait for as many devices as a round needs: they may just be coming back."""
        needed, told = self.rounds.min_clients, -1
        for _ in range(round(CLIENTS_WITHIN_S / LOOK_EVERY_S)):
            online = len(self.fleet.population())
            if online >= needed:
                return
            if online != told:
                self.log.info("waiting for devices: %d of %d are online", online, needed)
                told = online
            self.sleep(LOOK_EVERY_S)
        raise QuorumNotMet(
            f"a round needs {needed} devices online, but within {CLIENTS_WITHIN_S:g} s there were "
            f"only {told}"
        )


def starting_adapter(config: CoordinatorConfig) -> Adapter:
    """Exactly the base model: round 0's adapter.

    Raises:
        NotFound: the base model is not on this machine any more.
    """
    base = BaseStore().find(config.coordinator.base)
    return Adapter.ones(schema(read_manifest(base)))


def rounds_log(config: CoordinatorConfig) -> logging.Logger:
    """Where the ServerApp tells of its rounds: what it prints goes to the SuperLink's database."""
    config.logs.mkdir(mode=0o700, exist_ok=True)
    handler = RotatingFileHandler(config.logs / "rounds.log", maxBytes=LOG_BYTES, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("fedia3.rounds")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    return log


@dataclass(frozen=True)
class ServerAppProcess:
    """The process that runs a run's rounds."""

    run_id: int
    pid: int
    birth: str  # a later process may have the same pid

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        try:
            is_same = birth(self.pid) == self.birth
            return is_same and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def kill(self) -> None:
        """End it, if it still runs."""
        with suppress(psutil.Error):  # it just ended
            if self.is_alive:
                psutil.Process(self.pid).kill()


def note_process(config: CoordinatorConfig, run_id: int) -> None:
    """Write down that this process runs the run."""
    facts = asdict(ServerAppProcess(run_id, os.getpid(), birth(os.getpid()) or ""))
    write_private(_process_file(config), json.dumps(facts).encode())


def noted_process(config: CoordinatorConfig) -> ServerAppProcess | None:
    """The process that last ran a run."""
    try:
        return ServerAppProcess(**json.loads(_process_file(config).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _process_file(config: CoordinatorConfig) -> Path:
    return config.folder / "serverapp.json"
