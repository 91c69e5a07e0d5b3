"""When a device may work, and when it may use the network: what its owner wants, against facts.

The decisions are pure; the probes that find the facts stand below them. What a system does not
tell (no battery, no logins) never keeps a device from working.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from datetime import time as clock_time
from pathlib import Path
from threading import Lock

import psutil

from fedia3.errors import BadSetting, StorageFailed
from fedia3.private_files import write_private

INPUT_AGE_S = 120.0  # an owner who has touched nothing for so long is away
OTHERS_SHARE = 0.25  # of all processors; programs that use more are being waited for
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class QuietHours:
    """Hours in which a device does nothing; past midnight where the end is the earlier."""

    begin: clock_time
    end: clock_time

    @classmethod
    def parse(cls, text: str) -> "QuietHours":
        """``22:00-07:00``.

        Raises:
            BadSetting: it is something else.
        """
        try:
            begin, end = (clock_time.fromisoformat(part.strip()) for part in text.split("-"))
        except ValueError as error:
            raise BadSetting(f"quiet hours are written 22:00-07:00, got {text!r}") from error
        if begin == end:
            raise BadSetting(f"quiet hours begin and end at different times, got {text!r}")
        return cls(begin, end)

    def cover(self, now: clock_time) -> bool:
        """Whether ``now`` lies in them; their end does not."""
        if self.begin < self.end:
            return self.begin <= now < self.end
        return now >= self.begin or now < self.end

    def __str__(self) -> str:
        return f"{self.begin:%H:%M}-{self.end:%H:%M}"


@dataclass(frozen=True)
class Conditions:
    """What the owner wants."""

    only_when_idle: bool = False
    on_ac_power: bool = False
    quiet_hours: QuietHours | None = None
    max_bytes_a_day: int | None = None


@dataclass(frozen=True)
class Facts:
    """How the machine is; None where the system does not tell."""

    local_time: clock_time
    is_paused: bool = False
    on_battery: bool | None = None
    input_age_s: float | None = None  # since somebody last typed
    others_share: float | None = None  # of all processors, that other programs use, from 0 to 1
    bytes_today: int = 0


def why_not(wanted: Conditions, facts: Facts) -> str | None:
    """Why nothing may be done now; None: go on."""
    if facts.is_paused:
        return "paused by its owner"
    if wanted.quiet_hours is not None and wanted.quiet_hours.cover(facts.local_time):
        return f"quiet hours until {wanted.quiet_hours.end:%H:%M}"
    if wanted.on_ac_power and facts.on_battery:
        return "on battery power"
    return _why_not_idle(facts) if wanted.only_when_idle else None


def _why_not_idle(facts: Facts) -> str | None:
    if facts.input_age_s is not None and facts.input_age_s < INPUT_AGE_S:
        return "somebody is using this machine"
    if facts.others_share is not None and facts.others_share > OTHERS_SHARE:
        return f"other programs use {facts.others_share:.0%} of the processor"
    return None


def why_offline(wanted: Conditions, facts: Facts) -> str | None:
    """Why the network may not be used now; work on the device goes on."""
    if wanted.max_bytes_a_day is not None and facts.bytes_today >= wanted.max_bytes_a_day:
        return (
            f"{facts.bytes_today / 1e6:.1f} MB went over the network today, "
            f"{wanted.max_bytes_a_day / 1e6:.1f} MB may"
        )
    return None


def parse_bytes(text: str) -> int:
    """``50MB``, ``1.5 GiB`` or ``1000`` as bytes.

    Raises:
        BadSetting: it is something else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?|)b?\s*", text.lower())
    if found is None:
        raise BadSetting(f"a number of bytes is written 50MB, 1.5GiB or 1000, got {text!r}")
    return round(float(found[1]) * UNITS[found[2]])


# --- facts ----------------------------------------------------------------------------------


class Probes:
    """Finds the facts on this machine; ``own`` are the processes whose load is not others'."""

    def __init__(self, own: Callable[[], Iterable[psutil.Process]] | None = None) -> None:
        self._own = own or _own_processes
        self._spent: dict[int, float] = {}  # s of processor time by process
        self._busy, self._wall = _busy_s(), time.monotonic()

    def facts(self, *, is_paused: bool, bytes_today: int) -> Facts:
        """How the machine is now; the processor's load is that since the last call."""
        return Facts(
            local_time=clock_time(*time.localtime()[3:5]),
            is_paused=is_paused,
            on_battery=on_battery(),
            input_age_s=input_age_s(),
            others_share=self._others_share(),
            bytes_today=bytes_today,
        )

    def _others_share(self) -> float | None:
        busy, wall = _busy_s(), time.monotonic()
        spent = {process.pid: _spent_s(process) for process in self._own()}
        own = sum(max(0.0, s - self._spent.get(pid, 0.0)) for pid, s in spent.items())
        passed = (wall - self._wall) * (os.cpu_count() or 1)
        others = busy - self._busy - own
        self._spent, self._busy, self._wall = spent, busy, wall
        return min(1.0, max(0.0, others / passed)) if passed > 0 else None


def _busy_s() -> float:
    times = psutil.cpu_times()
    # guest time is part of user time; waiting for a disk is no work
    idle = times.idle + getattr(times, "iowait", 0.0)
    return float(
        sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    )


def _own_processes() -> list[psutil.Process]:
    me = psutil.Process()
    try:
        return [me, *me.children(recursive=True)]
    except psutil.Error:  # one of them ended in between
        return [me]


def _spent_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def on_battery() -> bool | None:
    """Whether the machine runs on its battery; None where it has none."""
    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, RuntimeError):
        return None
    return None if battery is None else battery.power_plugged is False


def input_age_s() -> float | None:
    """Seconds since somebody used a terminal or, where logind knows, the desktop."""
    ages = [age for age in (_terminal_age_s(), _desktop_age_s()) if age is not None]
    return min(ages, default=None)


def _terminal_age_s() -> float | None:
    used = [_used_at(Path("/dev") / user.terminal) for user in psutil.users() if user.terminal]
    last = max((at for at in used if at is not None), default=None)
    return None if last is None else max(0.0, time.time() - last)


def _used_at(terminal: Path) -> float | None:
    try:
        return terminal.stat().st_atime
    except OSError:
        return None


def _desktop_age_s() -> float | None:
    command = ("loginctl", "show-user", str(os.getuid()), "-p", "IdleHint", "-p", "IdleSinceHint")
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return idle_age_s(told.stdout, time.time())


def idle_age_s(told: str, now_s: float) -> float | None:
    """What logind's ``IdleHint`` and ``IdleSinceHint`` (µs since 1970) say."""
    fields = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
    since = fields.get("IdleSinceHint", "")
    if fields.get("IdleHint") == "no":
        # a desktop that never reports idleness says so too: with time 0
        return 0.0 if since.isdigit() and int(since) else None
    if fields.get("IdleHint") == "yes" and since.isdigit():
        return max(0.0, now_s - int(since) / 1e6)
    return None


class DayBytes:
    """Bytes over the network today, kept in a file so that a restart forgets none.

    A crash loses what came since the last :meth:`save`. May be used by several threads.
    """

    SAVE_EVERY = 1 << 18  # bytes

    def __init__(self, path: Path, today: Callable[[], date] = date.today) -> None:
        self._path, self._today, self._lock = path, today, Lock()
        self._day, self._bytes = _read_day(path)
        self._saved = self._bytes

    def add(self, count: int) -> None:
        """So many more, in or out."""
        with self._lock:
            self._turn()
            self._bytes += count
            due = self._bytes - self._saved >= self.SAVE_EVERY
        if due:
            self.save()

    @property
    def count(self) -> int:
        """Today's bytes so far."""
        with self._lock:
            self._turn()
            return self._bytes

    def save(self) -> None:
        """Write it down; a disk that refuses is no reason to stop."""
        with self._lock:
            if self._saved == self._bytes:
                return
            facts = json.dumps({"day": self._day, "bytes": self._bytes})
            self._saved = self._bytes
        try:
            write_private(self._path, facts.encode())
        except StorageFailed:
            return

    def _turn(self) -> None:
        day = self._today().isoformat()
        if day != self._day:
            self._day, self._bytes, self._saved = day, 0, -1


def _read_day(path: Path) -> tuple[str, int]:
    try:
        facts = json.loads(path.read_bytes())
        return str(facts["day"]), int(facts["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", 0
