"""When rounds run: what to do next is decided by a pure function, and a loop does it.

Rounds run in Flower runs, each a process that a superexec starts. A run whose process died is ended
at once instead of after the minute in which Flower would notice, and the next one goes on behind
the last committed round.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedia3.clock import wall_ms
from fedia3.coordinator.campaign import ServerAppProcess
from fedia3.coordinator.config import CoordinatorConfig, RoundsConfig
from fedia3.coordinator.directory import Device, Directory, RoundControl
from fedia3.coordinator.records import RoundRecord
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.superlink import Node, Run
from fedia3.errors import Conflict, Fedia3Error, NotFound, StorageFailed, Unreachable
from fedia3.private_files import write_private
from fedia3.proto.app import App

LOOK_EVERY_S = 1.0
TOLD_AT_ONCE = 100  # devices that Flower has forgotten, at each look
STARTS_WITHIN_S = 60.0  # from asking for a run to its first sign of life
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # after a run that committed nothing


@dataclass(frozen=True)
class Wait:
    """Leave everything as it is; ``reason`` is empty while a run goes on."""

    reason: str = ""


@dataclass(frozen=True)
class Start:
    """Start a run of so many rounds."""

    rounds: int


@dataclass(frozen=True)
class Stop:
    """End a run that cannot go on."""

    run_id: int
    reason: str


Step = Wait | Start | Stop


@dataclass(frozen=True)
class Running:
    """The run that was last started, as far as it can be seen."""

    run: Run
    asked_ms: int  # when it was started
    process: ServerAppProcess | None = None  # its own, once it has one
    is_alive: bool = False  # whether that process is


@dataclass(frozen=True)
class Situation:
    """All that the next step depends on."""

    now_ms: int
    control: RoundControl
    last_round_ms: int | None  # when the last round was committed; None before the first
    online: int  # enrolled devices
    running: Running | None = None  # None too where it is over
    not_before_ms: int = 0  # a failed run is not repeated at once


def next_step(now: Situation, rounds: RoundsConfig) -> Step:
    """What the scheduler does now."""
    if now.running is not None:
        return _lost(now.running, now.now_ms) or Wait()
    if reason := _reason_to_wait(now, rounds):
        return Wait(reason)
    is_single = now.control.paused or now.control.run_requested_ms is not None
    return Start(1 if is_single else rounds.run_length)


def _lost(running: Running, now_ms: int) -> Stop | None:
    """A run that is over although Flower does not know it yet."""
    if running.process is not None and not running.is_alive:
        return Stop(running.run.run_id, "its process died")
    # either way: the clock may have been set back since
    if running.process is None and abs(now_ms - running.asked_ms) > STARTS_WITHIN_S * 1000:
        return Stop(running.run.run_id, f"it did not start within {STARTS_WITHIN_S:g} s")
    return None


def _reason_to_wait(now: Situation, rounds: RoundsConfig) -> str:
    is_requested = now.control.run_requested_ms is not None
    if now.control.paused and not is_requested:
        return "paused by the operator"
    if now.online < rounds.min_clients:
        return f"{now.online} of {rounds.min_clients} devices are online"
    if pause_ms := _pause_ms(now):
        return f"the last run failed; trying again in {_seconds(pause_ms)}"
    left_ms = 0 if is_requested else _until_due_ms(now, rounds)
    return f"the next round is due in {_seconds(left_ms)}" if left_ms else ""


def _pause_ms(now: Situation) -> int:
    """What is left of the pause after a failed run; a longer one says that the clock was set."""
    left_ms = now.not_before_ms - now.now_ms
    return left_ms if 0 < left_ms <= LONGEST_PAUSE_S * 1000 else 0


def _until_due_ms(now: Situation, rounds: RoundsConfig) -> int:
    """A last round that lies ahead says that the clock was set back: nobody waits for that."""
    if now.last_round_ms is None or now.last_round_ms > now.now_ms:
        return 0
    return max(0, now.last_round_ms + round(rounds.every_s * 1000) - now.now_ms)


def _seconds(ms: int) -> str:
    return f"{-(-ms // 1000)} s"


class RunControl(Protocol):
    """Who starts and ends Flower runs. Any call may raise ``Unreachable``."""

    def nodes(self) -> tuple[Node, ...]:
        """Every registered node."""
        ...

    def register(self, device_id: str, node_key: bytes) -> None:
        """Let the device with this key take part.

        Raises:
            Conflict: the key is another device's, or one that was unregistered.
        """
        ...

    def start_run(self, app: App, rounds: int) -> int:
        """Start a run; its id."""
        ...

    def stop_run(self, run_id: int) -> None:
        """End a run."""
        ...

    def run(self, run_id: int) -> Run:
        """How a run is.

        Raises:
            NotFound: there is none, as when the SuperLink's database is new.
        """
        ...

    def runs(self) -> tuple[Run, ...]:
        """The newest runs."""
        ...


class Scheduler:
    """Starts a run whenever :func:`next_step` says so, and sees it through.

    Args:
        config: when rounds run.
        app: what a run is of.
        link: starts and ends runs.
        registry: which rounds are committed.
        directory: the operator's word, the devices.
        process: the process that last ran a run.
        now_ms: this machine's clock.
        never_started: told of a run that nobody began, before the next is asked for.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        app: App,
        link: RunControl,
        registry: Registry,
        directory: Directory,
        process: Callable[[], ServerAppProcess | None],
        now_ms: Callable[[], int] = wall_ms,
        log: logging.Logger | None = None,
        never_started: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._app, self._link = config, app, link
        self._registry, self._directory, self._process = registry, directory, process
        self._now_ms, self._never_started = now_ms, never_started
        self._is_clean = False  # no run goes on that this scheduler does not know
        self._log = log or logging.getLogger(__name__)
        self._run_id: int | None = None
        self._asked_ms = 0
        self._round_before: int | None = None
        self._failures = 0
        self._not_before_ms = 0
        self._left_out: set[str] = set()
        self._told = ""
        self._told_round: int | None = None

    async def run(self, until: asyncio.Event) -> None:
        """Look every second, until somebody sets the event."""
        while not until.is_set():
            try:
                if not self._is_clean:
                    await asyncio.to_thread(self.end_old_runs)
                await asyncio.to_thread(self.look)
            except Unreachable as error:
                self._tell(f"the SuperLink is away: {error}")
            except Fedia3Error as error:
                self._tell(f"cannot schedule: {error}")
            except Exception:  # a fault of ours must not end the rounds either
                self._log.exception("cannot schedule")
            await _until_or(until, LOOK_EVERY_S)

    def end_old_runs(self) -> None:
        """End what an earlier scheduler left, or a lost answer: two runs at once waste work."""
        for run in self._link.runs():
            if run.state != "finished":
                self._log.info("ending run %d, which nobody here waits for", run.run_id)
                self._link.stop_run(run.run_id)
        if process := self._process():
            process.kill()
        self._directory.open_round(None)
        self._is_clean = True

    def look(self) -> Step:
        """Take one step; which one."""
        last = self._registry.latest_round()
        self._tell_round(last)
        step = next_step(self._situation(last, self._running(last)), self._config.rounds)
        match step:
            case Wait(reason):
                self._tell(reason)
            case Start(rounds):
                self._start(rounds, last)
            case Stop(run_id, reason):
                self._stop(run_id, reason)
                if self._process_of(run_id) is None:
                    self._never_started()
        return step

    def _situation(self, last: RoundRecord | None, running: Running | None) -> Situation:
        return Situation(
            now_ms=self._now_ms(),
            control=self._directory.round_control(),
            last_round_ms=None if last is None else _ms(last),
            online=self._online() if running is None else 0,
            running=running,
            not_before_ms=self._not_before_ms,
        )

    def _running(self, last: RoundRecord | None) -> Running | None:
        """The run that goes on, if any; one that is over is settled."""
        if self._run_id is None:
            return None
        try:
            run = self._link.run(self._run_id)
        except NotFound:
            run = Run(self._run_id, "finished", "the SuperLink has forgotten it")
        if run.state == "finished":
            self._settle(run, last)
            return None
        own = self._process_of(run.run_id)
        return Running(run, self._asked_ms, own, is_alive=own is not None and own.is_alive)

    def _online(self) -> int:
        """Enrolled devices online; those that Flower has forgotten are told to it again."""
        nodes = {node.name: node for node in self._link.nodes()}
        devices = self._directory.enrolled()
        for device in [d for d in devices if d.device_id not in nodes][:TOLD_AT_ONCE]:
            self._register(device)
        return sum(_is_online(nodes.get(device.device_id), device) for device in devices)

    def _register(self, device: Device) -> None:
        try:
            self._link.register(device.device_id, device.node_key)
        except Conflict as error:
            if device.device_id not in self._left_out:
                self._log.warning("device %s takes no part: %s", device.device_id, error)
            self._left_out.add(device.device_id)

    def _settle(self, run: Run, last: RoundRecord | None) -> None:
        """Forget a run that is over; pause before the next if it committed nothing."""
        number = None if last is None else last.round_num
        if number != self._round_before:
            self._failures = 0
        else:
            self._failures += 1
            pause_s = min(FIRST_PAUSE_S * 2 ** (self._failures - 1), LONGEST_PAUSE_S)
            self._not_before_ms = self._now_ms() + round(pause_s * 1000)
            self._log.warning("run %d ended (%s) without a round", run.run_id, run.ended_with)
            self._kill_process_of(run.run_id)
        self._run_id = None

    def _start(self, rounds: int, last: RoundRecord | None) -> None:
        self._round_before = None if last is None else last.round_num
        self._is_clean = False  # it may be started and the answer be lost
        self._run_id = self._link.start_run(self._app, rounds)
        self._is_clean = True
        self._asked_ms = self._now_ms()
        self._log.info("started run %d of up to %d rounds", self._run_id, rounds)
        self._tell("")

    def _stop(self, run_id: int, reason: str) -> None:
        self._log.warning("ending run %d: %s", run_id, reason)
        self._kill_process_of(run_id)
        self._link.stop_run(run_id)
        self._directory.open_round(None)

    def _process_of(self, run_id: int) -> ServerAppProcess | None:
        process = self._process()
        return process if process and process.run_id == run_id else None

    def _kill_process_of(self, run_id: int) -> None:
        if process := self._process_of(run_id):
            process.kill()

    def _tell(self, reason: str) -> None:
        """Keep the reason where the service finds it; log it where it is another one."""
        with contextlib.suppress(StorageFailed):  # a full disk must not end the schedule
            write_waiting(self._config.schedule_file, reason)
        kind = "".join(c for c in reason if not c.isdigit())
        if kind and kind != self._told:
            self._log.info("waiting: %s", reason)
        self._told = kind

    def _tell_round(self, last: RoundRecord | None) -> None:
        if last is None or last.round_num == self._told_round:
            return
        if self._told_round is not None:
            accepted = last.metrics.get("accepted", 0)
            asked = last.metrics.get("clients", 0)
            self._log.info(
                "round %d is committed: %.0f of %.0f devices", last.round_num, accepted, asked
            )
        self._told_round = last.round_num


async def _until_or(until: asyncio.Event, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(until.wait(), timeout_s)
    except TimeoutError:
        return


def _is_online(node: Node | None, device: Device) -> bool:
    return node is not None and node.online and node.public_key == device.node_key


def _ms(record: RoundRecord) -> int:
    return round(record.committed_at.timestamp() * 1000)


def write_waiting(path: Path, reason: str) -> None:
    """Note why the next round has not started; empty while one runs."""
    if read_waiting(path) != reason:
        write_private(path, json.dumps({"waiting_for": reason}).encode())


def read_waiting(path: Path) -> str:
    """Why the next round has not started, as the scheduler last noted it."""
    try:
        return str(json.loads(path.read_bytes())["waiting_for"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
