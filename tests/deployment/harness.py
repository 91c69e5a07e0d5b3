"""A whole deployment for tests: a coordinator and its devices as real processes, by their CLI."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedia3.coordinator.registry import Registry
from fedia3.processes import free_ports, read_statuses

PATIENCE_S = 120.0  # for what takes seconds on an idle machine
LIGHT_DEVICE = Path(__file__).with_name("light_device.py")


def eventually(
    condition: Callable[[], Any], what: str, within_s: float = PATIENCE_S, every_s: float = 0.25
) -> Any:
    """The condition's first true value."""
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        if value := condition():
            return value
        time.sleep(every_s)
    raise AssertionError(f"not within {within_s:g} s: {what}")


def fedia3(
    *words: str, home: Path, env: Mapping[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """One command, run to its end."""
    done = subprocess.run(
        [sys.executable, "-c", "from fedia3.cli import main; main()", *words],
        env={**os.environ, "FEDIA3_HOME": str(home), **(env or {})},
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    if check and done.returncode != 0:
        raise AssertionError(f"fedia3 {' '.join(words)}: {done.returncode}\n{done.stderr}")
    return done


def start(*words: str, home: Path, log: Path, env: Mapping[str, str] | None = None) -> psutil.Popen:
    """One command that stays."""
    with log.open("ab") as out:
        return psutil.Popen(
            [sys.executable, "-c", "from fedia3.cli import main; main()", *words],
            env={**os.environ, "FEDIA3_HOME": str(home), **(env or {})},
            stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip


def end(process: psutil.Popen | None, within_s: float = 30.0) -> None:
    """SIGTERM, and SIGKILL for who does not hear it."""
    if process is None or process.poll() is not None:
        return
    process.terminate()
    with contextlib.suppress(psutil.TimeoutExpired):
        process.wait(within_s)
    if process.poll() is None:
        process.kill()
        process.wait(10)


def tree(process: psutil.Process) -> list[psutil.Process]:
    """A process and all below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def named(process: psutil.Process | None, word: str) -> list[psutil.Process]:
    """Those of the tree whose command line holds ``word``."""
    found = []
    for each in tree(process) if process is not None else []:
        with contextlib.suppress(psutil.Error):
            if word in " ".join(each.cmdline()):
                found.append(each)
    return found


def cpu_s(parts_file: Path) -> dict[str, float]:
    """Processor seconds of each part of a coordinator so far, those of its children with it."""
    used = {}
    for part in read_statuses(parts_file):
        used[part.name] = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in tree(psutil.Process(part.pid)):
                times = process.cpu_times()
                used[part.name] += times.user + times.system
    return used


@dataclass
class RunningCoordinator:
    """A coordinator's folder and, while it serves, its supervisor."""

    folder: Path
    home: Path
    ports: tuple[int, int, int]  # services, fleet, SuperLink
    env: dict[str, str] = field(default_factory=dict)
    process: psutil.Popen | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    @property
    def log(self) -> Path:
        return self.folder / "serve.log"

    def cli(self, *words: str) -> Any:
        """``fedia3 coordinator WORDS --json`` of this coordinator, read."""
        config = str(self.folder / "coordinator.toml")
        done = fedia3(
            "coordinator", *words, "--config", config, "--json", home=self.home, env=self.env
        )
        return json.loads(done.stdout) if done.stdout.strip() else None

    def serve(self, *, wait: bool = True) -> None:
        config = str(self.folder / "coordinator.toml")
        self.process = start(
            "coordinator", "serve", "--config", config,
            home=self.home, log=self.log, env=self.env,
        )  # fmt: skip
        if wait:
            self.wait_until_up()

    def wait_until_up(self) -> None:
        def is_up() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the coordinator ended:\n{self.log.read_text()[-3000:]}")
            with contextlib.suppress(OSError, ValueError, KeyError):
                parts = json.loads((self.folder / "parts.json").read_text())["parts"]
                return all(part["state"] == "running" for part in parts)
            return False

        eventually(is_up, "the coordinator's parts run")

    def stop(self) -> None:
        end(self.process)
        self.process = None

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        self.process = None

    def invite(self, user: str) -> str:
        return str(self.cli("invite", "--user", user)["code"])

    def round_num(self) -> int:
        """The last committed round by the database itself, -1 before the first."""
        with Registry.open(self.folder / "registry") as registry:
            last = registry.latest_round()
            return -1 if last is None else last.round_num

    def last_accepted(self) -> list[str]:
        """Whose updates the last committed round folded in."""
        with Registry.open(self.folder / "registry") as registry:
            last = registry.latest_round()
            found = last.contributions if last else ()
            return sorted(c.client for c in found if c.verdict == "accepted")

    def last_cohort(self) -> list[str]:
        """Whom the last committed round asked."""
        with Registry.open(self.folder / "registry") as registry:
            last = registry.latest_round()
            return sorted(c.client for c in last.contributions) if last else []

    def wait_for_round(self, number: int, within_s: float = PATIENCE_S) -> None:
        eventually(lambda: self.round_num() >= number, f"round {number} is committed", within_s)


@dataclass
class RunningDevice:
    """A device's state folder and, while it runs, its agent."""

    state: Path
    home: Path
    user: str
    data: Path
    env: dict[str, str] = field(default_factory=dict)
    process: psutil.Popen | None = None

    @property
    def log(self) -> Path:
        return self.state.with_suffix(".log")

    @property
    def device_id(self) -> str:
        return str(json.loads((self.state / "device.json").read_text())["device_id"])

    def cli(self, *words: str) -> Any:
        done = fedia3(
            "client", *words, "--state", str(self.state), "--json", home=self.home, env=self.env
        )
        return json.loads(done.stdout) if done.stdout.strip() else None

    def enroll(self, address: str, code: str, ca: Path) -> None:
        fedia3(
            "client", "enroll", address, code, "--ca", str(ca), "--state", str(self.state),
            home=self.home, env=self.env,
        )  # fmt: skip

    def route(self, services: str, fleet: str) -> None:
        """Have the stopped device reach its coordinator by other addresses."""
        file = self.state / "device.json"
        known = json.loads(file.read_text())
        file.write_text(json.dumps({**known, "address": services, "fleet_address": fleet}))

    def run_light(self, *, share: bool = False) -> None:
        """With a trainer that costs nothing."""
        words = [str(self.state), str(self.data), *(["share"] if share else [])]
        with self.log.open("ab") as out:
            self.process = psutil.Popen(
                [sys.executable, str(LIGHT_DEVICE), *words],
                env={**os.environ, "FEDIA3_HOME": str(self.home), **self.env},
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip

    def run(self, *options: str) -> None:
        self.process = start(
            "client", "run", "--data", str(self.data), "--state", str(self.state), *options,
            home=self.home, log=self.log, env=self.env,
        )  # fmt: skip

    def stop(self) -> None:
        end(self.process)
        self.process = None


@dataclass
class Deployment:
    """What makes coordinators and devices, and ends all of them."""

    root: Path
    coordinators: list[RunningCoordinator] = field(default_factory=list)
    devices: list[RunningDevice] = field(default_factory=list)

    def coordinator(
        self, base: str, rounds: Mapping[str, object], training: Mapping[str, object] | None = None
    ) -> RunningCoordinator:
        """A new coordinator, not serving yet."""
        folder, home = self.root / "coordinator", self.root / "coordinator-home"
        home.mkdir(exist_ok=True)
        grpc, fleet, superlink = free_ports(3)
        fedia3(
            "coordinator", "init", str(folder), "--host", "127.0.0.1", "--bind", "127.0.0.1",
            "--base", base, "--grpc-port", str(grpc), "--fleet-port", str(fleet),
            "--superlink-port", str(superlink), home=home,
        )  # fmt: skip
        config = folder / "coordinator.toml"
        text = config.read_text()
        for section, values in (("rounds", rounds), ("training", training or {})):
            lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
            text = text.replace(f"[{section}]\n", f"[{section}]\n{lines}")
        config.write_text(text)
        made = RunningCoordinator(folder, home, (grpc, fleet, superlink))
        self.coordinators.append(made)
        return made

    def device(self, user: str, data: Path, *, home: Path | None = None) -> RunningDevice:
        """A new device, not enrolled yet."""
        home = home or self.root / "devices-home"
        home.mkdir(exist_ok=True)
        made = RunningDevice(self.root / f"device-{user}", home, user, data)
        self.devices.append(made)
        return made

    def close(self) -> None:
        for device in self.devices:
            device.stop()
        for coordinator in self.coordinators:
            coordinator.stop()


def light_deployment(
    root: Path,
    users: Sequence[str],
    *,
    coordinator_env: Mapping[str, str] | None = None,
    **rounds: object,
) -> Deployment:
    """A coordinator that serves and a light device of each user, enrolled, not running yet."""
    made = Deployment(root)
    coordinator = made.coordinator(
        "tiny", {"min_clients": 1, "quorum": 1, "deadline_s": 15.0, "cohort": len(users), **rounds}
    )
    coordinator.env.update(coordinator_env or {})
    coordinator.serve()
    for user in users:
        data = root / f"{user}.jsonl"
        data.write_text('{"text": "of no matter"}\n')
        device = made.device(user, data)
        device.enroll(coordinator.address, coordinator.invite(user), coordinator.folder / "ca.pem")
    return made
