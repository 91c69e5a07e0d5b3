"""A run's rounds: opened, closed, told of, and ended where the operator says so."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.schema import Schema, Target
from fedia3.adapters.update import TrainRequest
from fedia3.coordinator.campaign import (
    Bookkeeper,
    Campaign,
    note_process,
    noted_process,
    rounds_log,
    starting_adapter,
)
from fedia3.coordinator.config import CoordinatorConfig, RoundsConfig, ServiceConfig
from fedia3.coordinator.directory import OpenRound
from fedia3.coordinator.gate import Reply
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.stores.memory_directory import MemoryDirectory
from fedia3.errors import QuorumNotMet

SCHEMA = Schema("f" * 64, (Target("m", "k", 2),))
ROUNDS = RoundsConfig(min_clients=2, quorum=2, deadline_s=10.0)


@dataclass
class Devices:
    """A fleet whose devices answer at once; ``meanwhile`` happens while they work."""

    sent: Callable[[], None]
    online: tuple[str, ...] = ("ann", "bob")
    silent: tuple[str, ...] = ()
    meanwhile: Callable[[], None] = lambda: None

    def population(self) -> Sequence[str]:
        return self.online

    def ask(self, requests: Sequence[TrainRequest], deadline_s: float | None) -> Iterator[Reply]:
        self.sent()
        self.meanwhile()
        for request in requests:
            if request.client not in self.silent:
                delta = np.full(2, 0.5, np.float32)
                yield Reply(request.client, request.round_num, SCHEMA.digest, delta, 3)


@dataclass
class Stage:
    """A campaign with twins around it; time passes only while it sleeps."""

    rounds: RoundsConfig = ROUNDS
    now_ms: int = 1_000_000
    draining: bool = False
    registry: Registry = field(default_factory=Registry.in_memory)
    directory: MemoryDirectory = field(default_factory=MemoryDirectory)

    def __post_init__(self) -> None:
        log = logging.getLogger("fedia3.rounds")
        book = Bookkeeper(self.directory, self.rounds.deadline_s, log, lambda: self.now_ms)
        self.fleet = Devices(book.requests_sent)
        self.campaign = Campaign(
            self.registry,
            self.directory,
            self.fleet,
            book,
            CoordinatorConfig(Path(), ServiceConfig(("a",), "tiny"), self.rounds).plan,
            self.rounds,
            Adapter.ones(SCHEMA),
            log,
            now_ms=lambda: self.now_ms,
            sleep=self.sleep,
            is_draining=lambda: self.draining,
        )

    def sleep(self, seconds: float) -> None:
        self.now_ms += round(seconds * 1000)

    @property
    def last_round(self) -> int | None:
        last = self.registry.latest_round()
        return None if last is None else last.round_num


def test_a_run_commits_its_rounds() -> None:
    """
    Three rounds of two devices, behind round 0, which is the base model.
    """
    stage = Stage()
    assert stage.campaign.run(3) == 3
    assert stage.last_round == 3


def test_the_next_run_goes_on_behind_the_last() -> None:
    """
    However the run before ended.
    """
    stage = Stage()
    stage.campaign.run(1)
    stage.campaign.run(1)
    assert stage.last_round == 2


def test_a_round_is_open_while_its_devices_work_and_closed_after() -> None:
    """
    Round 1 asks ann and bob, until ten seconds after it began.
    """
    stage, seen = Stage(), []
    stage.fleet.meanwhile = lambda: seen.append(stage.directory.round_control().open_round)
    stage.campaign.run(1)
    (opened,) = seen
    assert opened == OpenRound(1, opened.cohort, 1_010_000)
    assert sorted(opened.cohort) == ["ann", "bob"]
    assert stage.directory.round_control().open_round is None


def test_a_round_that_fails_is_closed_too() -> None:
    """
    Too few replies: nothing is committed, no poll is let through any more.
    """
    stage = Stage()
    stage.fleet.silent = ("bob",)
    with pytest.raises(QuorumNotMet):
        stage.campaign.run(1)
    assert stage.last_round == 0
    assert stage.directory.round_control().open_round is None


def test_a_pause_ends_the_run_behind_its_round() -> None:
    """
    The operator pauses during round 1 of 5.
    """
    stage = Stage()
    stage.fleet.meanwhile = lambda: stage.directory.set_paused(True)
    assert stage.campaign.run(5) == 1


def test_a_coordinator_that_stops_begins_no_further_round() -> None:
    """
    The round under way is committed, the next is left to the next start.
    """
    stage = Stage()

    def stop() -> None:
        stage.draining = True

    stage.fleet.meanwhile = stop
    assert stage.campaign.run(5) == 1


def test_a_round_meets_the_request_that_came_before_it() -> None:
    """
    One that came while it ran is for the next.
    """
    stage = Stage()
    stage.directory.set_paused(True)
    stage.directory.request_run(5)
    assert stage.campaign.run(1) == 1
    assert stage.directory.round_control().run_requested_ms is None
    stage.directory.request_run(6)
    stage.fleet.meanwhile = lambda: stage.directory.request_run(7)
    assert stage.campaign.run(1) == 1
    assert stage.directory.round_control().run_requested_ms == 7


def test_too_few_devices_are_waited_for_and_then_given_up() -> None:
    """
    A minute, then the run ends and names the numbers.
    """
    stage = Stage()
    stage.fleet.online = ("ann",)
    with pytest.raises(QuorumNotMet, match=r"needs 2 devices online.*only 1"):
        stage.campaign.run(1)
    assert stage.now_ms == 1_060_000


def test_rounds_of_one_run_keep_their_pause() -> None:
    """
    Two rounds, 30 s from the end of one to the start of the next.
    """
    stage = Stage(RoundsConfig(every_s=30.0, rounds_per_run=2))
    assert stage.campaign.run(2) == 2
    assert stage.now_ms == 1_030_000


def test_one_line_tells_of_a_round(caplog: pytest.LogCaptureFixture) -> None:
    """
    How long it took and what became of its devices; who is missing is named.
    """
    stage = Stage(RoundsConfig(min_clients=2, quorum=1, deadline_s=10.0))
    stage.fleet.silent = ("bob",)
    stage.fleet.meanwhile = lambda: stage.sleep(2.5)
    with caplog.at_level(logging.INFO):
        stage.campaign.run(1)
    assert caplog.messages == [
        "round 1 begins with 2 devices",
        "round 1: bob is missing: no reply before the deadline",
        "round 1 is committed after 2.5 s: 1 accepted, 1 missing; 3 examples",
    ]


def config_in(folder: Path) -> CoordinatorConfig:
    """A coordinator of the shipped base in this folder."""
    return CoordinatorConfig(folder, ServiceConfig(("a",), "tiny"))


def test_the_process_of_a_run_is_found_again(tmp_path: Path) -> None:
    """
    It writes down who it is; before it has, nobody runs.
    """
    config = config_in(tmp_path)
    assert noted_process(config) is None
    note_process(config, run_id=2**64 - 1)
    process = noted_process(config)
    assert process is not None
    assert process.run_id == 2**64 - 1
    assert process.is_alive


def test_the_start_is_the_base_model_itself(tmp_path: Path) -> None:
    """
    All ones: exactly the base.
    """
    assert (starting_adapter(config_in(tmp_path)).vector == 1).all()


def test_the_rounds_are_told_to_a_file(tmp_path: Path) -> None:
    """
    What a ServerApp prints ends in Flower's database.
    """
    rounds_log(config_in(tmp_path)).info("round 1")
    assert (tmp_path / "logs" / "rounds.log").read_text().endswith("INFO round 1\n")
    logging.getLogger("fedia3.rounds").handlers.clear()
