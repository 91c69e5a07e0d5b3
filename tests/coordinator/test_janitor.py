"""What nobody refers to is collected, and nothing else, whoever publishes meanwhile."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator.blobs import FileBlobs
from fedia3.coordinator.janitor import Collected, collect
from fedia3.coordinator.records import Owner
from fedia3.coordinator.registry import Registry
from fedia3.errors import StorageFailed

BASE = "b" * 64
SCHEMA = Schema(BASE, (Target("layers.0.k", "k", 2),))
HOUR = 3600.0


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """One published version, and the bytes of a publish that was cut short."""
    with Registry.open(tmp_path) as registry:
        registry.publish_global(Adapter(SCHEMA, np.array([1, 2], np.float32)))
        registry.blobs.put(b"orphan")
        yield registry


def made_older(folder: Path, by_s: float) -> None:
    """As if every file had been written so long before."""
    for path in folder.rglob("*"):
        if path.is_file():
            then = path.stat().st_mtime - by_s
            os.utime(path, (then, then))


def test_what_no_version_has_is_collected(registry: Registry, tmp_path: Path) -> None:
    """
    Six bytes of an orphan go, a killed writer's file as well; the version stays.
    """
    (tmp_path / "blobs" / "tmp" / "half").write_bytes(b"orp")
    made_older(tmp_path / "blobs", 2 * HOUR)
    assert collect(registry) == Collected(blobs=1, blob_bytes=6, leftovers=1)
    assert registry.fetch(Owner.everyone(), BASE)[1]
    assert list((tmp_path / "blobs" / "tmp").iterdir()) == []
    assert collect(registry) == Collected(0, 0, 0)


def test_what_is_younger_than_the_grace_stays(registry: Registry, tmp_path: Path) -> None:
    """
    An orphan of a moment ago may be a publish under way, and so may one that was put again.
    """
    (tmp_path / "blobs" / "tmp" / "half").write_bytes(b"orp")
    assert collect(registry) == Collected(0, 0, 0)
    made_older(tmp_path / "blobs", 2 * HOUR)
    registry.blobs.put(b"orphan")
    assert collect(registry).blobs == 0


def test_a_writer_is_given_a_minute_whatever_the_grace(registry: Registry, tmp_path: Path) -> None:
    """
    Without a grace the orphan goes, and what may be written this moment stays.
    """
    (tmp_path / "blobs" / "tmp" / "half").write_bytes(b"orp")
    assert collect(registry, 0) == Collected(blobs=1, blob_bytes=6, leftovers=0)


def test_a_dry_run_deletes_nothing(registry: Registry) -> None:
    """
    It says what the next run does.
    """
    assert collect(registry, 0, dry=True) == collect(registry, 0, dry=True)
    assert collect(registry, 0) == Collected(blobs=1, blob_bytes=6, leftovers=0)


def test_bytes_that_are_collected_before_the_commit_are_put_again(tmp_path: Path) -> None:
    """
    Between a publish's put and its commit somebody collects without a grace: it ends whole.
    """

    class Collecting(FileBlobs):
        def put(self, data: bytes) -> str:
            digest = super().put(data)
            if not hasattr(self, "once"):
                self.once = collect(registry, 0)
            return digest

    with Registry.open(tmp_path) as registry:
        registry.blobs = Collecting(tmp_path / "blobs")
        registry.publish_global(Adapter(SCHEMA, np.array([1, 2], np.float32)))
        assert registry.blobs.once.blobs == 1
        assert registry.fetch(Owner.everyone(), BASE)[1]


# Each cycle puts bytes that another process just made an orphan of, and looks at what it published.
PUBLISH = f"""
import sys
from pathlib import Path
import numpy as np
from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator.records import Owner
from fedia3.coordinator.registry import Registry

schema = Schema({BASE!r}, (Target("layers.0.k", "k", 2),))
one = encoding.digest(encoding.encode(Adapter(schema, np.ones(2, np.float32))))
folder, user, cycles = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
registry = Registry.open(folder, sys.argv[4] or None)
for cycle in range(cycles):
    part = PersonalAdapter(schema, np.full(2, cycle % 3, np.float32), one)
    record = registry.publish_personal(user, part, num_examples=1)
    assert registry.fetch(Owner.user(user), schema.base_digest, record.version)[1]
    if cycle % 2:
        registry.erase_user(user)
print("done")
"""


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what is flushed does not matter to a race."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str | None:
    """The file in the folder, or a database on a server."""
    if request.param == "sqlite":
        return None
    return str(request.getfixturevalue("postgres_url"))


@pytest.mark.parametrize("cycles", [100, pytest.param(3400, marks=pytest.mark.slow)])
def test_no_bytes_of_a_version_are_ever_collected(
    fast_folder: Path, database: str | None, cycles: int
) -> None:
    """
    Three processes publish the same three parts, and erase them at every second turn, while this
    one collects without any grace: each finds what it published, and nothing lacks its bytes.
    """
    collected = 0
    with Registry.open(fast_folder, database) as registry:
        registry.publish_global(Adapter(SCHEMA, np.ones(2, np.float32)))
        command = [sys.executable, "-c", PUBLISH, str(fast_folder)]
        publishing = [
            subprocess.Popen(
                [*command, user, str(cycles), database or ""], stdout=subprocess.PIPE, text=True
            )
            for user in ("anna", "bob", "cyd")
        ]
        while any(process.poll() is None for process in publishing):
            collected += collect(registry, 0).blobs
            time.sleep(0.001)
        assert [process.communicate()[0] for process in publishing] == ["done\n"] * 3
        for owner in (Owner.everyone(), *registry.owners("user")):
            for record in registry.versions(owner, BASE):
                assert registry.fetch(owner, BASE, record.version)[1]
    assert collected > 0


def test_a_disk_that_refuses_to_delete_is_said(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The orphan is still there, and goes once the disk lets it.
    """

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(StorageFailed, match="Read-only file system"):
            collect(registry, 0)
    assert collect(registry, 0).blobs == 1
