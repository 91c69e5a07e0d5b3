"""Blobs are named by their bytes, survive crashes, and are never served damaged."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedia3.coordinator.blobs import BlobStore, FileBlobs, MemoryBlobs
from fedia3.errors import BadInput, BadSetting, Corrupt, Fedia3Error, NotFound

HELLO = b"hello"
NAME = hashlib.sha256(HELLO).hexdigest()  # 2cf2…


@pytest.fixture(params=["memory", "files"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobStore]:
    """An empty blob store of each kind."""
    yield MemoryBlobs() if request.param == "memory" else FileBlobs(tmp_path)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """The file of the one blob in a file store at ``tmp_path``."""
    FileBlobs(tmp_path).put(HELLO)
    return tmp_path / NAME[:2] / NAME[2:4] / NAME


def test_bytes_come_back_under_their_digest(blobs: BlobStore) -> None:
    """
    What was put is got by its sha256.
    """
    assert blobs.put(HELLO) == NAME
    assert blobs.get(NAME) == HELLO


def test_the_same_bytes_are_kept_once(blobs: BlobStore) -> None:
    """
    Two puts of the same bytes leave one blob, other bytes a second.
    """
    blobs.put(HELLO)
    blobs.put(HELLO)
    other = blobs.put(b"")
    assert sorted(blobs.digests()) == sorted([NAME, other])


def test_a_blob_that_was_never_put_is_not_found(blobs: BlobStore) -> None:
    """
    An unknown digest is not there, and asking says so.
    """
    assert not blobs.has(NAME)
    with pytest.raises(NotFound):
        blobs.get(NAME)


def test_a_put_blob_is_there(blobs: BlobStore) -> None:
    """
    After a put the store has the digest.
    """
    assert blobs.has(blobs.put(HELLO))


def test_a_blobs_size_is_its_bytes(blobs: BlobStore) -> None:
    """
    Five for hello; what is not there has none.
    """
    blobs.put(HELLO)
    assert blobs.size(NAME) == 5
    with pytest.raises(NotFound):
        blobs.size("0" * 64)


def test_a_deleted_blob_is_gone(blobs: BlobStore) -> None:
    """
    Its neighbour stays, deleting again is no error, and the same bytes may be put again.
    """
    other = blobs.put(b"other")
    blobs.put(HELLO)
    blobs.delete(NAME)
    blobs.delete(NAME)
    assert list(blobs.digests()) == [other]
    with pytest.raises(NotFound):
        blobs.get(NAME)
    blobs.put(HELLO)
    assert blobs.get(NAME) == HELLO


def test_deleting_follows_no_name_out_of_the_store(tmp_path: Path) -> None:
    """
    Only a digest can be deleted.
    """
    (tmp_path / "diary").write_text("mine")
    with pytest.raises(BadInput):
        FileBlobs(tmp_path / "blobs").delete("../diary")
    assert (tmp_path / "diary").read_text() == "mine"


@pytest.mark.parametrize("name", ["", "../../etc/passwd", NAME.upper(), NAME + "0"])
def test_a_name_that_is_no_digest_is_refused(tmp_path: Path, name: str) -> None:
    """
    Nothing but 64 lower-case hex digits ever becomes a path.
    """
    with pytest.raises(BadInput):
        FileBlobs(tmp_path).get(name)


def test_a_blob_survives_reopening(tmp_path: Path, stored: Path) -> None:
    """
    A second store on the same folder finds the bytes of the first.
    """
    assert FileBlobs(tmp_path).get(NAME) == HELLO
    assert stored.read_bytes() == HELLO


@pytest.mark.parametrize("damage", [b"hellp", b"hell", b""])
def test_damaged_bytes_are_not_served(tmp_path: Path, stored: Path, damage: bytes) -> None:
    """
    A changed, a cut and an empty file are all reported as corrupt.
    """
    stored.write_bytes(damage)
    with pytest.raises(Corrupt, match="holds bytes of digest"):
        FileBlobs(tmp_path).get(NAME)


def test_putting_the_good_bytes_again_heals(tmp_path: Path, stored: Path) -> None:
    """
    A put does not trust the file that is there: damaged bytes are replaced.
    """
    stored.write_bytes(b"hellp")
    FileBlobs(tmp_path).put(HELLO)
    assert FileBlobs(tmp_path).get(NAME) == HELLO


def test_a_link_in_place_of_a_blob_is_refused(tmp_path: Path, stored: Path) -> None:
    """
    A link is not followed, not even to the right bytes, and not written through.
    """
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(HELLO)
    stored.unlink()
    stored.symlink_to(elsewhere)
    with pytest.raises(Corrupt, match="symbolic link"):
        FileBlobs(tmp_path).get(NAME)
    with pytest.raises(Corrupt, match="symbolic link"):
        FileBlobs(tmp_path).put(HELLO)


def test_a_linked_folder_is_refused(tmp_path: Path) -> None:
    """
    A link in place of a blob's folder would let writes land outside of the store.
    """
    root, outside = tmp_path / "blobs", tmp_path / "outside"
    outside.mkdir()
    blobs = FileBlobs(root)
    (root / NAME[:2]).symlink_to(outside)
    with pytest.raises(Corrupt, match="symbolic link"):
        blobs.put(HELLO)
    assert list(outside.iterdir()) == []


def test_a_file_left_by_a_crash_is_ignored(tmp_path: Path) -> None:
    """
    What a killed writer left aside is no blob and stands in nobody's way.
    """
    blobs = FileBlobs(tmp_path)
    (tmp_path / "tmp" / "half").write_bytes(b"hel")
    assert list(blobs.digests()) == []
    blobs.put(HELLO)
    assert list(blobs.digests()) == [NAME]


def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    When the flush fails, the error names the folder, and neither blob nor leftover stays.
    """
    blobs = FileBlobs(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Fedia3Error, match=r"No space left on device.*make room"):
        blobs.put(HELLO)
    assert not blobs.has(NAME)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_bytes_are_flushed_before_their_name_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    At the first flush the blob has no name yet; the last flush is the top folder's.
    """
    blobs = FileBlobs(tmp_path)
    named_at_flush: list[bool] = []
    flush = os.fsync

    def watched(descriptor: int) -> None:
        named_at_flush.append(blobs.has(NAME))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    blobs.put(HELLO)
    assert named_at_flush == [False, True, True, True]


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """
    A path that cannot be a folder is an unusable setting, said at once.
    """
    (tmp_path / "root").write_text("")
    with pytest.raises(BadSetting, match="choose a folder you can write"):
        FileBlobs(tmp_path / "root")
