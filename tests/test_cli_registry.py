"""``fedia3 registry`` as people type it, on a finished run's registry."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedia3 import cli
from fedia3.coordinator.setup import serving_alone
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
def at(finished: Run) -> Path:
    """The registry of the small run that all tests share; nothing here changes it."""
    return finished.folder.registry(finished.seed)


def test_owners_and_their_versions_are_listed(
    fedia3: Command, at: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    Everyone's first; versions newest first, as facts or a line each.
    """
    assert fedia3("owners", "--at", at, "--json") == 0
    listed = json.loads(capfd.readouterr().out)
    assert listed[0] == {"kind": "global", "name": ""}
    assert fedia3("versions", "--at", at, "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert [f["version"] for f in facts] == sorted((f["version"] for f in facts), reverse=True)
    assert fedia3("versions", "--at", at) == 0
    assert facts[0]["digest"][:12] in capfd.readouterr().out.splitlines()[0]


def test_no_registry_is_named_and_none_is_made(
    fedia3: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    4, not found, with what to name.
    """
    assert fedia3("owners", "--at", tmp_path) == 4
    assert "--at" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_who_has_nothing_is_said(
    fedia3: Command, at: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    4, and so for a base that nobody trained on.
    """
    assert fedia3("versions", "--user", "nobody", "--at", at) == 4
    assert "nobody" in capfd.readouterr().err
    assert fedia3("versions", "--base", "beef", "--at", at) == 4
    assert "beef" in capfd.readouterr().err


@pytest.fixture
def own(at: Path, tmp_path: Path) -> Path:
    """A copy of it, whose global versions there are at least two of."""
    return shutil.copytree(at, tmp_path / "registry")


def facts(capfd: pytest.CaptureFixture[str]) -> Any:
    """What the last command printed as JSON."""
    return json.loads(capfd.readouterr().out)


def test_an_alias_is_promoted_rolled_back_and_remembers(
    fedia3: Command, own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    History newest first; ``--on`` says where it pointed then.
    """
    assert fedia3("promote", "stable", 1, "--at", own, "--reason", "first [ok]") == 0
    assert fedia3("promote", "stable", 2, "--at", own, "--expected", 1) == 0
    assert fedia3("promote", "stable", 1, "--at", own, "--expected", 1) == 5
    assert "revision 2" in capfd.readouterr().err
    assert fedia3("rollback", "stable", "--at", own, "--json") == 0
    (moved,) = facts(capfd)
    assert (moved["version"], moved["rev"], moved["owner"]["kind"]) == (1, 3, "global")
    assert fedia3("history", "stable", "--at", own, "--json") == 0
    assert [move["version"] for move in facts(capfd)] == [1, 2, 1]
    assert fedia3("history", "stable", "--at", own) == 0
    assert "first [ok]" in capfd.readouterr().out
    assert fedia3("history", "stable", "--at", own, "--on", "2020-01-01") == 4
    assert fedia3("history", "stable", "--at", own, "--on", "2999-01-01") == 0
    capfd.readouterr()
    assert fedia3("aliases", "--at", own, "--json") == 0
    assert [(a["name"], a["version"]) for a in facts(capfd)] == [("stable", 1)]
    assert fedia3("promote", "stable", 0, "--at", own) == 0
    assert "dropped" in capfd.readouterr().out


def test_a_yanked_version_is_marked_and_comes_back(
    fedia3: Command, own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    The one before is the latest meanwhile.
    """
    assert fedia3("versions", "--at", own, "--json") == 0
    newest = facts(capfd)[0]["version"]
    assert fedia3("yank", newest, "--at", own) == 0
    assert f"v{newest - 1} now" in capfd.readouterr().out
    assert fedia3("versions", "--at", own) == 0
    assert capfd.readouterr().out.splitlines()[0].endswith("yanked")
    assert fedia3("yank", newest, "--undo", "--at", own) == 0
    assert f"v{newest} now" in capfd.readouterr().out
    assert fedia3("yank", 99, "--at", own) == 4


def test_a_registry_is_copied_once(
    fedia3: Command, at: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    The copy's versions are the registry's; 5, a conflict, for a second copy into the same place.
    """
    copied = tmp_path / "registry.db"
    assert fedia3("copy", "--at", at, "--to", f"sqlite:///{copied}", "--json") == 0
    assert json.loads(capfd.readouterr().out)["rows"] > 0
    listed = []
    for folder in (at, tmp_path):
        assert fedia3("versions", "--at", folder, "--json") == 0
        listed.append(capfd.readouterr().out)
    assert listed[0] == listed[1]
    assert fedia3("copy", "--at", at, "--to", f"sqlite:///{copied}") == 5
    assert "name one that is empty" in capfd.readouterr().err


def test_a_coordinators_registry_is_where_its_settings_say(
    fedia3: Command, at: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    With a database in the settings that one is read, whatever lies in the folder.
    """
    assert fedia3("copy", "--at", at, "--to", f"sqlite:///{tmp_path}/other.db") == 0
    (tmp_path / "coordinator.toml").write_text(
        '[coordinator]\nhosts = ["a"]\nbase = "tiny"\n'
        f'[registry]\ndatabase = "sqlite:///{tmp_path}/other.db"\n'
    )
    capfd.readouterr()
    assert fedia3("versions", "--at", tmp_path) == 0
    assert "v1 " in capfd.readouterr().out


def test_a_running_coordinators_registry_is_not_copied(
    fedia3: Command, at: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    What it writes meanwhile would be missing: 5, and the word to stop it.
    """
    shutil.copytree(at, tmp_path / "registry")
    (tmp_path / "coordinator.toml").write_text("")
    with serving_alone(tmp_path):
        assert fedia3("copy", "--at", tmp_path, "--to", f"sqlite:///{tmp_path}/other.db") == 5
    assert "stop it" in capfd.readouterr().err
    assert not (tmp_path / "other.db").exists()
