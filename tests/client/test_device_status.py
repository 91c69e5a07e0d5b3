"""One line says what a device is doing."""

import os
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fedia3.client.device_status import Control, Coordinator, DeviceStatus, clock
from fedia3.errors import Corrupt

READY = DeviceStatus(
    pid=os.getpid(),
    started=psutil.Process().create_time(),
    written_ms=0,
    state_folder="/s",
    data="/d",
    trainer="running",
    coordinator=Coordinator("c.example:8443"),
)
AT = time.time_ns() // 10**6


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "ready for a round of c.example:8443"),
        ({"waiting": "on battery power", "doing": "x"}, "waiting: on battery power"),
        ({"trainer": "starting"}, "loading the base model"),
        ({"doing": "training round 12"}, "training round 12"),
        ({"too_little": "got 3"}, "waiting for text: got 3"),
        ({"problem": "no base model 'big'"}, "stopped: no base model 'big'"),
        ({"coordinator": None}, "not enrolled; learning on this device alone"),
        (
            {"coordinator": Coordinator("c:1", silent_since_ms=AT)},
            f"offline: c:1 does not answer since {clock(AT)}; learning on this device alone",
        ),
        (
            {"coordinator": Coordinator("c:1", shut_out="revoked")},
            "shut out by c:1 (revoked); learning on this device alone",
        ),
        (
            {"last_round": 3, "last_round_ms": AT, "last_loss": 2.5},
            f"ready for a round of c.example:8443; trained round 3 at {clock(AT)}, loss 2.500",
        ),
    ],
)
def test_the_line_says_what_matters_most(changes: dict[str, object], line: str):
    """
    What keeps the device from working comes first, then what it does, then whom it waits for.
    """
    assert replace(READY, **changes).line == line  # type: ignore[arg-type]  # any field


def test_a_status_is_read_as_it_was_written(tmp_path: Path):
    """
    By another process, which also learns whether the writer still runs.
    """
    (tmp_path / "status.json").write_bytes(READY.to_json())
    read = DeviceStatus.read(tmp_path / "status.json")
    assert read == READY
    assert read.is_alive
    assert not replace(read, started=1.0).is_alive  # the number belongs to somebody else now


def test_no_agent_yet_is_no_status(tmp_path: Path):
    """
    A folder in which none ever ran.
    """
    assert DeviceStatus.read(tmp_path / "status.json") is None
    assert Control.read(tmp_path / "control.json") == Control()


def test_what_the_owner_wants_is_kept(tmp_path: Path):
    """
    Pausing outlives the agent; a file of another kind is named.
    """
    Control(paused=True).write(tmp_path / "control.json")
    assert Control.read(tmp_path / "control.json").paused
    (tmp_path / "control.json").write_text("[]")
    with pytest.raises(Corrupt, match=r"control\.json"):
        Control.read(tmp_path / "control.json")
