"""Replaced whole or not at all, and nobody else's to read."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedia3.errors import StorageFailed
from fedia3.private_files import write_private


@pytest.mark.parametrize("lasting", [True, False])
def test_a_private_file_is_its_owners_alone(tmp_path: Path, lasting: bool) -> None:
    """
    0600, also where an older file was open to others; a folder that was missing is 0700.
    """
    path = tmp_path / "folder" / "secret"
    path.parent.mkdir(mode=0o700)
    path.write_bytes(b"old")
    path.chmod(0o644)
    write_private(path, b"new", lasting=lasting)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    write_private(tmp_path / "made" / "secret", b"new", lasting=lasting)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    """
    The message says which file and why; nothing is left aside.
    """
    (tmp_path / "none").write_bytes(b"")
    with pytest.raises(StorageFailed, match=r"none/secret .*File exists"):
        write_private(tmp_path / "none" / "secret", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageFailed, match="Is a directory"):
        write_private(tmp_path / "folder", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "none"]


def test_two_writers_leave_one_whole_file(tmp_path: Path) -> None:
    """
    Neither trips over what the other puts aside.
    """
    path = tmp_path / "status"
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(write_private, path, bytes([n]) * 1000) for n in range(100)]
        for written in done:
            written.result()
    assert len(set(path.read_bytes())) == 1
    assert [found.name for found in tmp_path.iterdir()] == ["status"]
