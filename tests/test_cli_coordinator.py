"""``fedia3 coordinator``: what its commands print, and what they leave with."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedia3 import cli
from fedia3.cli_coordinator import _device_line, _tell_status
from fedia3.coordinator.operator import CoordinatorStatus, DeviceState, PartState

Command = Callable[..., int]


@pytest.fixture
def fedia3(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command line in this process; its exit code."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["fedia3", "coordinator", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


def test_init_says_what_to_type_next(
    fedia3: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    The next command, and that nobody else can reach a coordinator that was told no host.
    """
    assert fedia3("init", tmp_path / "fed") == 0
    said = capfd.readouterr().out
    assert f"fedia3 coordinator serve --config {tmp_path / 'fed'}" in said
    assert "only this machine can reach it" in said
    assert 'bind = "127.0.0.1"' in (tmp_path / "fed" / "coordinator.toml").read_text()


def test_init_in_json_is_facts_alone(
    fedia3: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    Addresses and files, for whoever sets many up.
    """
    hosts = ["--host", "fl.example.org", "--host", "10.0.0.7", "--grpc-port", "9443"]
    assert fedia3("init", tmp_path / "fed", *hosts, "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["address"] == "fl.example.org:9443"
    assert Path(facts["operator"]).exists()
    assert 'bind = "0.0.0.0"' in (tmp_path / "fed" / "coordinator.toml").read_text()


def test_init_does_not_overwrite(
    fedia3: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    5, conflict; with --force the older one is moved aside.
    """
    assert fedia3("init", tmp_path) == 0
    assert fedia3("init", tmp_path) == 5
    assert "--force" in capfd.readouterr().err
    assert fedia3("init", tmp_path, "--force") == 0


def test_serve_without_settings_says_how_to_make_them(
    fedia3: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    4, not found, and the command that writes them.
    """
    assert fedia3("serve", "--config", tmp_path) == 4
    assert "fedia3 coordinator init" in capfd.readouterr().err


def test_a_misspelt_setting_is_named(
    fedia3: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    3, bad input, with the key and those there are.
    """
    fedia3("init", tmp_path)
    with (tmp_path / "coordinator.toml").open("a") as file:
        file.write("\n[rouns]\n")
    assert fedia3("serve", "--config", tmp_path) == 3
    assert "no section is called 'rouns'" in capfd.readouterr().err


def test_an_operator_without_a_file_learns_where_it_is(
    fedia3: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    4: operator.json is written by init.
    """
    assert fedia3("status", "--config", tmp_path) == 4
    assert "operator.json" in capfd.readouterr().err


STATUS = CoordinatorStatus(
    version="0.1.0",
    base_digest="c60e53deb2e8" + "0" * 52,
    paused=True,
    run_requested=False,
    round_num=7,
    round_committed_ms=0,
    round_metrics={"clients": 3.0, "accepted": 2.0},
    devices=4,
    devices_online=3,
    parts=(
        PartState("superlink", "running", 12, 0, ""),
        PartState("proxy", "waiting", None, 2, "signal 9"),
    ),
    waiting_for="paused by the operator",
)


def test_status_tells_rounds_devices_and_parts(capfd: pytest.CaptureFixture[str]) -> None:
    """
    A line each, and why nothing happens where nothing does.
    """
    _tell_status(STATUS)
    rounds, waiting, devices, base, superlink, proxy = capfd.readouterr().out.splitlines()
    assert rounds.startswith("rounds    7 at ")
    assert rounds.endswith("2 of 3 devices, paused")
    assert waiting == "waiting   paused by the operator"
    assert devices == "devices   4 enrolled, 3 online"
    assert base == "base      c60e53deb2e8"
    assert superlink.split() == ["superlink", "running", "pid", "12"]
    assert proxy.split() == ["proxy", "waiting", "2", "restarts,", "last", "signal", "9"]


@pytest.mark.parametrize(
    ("revoked_ms", "last_seen_ms", "online", "said"),
    [
        (None, None, False, "never seen"),
        (None, 1000, True, "online"),
        (None, 1000, False, "last seen 19"),
        (1000, 1000, False, "revoked 19"),
    ],
)
def test_a_device_is_told_in_a_line(
    revoked_ms: int | None, last_seen_ms: int | None, online: bool, said: str
) -> None:
    """
    Whose it is, what it is called, and whether it is there.
    """
    device = DeviceState("a" * 32, "ann", "laptop", 0, revoked_ms, last_seen_ms, online)
    line = _device_line(device)
    assert line.split()[:3] == ["a" * 32, "ann", "laptop"]
    assert said in line
