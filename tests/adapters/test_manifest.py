import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedia3.adapters.manifest import (
    MAX_CHUNK,
    FileEntry,
    Manifest,
    Origin,
    manifest_of,
    read_manifest,
    schema,
    verify,
    write_manifest,
)
from fedia3.adapters.schema import Part, Schema, Target
from fedia3.errors import BadInput, Corrupt, NotFound

TARGETS = (Target("block.k_proj", "k", 2), Target("block.c_attn", "v", 2, Part(2, 2, 4, 4)))


def sha256(data: bytes) -> str:
    """In hex, as manifests write it."""
    return hashlib.sha256(data).hexdigest()


def manifest_of_chunks(folder: Path) -> Manifest:
    """Chunks of four bytes, so that ten bytes are three of them."""
    return manifest_of(
        folder, name="toy", created_from=Origin("ToyForCausalLM"), targets=TARGETS, chunk_size=4
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten bytes of weights, and an empty file one folder down."""
    folder = tmp_path / "base"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(b"0123456789")
    (folder / "sub" / "empty").write_bytes(b"")
    return folder


def with_field(manifest: Manifest, **changed: object) -> str:
    """The manifest's canonical JSON with some fields replaced."""
    fields = json.loads(manifest.to_json()) | changed
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def test_a_manifest_lists_every_file_with_the_hash_of_each_chunk(folder: Path):
    """
    Ten bytes in chunks of four are 4 + 4 + 2; an empty file has none; paths are sorted.
    """
    assert manifest_of_chunks(folder).files == (
        FileEntry("sub/empty", 0, ()),
        FileEntry("weights", 10, (sha256(b"0123"), sha256(b"4567"), sha256(b"89"))),
    )


def test_the_digest_is_the_sha256_of_the_manifest_file(folder: Path):
    """
    Whoever hashes fedia3.json gets the base model's identity.
    """
    manifest = manifest_of_chunks(folder)
    write_manifest(folder, manifest)
    assert manifest.digest == sha256((folder / "fedia3.json").read_bytes())


def test_a_manifest_survives_being_written_and_read(folder: Path):
    """
    Targets with parts, a licence and all else come back equal.
    """
    manifest = replace(manifest_of_chunks(folder), license="mit", pretraining="weights")
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest


def test_hashing_a_folder_again_leaves_its_manifest_out(folder: Path):
    """
    The manifest cannot hold its own hash.
    """
    manifest = manifest_of_chunks(folder)
    write_manifest(folder, manifest)
    assert manifest_of_chunks(folder) == manifest


def test_a_schema_carries_the_manifests_digest(folder: Path):
    """
    Adapters name their base model by the manifest's digest.
    """
    manifest = manifest_of_chunks(folder)
    assert schema(manifest) == Schema(manifest.digest, TARGETS)


def test_an_untouched_folder_verifies(folder: Path):
    """
    The manifest of a folder fits that folder, the manifest file lying in it or not.
    """
    manifest = manifest_of_chunks(folder)
    verify(folder, manifest)
    write_manifest(folder, manifest)
    verify(folder, manifest)


def test_a_changed_byte_is_found_by_file_and_chunk(folder: Path):
    """
    Byte 5 lies in the second chunk of four: number 1.
    """
    manifest = manifest_of_chunks(folder)
    (folder / "weights").write_bytes(b"01234x6789")
    with pytest.raises(Corrupt, match="weights: chunk 1 of 3"):
        verify(folder, manifest)


def test_a_truncated_file_is_found(folder: Path):
    """
    A file of another size is named with both sizes.
    """
    manifest = manifest_of_chunks(folder)
    (folder / "weights").write_bytes(b"01234567")
    with pytest.raises(Corrupt, match="weights: expected 10 bytes, got 8"):
        verify(folder, manifest)


def test_missing_and_extra_files_are_named(folder: Path):
    """
    A renamed file is one that is missing and one too many.
    """
    manifest = manifest_of_chunks(folder)
    (folder / "weights").rename(folder / "wights")
    with pytest.raises(Corrupt, match=r"missing \['weights'\], extra \['wights'\]"):
        verify(folder, manifest)


def test_a_link_to_the_right_bytes_is_refused(folder: Path, tmp_path: Path):
    """
    What a link points to could change after it was checked.
    """
    manifest = manifest_of_chunks(folder)
    (folder / "weights").rename(tmp_path / "elsewhere")
    (folder / "weights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match=r"weights .* symbolic link"):
        verify(folder, manifest)


@pytest.mark.parametrize(
    "path", ["../weights", "a/../b", "/etc/passwd", "a\\b", "C:x", "a//b", "", "x\n", "fedia3.json"]
)
def test_a_path_that_leaves_the_folder_is_refused(path: str):
    """
    Absolute paths, "..", drives and separators of other systems never reach the disk.
    """
    with pytest.raises(BadInput):
        Manifest("toy", Origin("Toy"), (FileEntry(path, 0, ()),), TARGETS)


def test_a_file_needs_as_many_hashes_as_its_size_has_chunks():
    """
    Five bytes in chunks of four are two chunks; one hash would leave a byte unchecked.
    """
    with pytest.raises(BadInput, match="5 bytes make 2 chunks of 4, got 1"):
        Manifest(
            "toy", Origin("Toy"), (FileEntry("w", 5, (sha256(b"0123"),)),), TARGETS, chunk_size=4
        )


def test_a_chunk_fits_into_memory():
    """
    It is checked whole before it is kept, so that whoever sends it may not choose any size.
    """
    size = MAX_CHUNK + 1
    with pytest.raises(BadInput, match="chunk_size"):
        Manifest(
            "toy", Origin("Toy"), (FileEntry("w", size, ("0" * 64,)),), TARGETS, chunk_size=size
        )


@pytest.mark.parametrize(
    "changed",
    [
        {"name": 7},
        {"name": "Upper"},
        {"files": []},
        {"files": [{"path": "w", "size": 4.0, "chunks": ["0" * 64]}]},
        {"files": [{"path": "w", "size": 4, "chunks": ["not a hash"]}]},
        {"targets": []},
        {"files": [{"path": "w", "size": -1, "chunks": []}]},
        {"chunk_size": 0},
        {"pretraining": "absent"},
        {"license": ["mit"]},
        {"created_from": {"architecture": 1, "source": None, "revision": None}},
        {"quantization": {"method": "fp4"}},
        {"unknown": 1},
    ],
)
def test_a_malformed_manifest_is_bad_input(folder: Path, changed: dict[str, object]):
    """
    A field of the wrong type or value, or one that is not known, is refused.
    """
    with pytest.raises(BadInput):
        Manifest.from_json(with_field(manifest_of_chunks(folder), **changed))


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "[" * 100_000])
def test_text_that_is_no_manifest_is_bad_input(text: str):
    """
    Whatever JSON it is, the error is ours.
    """
    with pytest.raises(BadInput):
        Manifest.from_json(text)


def test_only_the_canonical_form_is_read(folder: Path):
    """
    With a space more, the same manifest would have a second digest.
    """
    with pytest.raises(BadInput, match="canonical"):
        Manifest.from_json(manifest_of_chunks(folder).to_json() + " ")


def test_a_folder_without_a_manifest_is_no_base_model(folder: Path):
    """
    The error says what to do about it.
    """
    with pytest.raises(NotFound, match="import it first"):
        read_manifest(folder)
