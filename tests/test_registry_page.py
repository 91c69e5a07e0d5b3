"""docs/registry.md does what it shows: each command is run, and prints what stands below it."""

import os
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from fedia3.adapters import manifest
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.encoding import digest, encode
from fedia3.coordinator.blobs import FileBlobs
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.stores.sql import SqlStore

PAGE = Path(__file__).parents[1] / "docs" / "registry.md"
# What differs from run to run: times, and the receipts of erasures.
OWN = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d|\b[0-9a-f]{32}\b")
MONDAY = datetime(2026, 3, 2, 9, tzinfo=UTC)


def made(folder: Path) -> None:
    """A registry of the shipped base: three versions of everyone's, two of alice's, bob's one."""
    schema = manifest.schema(manifest.read_manifest(BaseStore().find("tiny")))
    draw, day = np.random.default_rng(0), iter(range(100))
    folder.mkdir(parents=True)
    store, blobs = SqlStore.at(folder / "registry.db"), FileBlobs(folder / "blobs")
    with Registry(store, blobs, lambda: MONDAY + timedelta(days=next(day))) as registry:
        everyone = Adapter.ones(schema)
        for number in range(3):
            step = draw.normal(0, 0.02, schema.n_params).astype(np.float32)
            everyone = Adapter(schema, everyone.vector + step)
            registry.publish_global(everyone, round_num=number, num_examples=240)
        for user, count in (("alice", 2), ("bob", 1)):
            for _ in range(count):
                delta = draw.normal(0, 0.05, schema.n_params).astype(np.float32)
                own = PersonalAdapter(schema, delta, digest(encode(everyone)))
                registry.publish_personal(user, own, num_examples=31)


def transcript() -> list[tuple[str, str]]:
    """The page's commands with what they print."""
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(), flags=re.S)
    shown = re.findall(r"^\$ ([^\n]*(?:\\\n[^\n]*)*)\n((?:(?!\$ ).*\n)*)", "".join(blocks), re.M)
    return [(command.replace("\\\n", " "), printed) for command, printed in shown]


def run(command: str, folder: Path) -> str:
    """What a command of the page prints, on either stream, without what is its run's own."""
    program, *words = shlex.split(command)
    assert program == "fedia3", f"{command}: only fedia3's commands are run"
    done = subprocess.run(
        [sys.executable, "-c", "from fedia3.cli import main; main()", *words],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "FEDIA3_REGISTRY": "federation", "COLUMNS": "100", "NO_COLOR": "1"},
    )  # fmt: skip
    return OWN.sub("…", done.stdout + done.stderr)


@pytest.mark.slow
def test_the_pages_commands_print_what_it_shows(tmp_path: Path) -> None:
    """
    In their order, on one registry; what the page shows and what was printed are compared whole.
    """
    made(tmp_path / "federation" / "registry")
    commands = transcript()
    assert len(commands) > 10
    shown = "".join(f"$ {command}\n{OWN.sub('…', printed)}" for command, printed in commands)
    printed = "".join(f"$ {command}\n{run(command, tmp_path)}" for command, _ in commands)
    assert printed == shown
