"""When rounds run: each decision can be made in the head."""

import asyncio
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator.campaign import ServerAppProcess
from fedia3.coordinator.config import CoordinatorConfig, RoundsConfig, ServiceConfig
from fedia3.coordinator.directory import Device, Invite, OpenRound, RoundControl, Token
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.schedule import (
    Running,
    Scheduler,
    Situation,
    Start,
    Step,
    Stop,
    Wait,
    next_step,
    read_waiting,
)
from fedia3.coordinator.stores.memory_directory import MemoryDirectory
from fedia3.coordinator.superlink import Node, Run
from fedia3.errors import NotFound, Unreachable
from fedia3.processes import birth
from fedia3.proto.app import App

BACK_TO_BACK = RoundsConfig()  # runs of 20, two devices
HOURLY = RoundsConfig(every_s=3600)
IDLE = Situation(now_ms=10_000_000, control=RoundControl(), last_round_ms=None, online=2)
LAST = replace(IDLE, last_round_ms=9_000_000)  # 1000 s ago
PAUSED = RoundControl(paused=True)
ASKED = RoundControl(run_requested_ms=1)
MINE = ServerAppProcess(7, pid=1, birth="")
GOES = Running(Run(7, "running"), asked_ms=9_999_000, process=MINE, is_alive=True)


@pytest.mark.parametrize(
    ("situation", "rounds", "step"),
    [
        (IDLE, BACK_TO_BACK, Start(20)),
        (IDLE, HOURLY, Start(1)),
        (LAST, BACK_TO_BACK, Start(20)),
        (LAST, HOURLY, Wait("the next round is due in 2600 s")),
        (replace(LAST, last_round_ms=6_400_000), HOURLY, Start(1)),
        (replace(LAST, last_round_ms=10_000_001), HOURLY, Start(1)),
        (replace(IDLE, online=1), BACK_TO_BACK, Wait("1 of 2 devices are online")),
        (replace(IDLE, control=PAUSED), BACK_TO_BACK, Wait("paused by the operator")),
        (replace(LAST, control=ASKED), HOURLY, Start(1)),
        (replace(LAST, control=replace(PAUSED, run_requested_ms=1)), HOURLY, Start(1)),
        (replace(IDLE, control=ASKED, online=0), HOURLY, Wait("0 of 2 devices are online")),
        (
            replace(IDLE, not_before_ms=10_004_500),
            BACK_TO_BACK,
            Wait("the last run failed; trying again in 5 s"),
        ),
        (replace(IDLE, not_before_ms=10_000_000 + 86_400_000), BACK_TO_BACK, Start(20)),
        (replace(IDLE, running=GOES), BACK_TO_BACK, Wait("")),
        (replace(IDLE, running=GOES, control=PAUSED), BACK_TO_BACK, Wait("")),
        (
            replace(IDLE, running=replace(GOES, is_alive=False)),
            BACK_TO_BACK,
            Stop(7, "its process died"),
        ),
        (replace(IDLE, running=Running(Run(7, "pending"), 9_950_000)), BACK_TO_BACK, Wait("")),
        (
            replace(IDLE, running=Running(Run(7, "pending"), 9_939_000)),
            BACK_TO_BACK,
            Stop(7, "it did not start within 60 s"),
        ),
        (
            replace(IDLE, running=Running(Run(7, "pending"), 96_400_000)),
            BACK_TO_BACK,
            Stop(7, "it did not start within 60 s"),
        ),
    ],
)  # fmt: skip
def test_the_next_step(situation: Situation, rounds: RoundsConfig, step: Step) -> None:
    """
    Due, enough devices, not paused: start. The operator's request overrides plan and pause, and
    never the number of devices. A run goes on until its process dies. A clock that was set back by
    a day makes nobody wait for a day.
    """
    assert next_step(situation, rounds) == step


KEYS = {"a" * 32: b"a" * 40, "b" * 32: b"b" * 40}


@dataclass
class SuperLinkTwin:
    """Starts and ends runs of nobody."""

    states: dict[int, str] = field(default_factory=dict)
    online: Sequence[str] = tuple(KEYS)
    started: list[int] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    is_down: bool = False
    loses_answers: bool = False  # it starts runs, and nobody hears of it

    def nodes(self) -> tuple[Node, ...]:
        self._require_up()
        return tuple(Node(i, name, KEYS[name], online=True) for i, name in enumerate(self.online))

    def register(self, device_id: str, node_key: bytes) -> None:
        self.told.append(device_id)

    def start_run(self, app: App, rounds: int) -> int:
        self._require_up()
        run_id = len(self.states) + 1
        self.states[run_id] = "pending"
        self.started.append(rounds)
        if self.loses_answers:
            raise Unreachable("no answer in time")
        return run_id

    def stop_run(self, run_id: int) -> None:
        self.states[run_id] = "finished"

    def run(self, run_id: int) -> Run:
        self._require_up()
        if run_id not in self.states:
            raise NotFound("no such run")
        return Run(run_id, self.states[run_id])

    def runs(self) -> tuple[Run, ...]:
        self._require_up()
        return tuple(Run(*entry) for entry in self.states.items())

    def _require_up(self) -> None:
        if self.is_down:
            raise Unreachable("down")


class Stage:
    """A scheduler with twins around it, and a clock that moves when it is told."""

    def __init__(self, folder: Path, rounds: RoundsConfig = BACK_TO_BACK) -> None:
        self.link, self.directory = SuperLinkTwin(), directory()
        self.registry = Registry.in_memory()
        self.process: ServerAppProcess | None = None
        self.never_started = 0
        self.now_ms = 1_000_000
        self.config = CoordinatorConfig(folder, ServiceConfig(("a",), "tiny"), rounds)
        self.scheduler = Scheduler(
            self.config,
            App(b"", ""),
            self.link,
            self.registry,
            self.directory,
            lambda: self.process,
            lambda: self.now_ms,
            never_started=self._count,
        )

    def _count(self) -> None:
        self.never_started += 1

    def commits(self, round_num: int) -> None:
        schema = Schema("f" * 64, (Target("m", "k", 2),))
        self.registry.commit_round(round_num, b"", Adapter.ones(schema))

    @property
    def waiting_for(self) -> str:
        return read_waiting(self.config.schedule_file)


def directory() -> MemoryDirectory:
    """Two enrolled devices."""
    made = MemoryDirectory()
    for name, key in KEYS.items():
        invite = Invite(key, "ann", 10**15, b"")
        made.add_invite(invite)
        device = Device(name, "ann", "laptop", key[:32], key, enrolled_ms=0)
        made.enrol(invite, device, Token(key, "device", name, 10**15), now_ms=0)
    return made


def test_a_run_is_started_once(tmp_path: Path) -> None:
    """
    While it goes on nothing else happens.
    """
    stage = Stage(tmp_path)
    assert stage.scheduler.look() == Start(20)
    assert stage.scheduler.look() == Wait("")
    assert stage.link.started == [20]


def test_devices_whose_key_is_not_theirs_do_not_count(tmp_path: Path) -> None:
    """
    One of two enrolled devices was shut out: the round waits for another.
    """
    stage = Stage(tmp_path)
    stage.directory.revoke("b" * 32, now_ms=1)
    assert stage.scheduler.look() == Wait("1 of 2 devices are online")
    assert stage.waiting_for == "1 of 2 devices are online"


def test_a_run_whose_process_died_is_ended_and_another_started(tmp_path: Path) -> None:
    """
    Within three looks, a second apart, not the minute that Flower takes.
    """
    stage = Stage(tmp_path)
    stage.scheduler.look()
    stage.link.states[1] = "running"
    stage.process = ServerAppProcess(1, pid=2**22 + 1, birth="")
    stage.directory.open_round(OpenRound(1, ("a" * 32,), 10**15))
    assert stage.scheduler.look() == Stop(1, "its process died")
    assert stage.directory.round_control().open_round is None
    assert stage.scheduler.look() == Wait("the last run failed; trying again in 1 s")
    stage.now_ms += 1000
    assert stage.scheduler.look() == Start(20)


def test_a_run_that_never_starts_is_told(tmp_path: Path) -> None:
    """
    Whoever starts runs hangs, perhaps; one whose process died did start.
    """
    stage = Stage(tmp_path)
    stage.scheduler.look()
    stage.now_ms += 61_000
    assert stage.scheduler.look() == Stop(1, "it did not start within 60 s")
    assert stage.never_started == 1
    stage.scheduler.look()
    stage.now_ms += 1000
    stage.scheduler.look()
    stage.process = ServerAppProcess(2, pid=2**22 + 1, birth="")
    assert stage.scheduler.look() == Stop(2, "its process died")
    assert stage.never_started == 1


def test_a_run_that_failed_leaves_no_process_behind(tmp_path: Path) -> None:
    """
    One that hung, and that Flower gave up, must not go on beside the next run's.
    """
    stage = Stage(tmp_path)
    stage.scheduler.look()
    with subprocess.Popen(["sleep", "600"]) as hung:
        stage.process = ServerAppProcess(1, hung.pid, birth(hung.pid) or "")
        stage.link.stop_run(1)
        stage.scheduler.look()
        assert hung.wait(10) == -9


def test_a_run_whose_start_nobody_heard_of_is_ended(tmp_path: Path) -> None:
    """
    Else it would go on beside the next one, and one of the two would waste the devices' work.
    """
    stage = Stage(tmp_path)
    stage.link.loses_answers = True

    async def scenario() -> None:
        until = asyncio.Event()
        loop = asyncio.create_task(stage.scheduler.run(until))
        while not stage.link.started:
            await asyncio.sleep(0.01)
        stage.link.loses_answers = False
        while len(stage.link.started) < 2:
            await asyncio.sleep(0.01)
        until.set()
        await loop

    asyncio.run(scenario())
    assert stage.link.states == {1: "finished", 2: "pending"}


def test_runs_that_fail_in_a_row_are_repeated_ever_later(tmp_path: Path) -> None:
    """
    1, 2, 4 s; a committed round ends the row.
    """
    stage = Stage(tmp_path)
    waits = []
    for _ in range(3):
        stage.scheduler.look()
        stage.link.stop_run(len(stage.link.states))
        waits.append(stage.scheduler.look())
        stage.now_ms += 60_000
    assert [w.reason.split()[-2] for w in waits if isinstance(w, Wait)] == ["1", "2", "4"]
    stage.scheduler.look()
    stage.commits(1)
    stage.link.stop_run(4)
    assert stage.scheduler.look() == Start(20)


def test_a_superlink_with_a_new_database_costs_one_run(tmp_path: Path) -> None:
    """
    A run that nobody knows any more is over.
    """
    stage = Stage(tmp_path)
    stage.scheduler.look()
    stage.link.states.clear()
    assert isinstance(stage.scheduler.look(), Wait)
    stage.now_ms += 1000
    assert stage.scheduler.look() == Start(20)


def test_devices_that_flower_has_forgotten_are_told_to_it_again(tmp_path: Path) -> None:
    """
    As when its database was deleted.
    """
    stage = Stage(tmp_path)
    stage.link.online = ("a" * 32,)
    assert stage.scheduler.look() == Wait("1 of 2 devices are online")
    assert stage.link.told == ["b" * 32]


def test_what_an_earlier_coordinator_left_is_ended_first(tmp_path: Path) -> None:
    """
    Its run, and the round that it had opened.
    """
    stage = Stage(tmp_path)
    stage.link.states[1] = "running"
    stage.directory.open_round(OpenRound(1, ("a" * 32,), 10**15))
    stage.scheduler.end_old_runs()
    assert stage.link.states == {1: "finished"}
    assert stage.directory.round_control().open_round is None


def test_a_superlink_that_is_down_is_waited_for(tmp_path: Path) -> None:
    """
    The loop says so and looks again.
    """
    stage = Stage(tmp_path)
    stage.link.is_down = True

    async def scenario() -> None:
        until = asyncio.Event()
        loop = asyncio.create_task(stage.scheduler.run(until))
        while "SuperLink is away" not in stage.waiting_for:
            await asyncio.sleep(0.01)
        stage.link.is_down = False
        while not stage.link.started:
            await asyncio.sleep(0.01)
        until.set()
        await loop

    asyncio.run(scenario())
    assert stage.waiting_for == ""


def test_a_process_is_told_from_a_later_one_with_its_pid() -> None:
    """
    Pid and birth together name a process.
    """
    here = birth(os.getpid()) or ""
    assert ServerAppProcess(1, os.getpid(), here).is_alive
    assert not ServerAppProcess(1, os.getpid(), here + "0").is_alive


def test_a_disk_that_refuses_does_not_end_the_schedule(tmp_path: Path) -> None:
    """
    Why nothing happens cannot be noted, and rounds are started all the same.
    """
    (tmp_path / "no-folder").write_bytes(b"")
    stage = Stage(tmp_path / "no-folder")
    stage.link.online = ()
    assert isinstance(stage.scheduler.look(), Wait)
    stage.link.online = tuple(KEYS)
    assert stage.scheduler.look() == Start(20)
