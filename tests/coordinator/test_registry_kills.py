"""The registry loses nothing that it acknowledged, however often and whenever it is killed."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

LIVES = Path(__file__).with_name("killed_registry.py")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_nothing_acknowledged_is_lost_to_kills(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """
    4 writers and 4 readers, 200 kills at random moments (``--kills 1000`` for more): all that was
    acknowledged is there, no number is missing, no key made two versions, every row has its bytes.
    """
    url = request.getfixturevalue("postgres_url") if backend == "postgresql" else ""
    kills, seed = request.config.getoption("--kills"), request.config.getoption("--kill-seed")
    done = subprocess.run(
        [sys.executable, str(LIVES), str(tmp_path), url, str(kills), str(seed)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout)
    assert facts["kills"] == kills
    assert facts["acknowledged"]["publish"] > kills
    assert facts["acknowledged"]["move"] > kills / 2
    if backend == "sqlite":
        with closing(sqlite3.connect(tmp_path / "registry.db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert database.execute("PRAGMA foreign_key_check").fetchall() == []
