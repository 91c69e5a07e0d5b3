"""Damage at rest is found and not served; a disk that refuses is said, and forgiven."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator import inspection
from fedia3.coordinator.backup import back_up
from fedia3.coordinator.inspection import every_version, inspect
from fedia3.coordinator.janitor import collect
from fedia3.coordinator.records import AdapterRecord, Contribution, Owner, RoundRecord
from fedia3.coordinator.registry import Registry
from fedia3.errors import BadSetting, Corrupt, Fedia3Error, StorageFailed

BASE = "b" * 64
SCHEMA = Schema(BASE, (Target("layers.0.k", "k", 64),))
EVERYONE = Owner.everyone()
MANY = [150, pytest.param(500, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look at a fault comes at once."""
    monkeypatch.setattr(inspection, "SECOND_LOOK_S", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed registry of 12 rounds with five people each, and of 20 users' parts."""
    folder, draw = tmp_path / "registry", random.Random(0)
    with Registry.open(folder) as registry:
        for number in range(1, 13):
            scales = Adapter(SCHEMA, np.full(64, number, np.float32))
            people = [
                Contribution(f"{n:032x}", "accepted", num_examples=4, metrics={"loss": 1.5})
                for n in range(5)
            ]
            state = draw.randbytes(300)
            anchor = registry.commit_round(number, state, scales, people, {"loss": 2.0}).digest
        for number in range(20):
            part = PersonalAdapter(SCHEMA, np.full(64, number / 9, np.float32), anchor)
            key = f"key {number}"
            registry.publish_personal(f"user {number}", part, num_examples=3, idem_key=key)
    return folder


Everything = tuple[list[tuple[AdapterRecord, bytes]], tuple[RoundRecord, ...], bytes | None]


def everything(registry: Registry) -> Everything:
    """All that a caller can get."""
    versions = [
        (record, registry.fetch(record.owner, record.base, record.version)[1])
        for record in every_version(registry)
    ]
    return versions, registry.rounds(), registry.server_state()


def flipped(good: bytes, draw: random.Random) -> bytes:
    """The bytes with one bit changed."""
    data, bit = bytearray(good), draw.randrange(len(good) * 8)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


@pytest.mark.parametrize("flips", MANY)
def test_a_flipped_bit_in_a_blob_is_found_and_not_served(folder: Path, flips: int) -> None:
    """
    Any bit of any blob: fetch refuses it, and the inspection names the version.
    """
    draw = random.Random(1)
    with Registry.open(folder) as registry:
        records = list(every_version(registry))
        for _ in range(flips):
            record = draw.choice(records)
            digest = record.digest
            path = folder / "blobs" / digest[:2] / digest[2:4] / digest
            good = path.read_bytes()
            path.write_bytes(flipped(good, draw))
            with pytest.raises(Corrupt):
                registry.fetch(record.owner, record.base, record.version)
            assert [str(record) in fault for fault in inspect(registry).named] == [True]
            path.write_bytes(good)
        assert inspect(registry).faults == 0


@pytest.mark.parametrize("flips", MANY)
def test_a_flipped_bit_in_the_database_is_found_or_changes_nothing(
    folder: Path, flips: int
) -> None:
    """
    Any bit of any page: opening refuses it, the inspection finds it, or it lies where nothing is
    kept and every version, byte, round and state is as it was.
    """
    path, draw = folder / "registry.db", random.Random(2)
    with Registry.open(folder) as registry:
        expected = everything(registry)
    good, found = path.read_bytes(), 0
    for _ in range(flips):
        for beside in folder.glob("registry.db-*"):
            beside.unlink()
        path.write_bytes(flipped(good, draw))
        try:
            with Registry.open(folder) as registry:
                if not inspect(registry, {BASE: SCHEMA}.get).faults:
                    assert everything(registry) == expected
                    continue
        except Fedia3Error:
            pass
        found += 1
    assert found > flips / 10  # most of a small file is empty pages


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte, where this account may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def publish(registry: Registry, value: float) -> AdapterRecord:
    """Everyone's adapter with these scales."""
    return registry.publish_global(Adapter(SCHEMA, np.full(64, value, np.float32)))


def test_a_full_disk_is_said_and_forgiven(small_disk: Path) -> None:
    """
    Publishing until nothing fits any more ends with StorageFailed; all that was acknowledged is
    served meanwhile, and once there is room the same open registry goes on without a fault.
    """
    with Registry.open(small_disk / "registry") as registry:
        published = [publish(registry, 1)]
        filler = small_disk / "filler"
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(free - 200_000))
        with pytest.raises(StorageFailed):
            while True:
                published.append(publish(registry, 1 + len(published) / 1000))
        for _ in range(5):
            with pytest.raises(StorageFailed):
                while True:
                    published.append(publish(registry, 2 + len(published) / 1000))
            for record in published:
                assert registry.fetch(EVERYONE, BASE, record.version)[1]
        filler.unlink()
        assert publish(registry, 50).version == len(published) + 1
        collect(registry, 0)
        assert (inspect(registry).faults, inspect(registry).orphans) == (0, 0)


def test_a_full_disk_leaves_no_half_of_anything(small_disk: Path, tmp_path: Path) -> None:
    """
    Rounds, erasures and backups onto the full disk: each is refused whole.
    """
    with Registry.open(small_disk / "registry") as registry:
        one = Adapter(SCHEMA, np.ones(64, np.float32))
        registry.commit_round(1, b"state 1", one)
        (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
        with pytest.raises(StorageFailed):
            registry.commit_round(2, bytes(200_000), Adapter(SCHEMA, one.vector * 2))
        with pytest.raises((StorageFailed, BadSetting)):
            back_up(small_disk / "registry", small_disk / "backup")
        assert registry.server_state() == b"state 1"
        back_up(small_disk / "registry", tmp_path / "elsewhere")
        (small_disk / "filler").unlink()
        registry.commit_round(2, bytes(200_000), Adapter(SCHEMA, one.vector * 2))
        assert inspect(registry).faults == 0


def test_a_read_only_disk_serves_what_it_has(small_disk: Path) -> None:
    """
    Publishing and erasing are refused, fetching goes on; writable again, the open registry goes on.
    """
    with Registry.open(small_disk / "registry") as registry:
        first = publish(registry, 1)
        # SQLite holds its files open for writing, which keeps a mount from becoming read-only.
        blobs = small_disk / "registry" / "blobs"
        subprocess.run(["mount", "--bind", str(blobs), str(blobs)], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(blobs)], check=True)
            with pytest.raises(StorageFailed, match="Read-only"):
                publish(registry, 2)
            assert registry.fetch(EVERYONE, BASE)[0] == first
        finally:
            subprocess.run(["umount", str(blobs)], check=True)
        assert publish(registry, 2).version == 2
        assert inspect(registry).faults == 0


@pytest.mark.parametrize("step", range(8))
def test_each_step_of_a_publish_may_find_the_disk_full(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """
    The file aside, its flush, its new name, the folders' flushes, the file's folders: whichever
    fails, nothing is published, and the next attempt is.
    """
    calls = iter(range(100))

    def failing(real):  # type: ignore[no-untyped-def]  # wraps calls of every shape
        def call(*given, **named):  # type: ignore[no-untyped-def]
            if next(calls) == step:
                raise OSError(28, "No space left on device")
            return real(*given, **named)

        return call

    with Registry.open(folder) as registry:
        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (os, "open"), (os, "fdopen"), (Path, "replace")):
                patch.setattr(owner, name, failing(getattr(owner, name)))
            with pytest.raises(StorageFailed, match="No space left"):
                publish(registry, 77)
        assert registry.versions(EVERYONE, BASE, limit=1)[0].version == 12
        assert publish(registry, 77).version == 13
        assert inspect(registry).faults == 0
