"""A run killed again and again ends as one that never was, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fedia3.coordinator.registry import Registry
from fedia3.simulations.run import Run

pytestmark = pytest.mark.slow

PROGRAM = "from fedia3.cli import main; main()"
ROUNDS = 3
Moment = Callable[[str, Path], bool]  # (what the run said last, its folder): is it now?


def said(beginning: str) -> Moment:
    """When the run says so on stderr."""
    return lambda line, folder: line.startswith(beginning)


# (when, seconds later): before the folder is there, before round 1, in it, between rounds, in the
# last one, when personal parts are published, when they are judged, while the report is written
KILLS: list[tuple[Moment, float]] = [
    (said("run folder"), 0.0),
    (said("seed 0:"), 0.0),
    (said("seed 0:"), 0.15),
    (said("round 1 "), 0.0),
    (said("round 2 "), 0.08),
    (said("personalizing:"), 0.0),
    (said("testing global:"), 0.0),
    (said("testing another user's:"), 0.02),
]


def command(*arguments: object) -> list[str]:
    """``fedia3 simulate`` as a process of its own."""
    return [sys.executable, "-c", PROGRAM, "simulate", *map(str, arguments)]


def options(toy_folder: Path, chats: Path, out: Path) -> list[object]:
    """What starts the run; ``--resume`` alone goes on with it."""
    return [
        "--base", toy_folder, "--data", chats, "--out", out, "--rounds", ROUNDS, "--cohort", 3,
        "--max-length", 32, "--personal-epochs", 2,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """One thread: sums in another order would differ in the last bit."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


def killed(arguments: list[object], folder: Path, moment: Moment, later_s: float) -> str:
    """Start the run, kill it at the moment; the line it died behind."""
    process = subprocess.Popen(
        command(*arguments),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    assert process.stderr is not None
    heard = []
    for line in process.stderr:
        heard.append(line)
        if moment(line, folder):
            time.sleep(later_s)
            process.send_signal(signal.SIGKILL)
            break
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL, f"ended before it was killed: {''.join(heard)}"
    return heard[-1]


def finish(arguments: list[object]) -> dict[str, Any]:
    """Run to the end; what ``--json`` says."""
    done = subprocess.run(
        command(*arguments, "--json"),
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def comparable(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what the clock, the machine and the folder's name add."""
    facts = {k: v for k, v in report["facts"].items() if k not in ("seconds", "peak_memory")}
    return {**report, "facts": facts, "folder": None}


def everything(folder: Path) -> dict[str, Any]:
    """The registry: every version's digest and lineage, every round, the server state's bytes."""
    run = Run.open(folder)
    with Registry.open(run.folder.registry(0)) as registry:
        kept = {
            "versions": [asdict(record) for record in run.versions()],
            "rounds": [asdict(record) for record in registry.rounds()],
            "state": registry.server_state(),
        }
    for record in kept["versions"]:
        del record["created_at"]
    for record in kept["rounds"]:
        del record["committed_at"]
    return kept


def test_a_run_killed_eight_times_ends_as_one_that_was_not(
    toy_folder: Path, chats: Path, tmp_path: Path
):
    """
    SIGKILL before, in and between rounds, while personalizing and while judging; each time
    --resume goes on. Digests, server state, rounds and the report's figures are those of a run
    that nobody disturbed.
    """
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    expected = finish(options(toy_folder, chats, calm))
    for moment, later_s in KILLS:
        begun = (rough / "run.json").exists()
        arguments = ["--resume", rough] if begun else options(toy_folder, chats, rough)
        killed(arguments, rough, moment, later_s)
    report = finish(["--resume", rough])
    assert comparable(report) == comparable(expected)
    assert everything(rough) == everything(calm)
    versions = everything(rough)["versions"]
    assert sum(v["owner"]["kind"] == "global" for v in versions) == ROUNDS + 1


def test_two_processes_on_one_run_do_no_harm(toy_folder: Path, chats: Path, tmp_path: Path):
    """
    --resume while the run is still going: one of them may give up with a conflict, and what is
    in the registry is what one process would have left.
    """
    calm, shared = tmp_path / "calm", tmp_path / "shared"
    finish(options(toy_folder, chats, calm))
    killed(options(toy_folder, chats, shared), shared, said("seed 0:"), 0.0)
    both = [
        subprocess.Popen(
            command("--resume", shared),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        for _ in range(2)
    ]
    codes = {process.wait() for process in both}
    assert codes <= {0, 5}
    finish(["--resume", shared])
    assert everything(shared) == everything(calm)
