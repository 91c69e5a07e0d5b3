"""``fedia3 registry`` at upkeep, as people type it, on copies of a finished run's registry."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedia3 import cli
from fedia3.coordinator.blobs import FileBlobs
from fedia3.simulations.run import Run

Command = Callable[..., int]


@pytest.fixture
def fedia3(monkeypatch: pytest.MonkeyPatch) -> Command:
    """``fedia3 registry WORDS``; its exit code."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["fedia3", "registry", *map(str, words)])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.fixture
def own(finished: Run, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished.folder.registry(finished.seed), tmp_path / "registry"))


def test_a_user_is_erased_once_their_name_is_typed(
    fedia3: Command, own: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    Another name changes nothing (3); the right one gives a receipt that says what stays.
    """
    monkeypatch.setattr(sys, "stdin", io.StringIO("anna\n"))
    assert fedia3("erase", "--user", "ann", "--at", own) == 3
    assert fedia3("versions", "--user", "ann", "--at", own) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("ann\n"))
    assert fedia3("erase", "--user", "ann", "--at", own) == 0
    said = capfd.readouterr().out
    assert "erased 1 versions at " in said
    assert "stays: everyone's adapter holds their updates since version" in said
    assert fedia3("versions", "--user", "ann", "--at", own) == 4


def test_an_erasures_receipt_is_printed_as_json(
    fedia3: Command, own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    It names nobody; erasing again is fine and has a receipt of its own.
    """
    receipts = []
    for versions in (1, 0):
        assert fedia3("erase", "--user", "ann", "--yes", "--at", own, "--json") == 0
        printed = capfd.readouterr().out
        receipts.append(json.loads(printed))
        assert receipts[-1]["versions"] == versions
        assert receipts[-1]["traceless"]
        assert "ann" not in printed
    assert len({receipt["receipt"] for receipt in receipts}) == 2


def test_what_no_version_has_is_collected(
    fedia3: Command, own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    Young bytes stay; a dry run says what there is, the next deletes it. A grace has a unit.
    """
    FileBlobs(own / "blobs").put(b"orphan")
    for words in ((), ("--older-than", "0s", "--dry-run"), ("--older-than", "0s")):
        assert fedia3("gc", "--at", own, *words) == 0
    said = capfd.readouterr().out.splitlines()
    assert [line.split(" without")[0] for line in said] == [
        "deleted 0 blobs", "would delete 1 blobs", "deleted 1 blobs",
    ]  # fmt: skip
    assert fedia3("gc", "--at", own, "--older-than", "1") == 3


def test_a_whole_registry_is_told_and_a_fault_leaves_with_6(
    fedia3: Command, own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    No fault in a finished run; a blob that is gone is named, and is a fact for programs too.
    """
    assert fedia3("verify", "--at", own) == 0
    assert "0 blobs without a version; 0 faults" in capfd.readouterr().out
    blob = next((own / "blobs").glob("??/??/*"))
    blob.unlink()
    assert fedia3("verify", "--at", own) == 6
    said = capfd.readouterr()
    assert f"restore blob {blob.name[:12]}" in said.out
    assert "1 faults" in said.err
    assert fedia3("verify", "--at", own, "--json") == 6
    assert json.loads(capfd.readouterr().out)["faults"] == 1


def test_a_backup_is_restored_without_whom_was_erased_since(
    fedia3: Command, own: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    With --erasures ann is gone; without, a line says that she is back. Nothing is written over.
    """
    assert fedia3("backup", tmp_path / "backup", "--at", own, "--json") == 0
    assert json.loads(capfd.readouterr().out)["versions"] > 0
    assert fedia3("backup", tmp_path / "backup", "--at", own) == 3
    assert fedia3("erase", "--user", "ann", "--yes", "--at", own) == 0
    again = tmp_path / "again"
    assert fedia3("restore", tmp_path / "backup", "--at", again, "--erasures", own) == 0
    assert "is back" not in capfd.readouterr().out
    assert fedia3("versions", "--user", "ann", "--at", again) == 4
    assert fedia3("verify", "--at", again) == 0
    assert fedia3("restore", tmp_path / "backup", "--at", tmp_path / "third") == 0
    assert "who was erased since then is back" in capfd.readouterr().out
    assert fedia3("versions", "--user", "ann", "--at", tmp_path / "third") == 0


def test_a_registry_on_a_server_is_the_servers_to_back_up(
    fedia3: Command, own: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    3, with what to do instead; nothing is written.
    """
    place = tmp_path / "federation"
    place.mkdir()
    (place / "coordinator.toml").write_text(
        '[coordinator]\nhosts = ["a"]\nbase = "tiny"\n'
        '[registry]\ndatabase = "postgresql://nobody@localhost/none"\n'
    )
    assert fedia3("backup", tmp_path / "backup", "--at", place) == 3
    assert "pg_dump" in capfd.readouterr().err
    assert not (tmp_path / "backup").exists()
    assert fedia3("backup", tmp_path / "backup", "--at", own) == 0
    assert fedia3("restore", tmp_path / "backup", "--at", place) == 3
    assert "fedia3 registry copy" in capfd.readouterr().err
    assert not (place / "registry").exists()
