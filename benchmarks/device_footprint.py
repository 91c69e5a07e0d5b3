"""What a device costs its owner: memory, processor and network, idle and in a round.

    python benchmarks/device_footprint.py [--idle-s 120] [--base tiny] [--texts 100] [--json FILE]

A coordinator and one enrolled device run on this machine, by their command lines. After a first
round the device personalizes, is left alone for ``--idle-s``, and is asked for another round, each
looked at many times a second. Memory is resident set size (RSS) and the part of
it that belongs to the process alone (USS), in MB; what is shared is counted in each RSS. The
coordinator's own processes are not counted.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedia3.simulations.demo import demo_population

MAIN = (sys.executable, "-c", "from fedia3.cli import main; main()")
PATIENCE_S = 300.0
NAMES = {
    "client run": "agent",
    "trainer_process": "trainer",
    "flower-supernode": "supernode",
    "executor": "executor",
}


@dataclass
class Cost:
    """One process over a while; memory is the most that was seen, in MB."""

    rss: float = 0.0
    uss: float = 0.0
    cpu_s: float = 0.0
    began_cpu_s: dict[int, float] = field(default_factory=dict)  # by process id


def main() -> None:
    """The measurement."""
    options = _options()
    with (
        tempfile.TemporaryDirectory(prefix="footprint-") as folder,
        _deployment(Path(folder), options) as device,
    ):
        device.until(lambda s: s.get("choice") and s.get("last_round"), "a first round")
        device.until(lambda s: s.get("global_version") == 2, "the round's global adapter")
        since = device.status().get("personalized_ms") or 0
        personalizing = device.watched(  # on that adapter, about a minute later
            lambda s: (s.get("personalized_ms") or 0) > since, PATIENCE_S, every_s=0.1
        )
        device.until(lambda s: s.get("doing") is None, "idleness")
        before = device.status()["bytes_today"]
        idle = device.watched(lambda _: False, options.idle_s, every_s=1.0)
        idle_bytes = device.status()["bytes_today"] - before
        last = device.status()["last_round"]
        device.coordinator("run-now")
        device.until(lambda s: str(s.get("doing")).startswith("training"), "a round")
        began = time.monotonic()
        training = device.watched(lambda s: s.get("last_round") != last, PATIENCE_S, every_s=0.05)
        facts = {
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors",
            "python": platform.python_version(),
            "base": options.base,
            "texts": options.texts,
            "idle_s": options.idle_s,
            "idle": _plain(idle),
            "idle_bytes": idle_bytes,
            "training_s": time.monotonic() - began,
            "training": _plain(training),
            "personalizing": _plain(personalizing),
        }
    _tell(facts)
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--idle-s", type=float, default=120.0)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Device:
    """A running device, seen from outside."""

    def __init__(self, folder: Path, process: psutil.Popen) -> None:
        self._folder, self._process = folder, process

    def status(self) -> Mapping[str, Any]:
        """What it says of itself."""
        with contextlib.suppress(OSError, ValueError):
            found: Mapping[str, Any] = json.loads(
                (self._folder / "state" / "status.json").read_text()
            )
            return found
        return {}

    def coordinator(self, *words: str) -> None:
        """One command of its coordinator."""
        _run("coordinator", *words, "--config", str(self._folder / "fed"))

    def until(self, holds: Callable[[Mapping[str, Any]], Any], what: str) -> None:
        """Wait."""
        ends = time.monotonic() + PATIENCE_S
        while not holds(self.status()):
            if time.monotonic() > ends:
                sys.exit(f"not within {PATIENCE_S:g} s: {what}; {self.status().get('line')}")
            time.sleep(0.05)

    def watched(
        self, over: Callable[[Mapping[str, Any]], Any], longest_s: float, *, every_s: float
    ) -> dict[str, Cost]:
        """What its processes cost until ``over``, or for so long."""
        costs: dict[str, Cost] = {}
        ends = time.monotonic() + longest_s
        while time.monotonic() < ends and not over(self.status()):
            for process in (self._process, *self._process.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    _look(process, costs)
            time.sleep(every_s)
        return costs


def _look(process: psutil.Process, costs: dict[str, Cost]) -> None:
    words = " ".join(process.cmdline())
    name = next((known for part, known in NAMES.items() if part in words), None)
    if name is None:
        return
    cost = costs.setdefault(name, Cost())
    memory, times = process.memory_full_info(), process.cpu_times()
    cost.rss, cost.uss = max(cost.rss, memory.rss / 1e6), max(cost.uss, memory.uss / 1e6)
    spent = times.user + times.system
    began = cost.began_cpu_s.setdefault(process.pid, spent)
    cost.cpu_s = max(cost.cpu_s, spent - began)


def _plain(costs: Mapping[str, Cost]) -> dict[str, dict[str, float]]:
    return {
        name: {k: round(v, 2) for k, v in asdict(cost).items() if k != "began_cpu_s"}
        for name, cost in costs.items()
    }


def _tell(facts: Mapping[str, Any]) -> None:
    print("| process | idle RSS | idle USS | idle CPU | in a round RSS | personalizing RSS |")
    print("|---|---|---|---|---|---|")
    totals = [0.0] * 5
    for name in sorted(facts["idle"]):
        idle, busy, own = (
            facts[phase].get(name, {}) for phase in ("idle", "training", "personalizing")
        )
        share = 100 * idle["cpu_s"] / facts["idle_s"]
        row = [idle["rss"], idle["uss"], share, busy.get("rss", 0.0), own.get("rss", 0.0)]
        totals = [total + value for total, value in zip(totals, row, strict=True)]
        _row(name, row)
    _row("all", totals)
    a_day = facts["idle_bytes"] / facts["idle_s"] * 86400 / 1e6
    print(f"\nMB; CPU in percent of one processor. Idle network: {a_day:.1f} MB a day, both ways.")


def _row(name: str, row: list[float]) -> None:
    rss, uss, share, busy, own = row
    print(f"| {name} | {rss:.0f} | {uss:.0f} | {share:.1f}% | {busy:.0f} | {own:.0f} |")


@contextmanager
def _deployment(folder: Path, options: argparse.Namespace) -> Iterator[Device]:
    """A coordinator and its one device; rounds come when they are asked for."""
    grpc, fleet, superlink = map(str, _free_ports(3))
    fed, state, data = folder / "fed", folder / "state", folder / "texts.jsonl"
    rows = demo_population(1, options.texts)
    data.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    _run("coordinator", "init", str(fed), "--host", "127.0.0.1", "--base", options.base,
         "--grpc-port", grpc, "--fleet-port", fleet, "--superlink-port", superlink)  # fmt: skip
    settings = fed / "coordinator.toml"
    ours = "[rounds]\nmin_clients = 1\nquorum = 1\nevery_s = 86400\n"
    settings.write_text(settings.read_text().replace("[rounds]\n", ours))
    with _running(folder / "serve.log", "coordinator", "serve", "--config", str(fed)):
        code = _invited(fed)
        _run("client", "enroll", f"127.0.0.1:{grpc}", code, "--ca", str(fed / "ca.pem"),
             "--state", str(state))  # fmt: skip
        words = ("client", "run", "--data", str(data), "--state", str(state))
        with _running(folder / "run.log", *words) as process:
            yield Device(folder, process)


def _invited(fed: Path) -> str:
    """A code, once the coordinator is up."""
    ends = time.monotonic() + PATIENCE_S
    while True:
        try:
            told = _run("coordinator", "invite", "--user", "owner", "--config", str(fed), "--json")
            return str(json.loads(told)["code"])
        except subprocess.CalledProcessError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.5)


def _run(*words: str) -> str:
    done = subprocess.run([*MAIN, *words], check=True, capture_output=True, text=True)
    return done.stdout


@contextmanager
def _running(log: Path, *words: str) -> Iterator[psutil.Popen]:
    with log.open("wb") as out:
        process = psutil.Popen([*MAIN, *words], stdout=out, stderr=out)
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        with contextlib.suppress(psutil.Error):
            process.kill()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


if __name__ == "__main__":
    main()
