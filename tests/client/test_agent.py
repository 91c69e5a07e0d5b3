"""A device's agent, alone: it learns without a coordinator, tells its owner, and leaves nothing."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedia3.client.agent import Grown, aside, is_due, silent_since
from fedia3.client.device import DeviceFolder, Enrolment
from fedia3.client.device_status import DeviceStatus
from fedia3.client.personal_store import Judged, KeptPart
from fedia3.coordinator.certificates import make_authority

PATIENCE_S = 120.0


def kept(global_digest: str, data_digest: str) -> KeptPart:
    """A part that grew on these."""
    judged = Judged("personal", 2.0, 1.0, 9, data_digest, 0)
    return KeptPart("p", "b", "s", global_digest, judged)


@pytest.mark.parametrize(
    ("part", "is_asked", "rested", "due"),
    [
        (None, False, True, True),
        (kept("g1", "d1"), False, True, False),
        (kept("g0", "d1"), False, True, True),
        (kept("g1", "d0"), False, True, True),
        (kept("g0", "d1"), False, False, False),
        (kept("g1", "d1"), True, False, True),
    ],
)
def test_a_part_is_due_after_a_new_global_or_new_text(
    part: KeptPart | None, is_asked: bool, rested: bool, due: bool
):
    """
    Once the device has rested; its owner's word counts at once.
    """
    assert is_due(part, Grown("g1", "d1"), is_asked=is_asked, rested=rested) is due


@pytest.mark.parametrize(
    ("missed_ms", "heard_ms", "since_ms"),
    [(None, None, None), (None, 5, None), (3, None, 3), (3, 2, 3), (3, 5, None)],
)
def test_a_coordinator_that_was_heard_again_is_not_silent(
    missed_ms: int | None, heard_ms: int | None, since_ms: int | None
):
    """
    A round that reached the device says so before the next look at everyone's adapter.
    """
    assert silent_since(missed_ms, heard_ms) == since_ms


def test_work_aside_comes_back_with_its_result_or_its_error():
    """
    As if it had been called here.
    """

    async def both() -> int:
        with pytest.raises(ZeroDivisionError):
            await aside(lambda: 1 // 0)
        return await aside(lambda: 7)

    assert asyncio.run(both()) == 7


class Client:
    """``fedia3 client`` on one state folder, as processes."""

    def __init__(self, folder: Path, base: Path, texts: int = 12) -> None:
        self.state, self.data, self._base = folder / "state", folder / "text", base
        self.data.mkdir(parents=True, exist_ok=True)
        self.write(texts)
        self.process: subprocess.Popen[bytes] | None = None

    def write(self, count: int, name: str = "chat.jsonl") -> None:
        rows = (json.dumps({"text": f"aab aab {n}"}) + "\n" for n in range(count))
        (self.data / name).write_text("".join(rows))

    def cli(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*MAIN, "client", *words, "--state", str(self.state)],
            capture_output=True, text=True, timeout=PATIENCE_S, check=check,
        )  # fmt: skip

    def start(self, *options: str) -> None:
        words = ["run", "--data", str(self.data), "--state", str(self.state), *options]
        words += ["--base", str(self._base), "--personal-every", "1"]
        with (self.state.parent / "run.log").open("ab") as log:
            self.process = subprocess.Popen([*MAIN, "client", *words], stderr=log, stdout=log)

    def status(self) -> DeviceStatus | None:
        return DeviceStatus.read(self.state / "status.json")

    def until(self, holds: Callable[[DeviceStatus], Any], within_s: float = PATIENCE_S) -> Any:
        """What ``holds`` says of the status once it says something true."""
        ends = time.monotonic() + within_s
        while time.monotonic() < ends:
            found = self.status()
            if found is not None and (value := holds(found)):
                return value
            time.sleep(0.1)
        log = (self.state.parent / "run.log").read_text()
        logs = "".join(p.read_text() for p in (self.state / "logs").glob("*.log"))
        pytest.fail(f"not within {within_s:g} s; {self.status()}\n{log}\n{logs}")

    def trainer(self) -> psutil.Process:
        (part,) = json.loads((self.state / "trainer-parts.json").read_text())["parts"]
        return psutil.Process(part["pid"])

    def tree(self) -> list[psutil.Process]:
        assert self.process is not None
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def stop(self) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(60)


MAIN = (sys.executable, "-c", "from fedia3.cli import main; main()")


@pytest.fixture
def client(toy_folder: Path, tmp_path: Path) -> Iterator[Client]:
    """A device with twelve texts that is not enrolled; whatever it started is ended."""
    made = Client(tmp_path, toy_folder)
    yield made
    if made.process is not None:
        made.process.send_signal(signal.SIGKILL)
        made.process.wait(10)


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.slow
def test_a_device_alone_learns_from_its_text_and_its_owner_sees_it(client: Client):
    """
    Without enrolment: the own part is trained on the base as it is; new text trains it anew; a
    second agent is refused; SIGTERM leaves no process.
    """
    client.start()
    client.until(lambda s: s.choice)
    assert client.status().line == "not enrolled; learning on this device alone"
    first = client.until(lambda s: s.personalized_ms)
    other = client.cli("run", "--data", str(client.data), check=False)
    assert (other.returncode, "another agent" in other.stderr) == (5, True)
    client.write(15)
    client.until(lambda s: s.texts == 15 and s.personalized_ms > first)
    told = json.loads(client.cli("status", "--json").stdout)
    assert (told["is_running"], told["texts"]) == (True, 15)
    assert set(told["losses"]) == {"base", "global", "personal"}
    processes = client.tree()
    assert client.stop() == 0
    assert all(is_gone(process) for process in processes)
    assert client.cli("status").stdout.startswith("not running")


@pytest.mark.slow
def test_a_killed_trainer_comes_back_and_nothing_learned_is_lost(client: Client):
    """
    Its base is loaded again by itself; the owner may ask for their part at once.
    """
    client.start()
    first = client.until(lambda s: s.personalized_ms)
    trainer = client.trainer()
    trainer.kill()
    asked = client.cli("personalize", "--json")
    assert json.loads(asked.stdout)["personalized_ms"] > first
    assert client.trainer().pid != trainer.pid


@pytest.mark.slow
def test_a_killed_agent_leaves_nothing_running(client: Client):
    """
    Its trainer dies with it, and the next agent goes on from the same folder.
    """
    client.start()
    client.until(lambda s: s.personalized_ms)
    processes = client.tree()
    assert client.process is not None
    client.process.kill()
    client.process.wait(10)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.wait(10)
    assert all(is_gone(process) for process in processes)
    client.start()
    client.until(lambda s: s.pid == client.process.pid and s.trainer == "running" and s.choice)


@pytest.mark.slow
def test_a_paused_device_does_nothing_and_a_forgetful_one_keeps_nothing(client: Client):
    """
    Pausing lets the trainer go; forgetting leaves no part, no log line and no loss behind, and the
    text as it was.
    """
    client.start()
    client.until(lambda s: s.choice)
    client.cli("pause")
    client.until(lambda s: s.line == "waiting: paused by its owner")
    client.until(lambda s: len(client.tree()) == 1)
    forgotten = json.loads(client.cli("forget", "--json").stdout)
    assert forgotten["files"] >= 2
    assert not (client.state / "personal").exists()
    client.until(lambda s: s.choice is None)
    assert not any(log.stat().st_size for log in (client.state / "logs").glob("trainer*"))
    assert len((client.data / "chat.jsonl").read_text().splitlines()) == 12
    client.cli("resume")
    client.until(lambda s: s.choice)


@pytest.mark.slow
def test_a_device_waits_for_text_and_for_its_hours(client: Client):
    """
    Three texts are too few and it says so; in quiet hours it does nothing at all.
    """
    client.write(3)
    client.start()
    client.until(lambda s: s.line.startswith("waiting for text: expected at least 10 texts"))
    client.write(9, "more.jsonl")
    client.until(lambda s: s.choice)
    assert client.stop() == 0
    client.start("--quiet-hours", "00:00-23:59")
    assert client.until(lambda s: s.pid == client.process.pid and s.waiting).startswith("quiet")
    assert len(client.tree()) == 1  # not even a base model is loaded


@pytest.mark.slow
def test_an_enrolled_device_out_of_reach_of_its_coordinator_learns_alone(
    client: Client, home: Path
):
    """
    It says since when nobody answers, and goes on.
    """
    folder = DeviceFolder(client.state)
    folder.made_keys()
    now_ms = time.time_ns() // 10**6
    folder.keep(
        Enrolment(
            address="127.0.0.1:1",
            fleet_address="127.0.0.1:1",
            device_id="d" * 32,
            user="ann",
            name="laptop",
            token="t",
            token_issued_ms=now_ms,
            token_expires_ms=now_ms + 10**9,
            coordinator_keys=(bytes(32),),
            base_digest="0" * 64,
        ),
        ca=make_authority(datetime.now(UTC)).certificate,
    )
    client.start()
    client.until(lambda s: s.choice)
    line = client.until(lambda s: s.line if s.line.startswith("offline") else None)
    assert "127.0.0.1:1 does not answer since" in line
    assert client.stop() == 0
