"""Child processes that are kept running: started, watched, started again, stopped whole.

Each part is a process group of its own, so that a terminal's Ctrl-C reaches only the supervisor and
what a part leaves behind is found and ended. A part whose supervisor is killed dies with it where
the system can do that (Linux); elsewhere, and for a part's own children, the next supervisor ends
what the status file names before it starts anything.
"""

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import random
import secrets
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from fedia3.errors import Conflict, NotFound, StorageFailed
from fedia3.private_files import write_private

State = Literal["stopped", "starting", "running", "waiting"]

MARK = "FEDIA3_SUPERVISOR"  # in a part's environment: whose it is
READY_EVERY_S = 0.2
LOOK_EVERY_S = 10.0  # at a part that is up
ANSWERS_WITHIN_S = 10.0  # for one look
LOG_BYTES = 16 << 20  # of a part's log; the piece before it is kept beside it
PR_SET_PDEATHSIG = 1
OWN_PORTS = range(10_000, 32_768)  # what no system gives to connections

Report = Callable[[], None]


@dataclass(frozen=True)
class Backoff:
    """How long a part that ended is left alone before it is started again."""

    first_s: float = 0.5  # doubled with every death in a row
    longest_s: float = 30.0
    healthy_s: float = 60.0  # who lived so long has its next death counted as the first

    def pause_s(self, deaths: int) -> float:
        """Before the start that follows the ``deaths``-th death in a row."""
        return float(
            min(self.first_s * 2 ** min(deaths - 1, 30), max(self.longest_s, self.first_s))
        )


@dataclass(frozen=True)
class Part:
    """A program to keep running."""

    name: str
    command: tuple[str, ...]
    log: Path  # what it prints, appended
    env: Mapping[str, str] = field(default_factory=dict)  # beside the supervisor's own
    ready: Callable[[], Awaitable[bool]] | None = None  # asked until it says yes
    backoff: Backoff = Backoff()
    grace_s: float | None = None  # to end by itself, where it is less than the supervisor's
    hung_s: float | None = None  # without a yes for so long it is killed; None: asked once


@dataclass(frozen=True)
class PartStatus:
    """How a part is doing, as the status file has it."""

    name: str
    state: State = "stopped"
    pid: int | None = None
    started: str | None = None  # the process's birth
    restarts: int = 0
    last_exit: str = ""  # "signal 9", "status 1"


class Supervisor:
    """Keeps ``parts`` running in an asyncio loop; ``status_file`` says how they are.

    The status file is replaced at every change. It is also how a new supervisor finds what a killed
    one left, so one file belongs to one supervisor at a time.
    """

    def __init__(
        self, parts: Sequence[Part], status_file: Path, log: logging.Logger | None = None
    ) -> None:
        self._log = log or logging.getLogger(__name__)
        self._file = status_file
        self._mark = secrets.token_hex(16)
        self._disk_refused = False
        self._keepers = {
            part.name: _Keeper(part, self._mark, self._write, self._log) for part in parts
        }

    async def start(self) -> None:
        """End what an earlier supervisor left, then begin to keep the parts."""
        await asyncio.to_thread(self.end_leftovers)
        for keeper in self._keepers.values():
            keeper.start()

    def end_leftovers(self) -> None:
        """End what an earlier supervisor with this status file left, and say so."""
        for line in end_leftovers(self._file):
            self._log.warning("%s", line)

    async def stop(self, grace_s: float = 10.0) -> None:
        """End the parts, the last one first; who needs longer than ``grace_s`` is killed."""
        for keeper in reversed(self._keepers.values()):
            await keeper.stop(grace_s)

    def start_part(self, name: str) -> None:
        """Keep one part from now on; nothing changes where it is kept already.

        Raises:
            NotFound: there is no such part.
        """
        self._keeper(name).start()

    async def stop_part(self, name: str, grace_s: float = 10.0) -> None:
        """End one part and leave it ended.

        Raises:
            NotFound: there is no such part.
        """
        await self._keeper(name).stop(grace_s)

    def kill_part(self, name: str, reason: str) -> None:
        """End a part that lives and does its work no more; it is started again.

        Raises:
            NotFound: there is no such part.
        """
        self._keeper(name).kill(reason, f"{name}: {reason}; killing it")

    async def wait_ready(self, timeout_s: float, only: Collection[str] | None = None) -> bool:
        """Whether these parts run within ``timeout_s``; None: all."""
        wanted = [k for name, k in self._keepers.items() if only is None or name in only]
        ends = time.monotonic() + timeout_s
        while not (ready := all(k.status.state == "running" for k in wanted)):
            if time.monotonic() >= ends:
                break
            await asyncio.sleep(READY_EVERY_S / 4)
        return ready

    def statuses(self) -> tuple[PartStatus, ...]:
        """How each part is now."""
        return tuple(keeper.status for keeper in self._keepers.values())

    def status(self, name: str) -> PartStatus:
        """How one part is now.

        Raises:
            NotFound: there is no such part.
        """
        return self._keeper(name).status

    def _keeper(self, name: str) -> "_Keeper":
        try:
            return self._keepers[name]
        except KeyError as error:
            raise NotFound(f"no part {name!r}; there are: {', '.join(self._keepers)}") from error

    def _write(self) -> None:
        try:
            _write_statuses(self._file, self._mark, self.statuses())
            self._disk_refused = False
        except StorageFailed as error:  # a full disk must not end what runs
            if not self._disk_refused:
                self._log.warning("%s", error)
            self._disk_refused = True


class _Keeper:
    """One part over all the lives of its process."""

    def __init__(self, part: Part, mark: str, changed: Report, log: logging.Logger) -> None:
        self.status = PartStatus(part.name)
        self._part = part
        self._mark = mark
        self._changed = changed
        self._log = log
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._killed_for = ""

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._keep(), name=self._part.name)
            self._task.add_done_callback(self._lost)

    async def stop(self, grace_s: float) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._process is not None:  # also of a stop that was given up
            await self._end(self._process, min(grace_s, self._part.grace_s or grace_s))
            self._process = None
        if self.status.state != "stopped":
            self._tell(state="stopped", pid=None, started=None)

    def kill(self, reason: str, line: str) -> None:
        """End this life; the next one begins when its time comes."""
        if self._process is not None:
            self._log.warning("%s", line)
            self._killed_for = reason
            _signal_group(self._process.pid, signal.SIGKILL)

    def _lost(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._log.critical("%s is kept no more", self._part.name, exc_info=error)

    async def _keep(self) -> None:
        deaths = 0
        while True:
            born = time.monotonic()
            ended = await self._live()
            healthy = time.monotonic() - born >= self._part.backoff.healthy_s
            deaths = 1 if healthy else deaths + 1
            pause_s = self._part.backoff.pause_s(deaths)
            self._log.warning(
                "%s ended with %s; starting it again in %g s", self._part.name, ended, pause_s
            )
            restarts = self.status.restarts + 1
            self._tell(state="waiting", pid=None, started=None, restarts=restarts, last_exit=ended)
            await asyncio.sleep(pause_s)

    async def _live(self) -> str:
        """One life of the process; what it ended with."""
        try:
            self._process = process = await _spawn(self._part, self._mark)
        except OSError as error:
            return f"no start ({error.strerror}: {self._part.command[0]})"
        self._killed_for = ""
        self._tell(state="starting", pid=process.pid, started=birth(process.pid))
        watching = asyncio.create_task(self._watch(time.monotonic()))
        try:
            await process.wait()
        finally:
            watching.cancel()
        self._process = None
        _signal_group(process.pid, signal.SIGKILL)  # what it left behind
        return self._killed_for or _named_exit(process.returncode)

    async def _watch(self, born: float) -> None:
        """Say when it is ready, then keep its log small and see that it answers."""
        while not await self._answers():
            self._require_answer(born)
            await asyncio.sleep(READY_EVERY_S)
        self._tell(state="running")
        self._log.info("%s is up after %.1f s", self._part.name, time.monotonic() - born)
        heard = time.monotonic()
        while True:
            await asyncio.sleep(min(LOOK_EVERY_S, (self._part.hung_s or LOOK_EVERY_S) / 4))
            with contextlib.suppress(OSError):
                _keep_small(self._part.log)
            if self._part.hung_s is None or await self._answers():
                heard = time.monotonic()
            self._require_answer(heard)

    async def _answers(self) -> bool:
        if self._part.ready is None:
            return True
        within_s = min(ANSWERS_WITHIN_S, self._part.hung_s or ANSWERS_WITHIN_S)
        try:
            return await asyncio.wait_for(self._part.ready(), within_s)
        except (OSError, TimeoutError):
            return False

    def _require_answer(self, heard: float) -> None:
        hung_s = self._part.hung_s
        if hung_s is not None and time.monotonic() - heard > hung_s:
            silence = f"no answer for {hung_s:g} s"
            self.kill(silence, f"{self._part.name} lives, but gave {silence}; killing it")

    async def _end(self, process: asyncio.subprocess.Process, grace_s: float) -> None:
        _signal_group(process.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), grace_s)
            self._log.info("%s stopped", self._part.name)
        except TimeoutError:
            self._log.warning("%s did not stop within %g s; killing it", self._part.name, grace_s)
        _signal_group(process.pid, signal.SIGKILL)
        await process.wait()

    def _tell(self, **changes: Any) -> None:
        self.status = replace(self.status, **changes)
        self._changed()


async def _spawn(part: Part, mark: str) -> asyncio.subprocess.Process:
    with _opened_log(part.log) as log:
        return await asyncio.create_subprocess_exec(
            *part.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**environment(), **part.env, MARK: mark},
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),
        )


def environment() -> dict[str, str]:
    """This process's, with the programs beside its Python found first."""
    own = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": os.pathsep.join([own, os.environ.get("PATH", os.defpath)])}


def _die_with(parent: int) -> Callable[[], None] | None:
    """Runs in the child before its program: have the system kill it when ``parent`` is gone."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # loaded here: between fork and exec nothing may be

    def ask_for_death() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it went in between
            os._exit(1)

    return ask_for_death


def _opened_log(path: Path) -> IO[bytes]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        _keep_small(path)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")


def _keep_small(path: Path) -> None:
    """Move a log that grew too long aside; its writer goes on in the emptied file."""
    if path.stat().st_size > LOG_BYTES:
        older = path.with_name(f"{path.name}.1")
        older.unlink(missing_ok=True)
        with os.fdopen(os.open(older, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(path.read_bytes())
        os.truncate(path, 0)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _named_exit(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"status {code}"


def birth(pid: int) -> str | None:
    """What tells this process from every other that has or had its number; None: there is none.

    On Linux the boot and the clock ticks since: times of day move when the clock is set.
    """
    try:
        if sys.platform == "linux":
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            # behind the name, which is in brackets and may hold anything
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return f"{boot} {fields[19]}"
        return str(psutil.Process(pid).create_time())
    except (OSError, psutil.Error):
        return None


def read_statuses(path: Path) -> tuple[PartStatus, ...]:
    """What a supervisor last wrote; empty where none has."""
    return _read(path)[1]


def _write_statuses(path: Path, mark: str, statuses: Sequence[PartStatus]) -> None:
    facts = {"mark": mark, "parts": [asdict(status) for status in statuses]}
    write_private(path, json.dumps(facts, indent=1).encode(), lasting=False)


def _read(path: Path) -> tuple[str, tuple[PartStatus, ...]]:
    try:
        facts = json.loads(path.read_bytes())
        return facts["mark"], tuple(PartStatus(**part) for part in facts["parts"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", ()


def end_leftovers(status_file: Path) -> list[str]:
    """Kill what a supervisor that is gone left running; a line about each.

    A process is only killed for what it is: the one whose birth the file has, or one that carries
    that supervisor's mark. A number that the system has given to somebody else since proves
    nothing.
    """
    mark, statuses = _read(status_file)
    lines = []
    for status in statuses:
        if status.pid is None:
            continue
        for process in _left_of(status, mark):
            with contextlib.suppress(psutil.Error):
                process.kill()
                process.wait(5)
                lines.append(f"ended process {process.pid} that an earlier {status.name} left")
    return lines


def _left_of(status: PartStatus, mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == status.pid and _is_left(process, status, mark):
                yield process


def _is_left(process: psutil.Process, status: PartStatus, mark: str) -> bool:
    is_part = process.pid == status.pid and birth(process.pid) == status.started
    return is_part or process.environ().get(MARK) == mark


def free_ports(count: int) -> list[int]:
    """Ports of this machine's loopback that nobody has, for parts that will listen on them.

    They lie outside of what the system gives to connections (Linux: from 32768 on; others: from
    49152): a connection that got one before the part listens would shut it out while it lasts.

    Raises:
        Conflict: there are not that many.
    """
    with contextlib.ExitStack() as held:
        found = list[int]()
        for port in random.sample(OWN_PORTS, len(OWN_PORTS)):
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
            if len(found) == count:
                return found
    raise Conflict(f"{count} ports of {OWN_PORTS[0]} to {OWN_PORTS[-1]} are wanted, not all free")
