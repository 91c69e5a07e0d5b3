"""Base models are handed out as their manifests list them, from any offset, and nothing else is."""

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.manifest import Manifest, read_manifest
from fedia3.coordinator.manifests import Manifests
from fedia3.coordinator.services.base_models import piece_bytes, read_pieces
from fedia3.errors import BadInput, BadToken, Corrupt, NotFound, OutOfRange
from fedia3.proto import base_models_pb2 as pb
from fedia3.proto.contract import PIECE
from fedia3.proto.signing import signed_bytes
from fedia3.testing_service import RunningService, paper_base

LARGE = "model.safetensors"  # 3,000,000 bytes: two pieces of 1 MiB and one of 902,848


def manifest(caller, **wanted: str) -> pb.SignedManifest:
    """A base model's signed manifest."""
    return caller.call("BaseModels/GetManifest", pb.GetManifestRequest(**wanted), pb.SignedManifest)


def pieces(caller, service: RunningService, path: str = LARGE, offset: int = 0, digest: str = ""):
    """The pieces of a file."""
    digest = digest or service.manifest.digest
    request = pb.ReadFileRequest(digest=digest, path=path, offset=offset)
    return list(caller.stream("BaseModels/ReadFile", request, pb.FilePiece))


@pytest.fixture
def anna(service: RunningService, calling):
    """Anna's phone."""
    return calling(service.enrol("anna"))


def test_without_a_wish_it_is_the_trained_base(service: RunningService, anna) -> None:
    """
    The manifest's bytes have the digest that everything names, and the coordinator's signature.
    """
    answer = manifest(anna)
    assert Manifest.from_json(answer.manifest.decode()) == service.manifest
    assert answer.key == service.coordinator_key
    key = Ed25519PublicKey.from_public_bytes(answer.key)
    key.verify(answer.signature, signed_bytes("manifest", answer.manifest))


def test_a_base_is_found_by_digest_and_by_name(service: RunningService, anna) -> None:
    """
    Both give the same bytes.
    """
    by_digest = manifest(anna, digest=service.manifest.digest)
    assert by_digest == manifest(anna, name=service.manifest.name) == manifest(anna)


def test_the_machines_other_bases_are_offered_too(
    service: RunningService, anna, tmp_path: Path
) -> None:
    """
    One that was imported later is found by its name and by its digest, and can be read.
    """
    other = paper_base(tmp_path / "bases" / "x", name="other", size=10)
    digest = read_manifest(other).digest
    assert manifest(anna, name="other") == manifest(anna, digest=digest)
    (piece,) = pieces(anna, service, digest=digest)
    assert piece.data == (other / LARGE).read_bytes()


@pytest.mark.parametrize("wanted", [{"digest": "0" * 64}, {"name": "nobody"}])
def test_a_base_that_is_not_there_is_not_found(anna, wanted: dict[str, str]) -> None:
    """
    By digest or by name.
    """
    with pytest.raises(NotFound):
        manifest(anna, **wanted)


@pytest.mark.parametrize("digest", ["../x", "/etc/passwd", "ab", "X" * 64])
def test_a_digest_is_never_a_path(anna, service: RunningService, digest: str) -> None:
    """
    What is not 64 hex digits is refused before anything is looked for.
    """
    with pytest.raises(BadInput, match="64 hex digits"):
        manifest(anna, digest=digest)
    with pytest.raises(BadInput, match="64 hex digits"):
        pieces(anna, service, digest=digest)


def test_a_base_is_asked_for_one_way(anna, service: RunningService) -> None:
    """
    Digest and name together are refused.
    """
    with pytest.raises(BadInput, match="got both"):
        manifest(anna, digest=service.manifest.digest, name="paper")


@pytest.mark.parametrize("offset", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2_999_999])
def test_a_file_is_read_from_any_offset(service: RunningService, anna, offset: int) -> None:
    """
    The bytes are the file's from there on; pieces follow each other and end at multiples of 1 MiB.
    """
    expected = (service.settings.base / LARGE).read_bytes()[offset:]
    got = pieces(anna, service, offset=offset)
    assert b"".join(piece.data for piece in got) == expected
    ends = [piece.offset + len(piece.data) for piece in got]
    assert [piece.offset for piece in got] == [offset, *ends[:-1]]
    assert [end % PIECE for end in ends[:-1]] == [0] * (len(ends) - 1)
    assert ends[-1] == 3_000_000


def test_at_its_end_a_file_has_no_pieces(service: RunningService, anna) -> None:
    """
    Neither behind the last byte nor where there is none at all.
    """
    assert pieces(anna, service, offset=3_000_000) == []
    assert pieces(anna, service, path="empty.txt") == []


@pytest.mark.parametrize("offset", [-1, 3_000_001, 2**62, -(2**63)])
def test_an_offset_lies_in_the_file(service: RunningService, anna, offset: int) -> None:
    """
    Below zero and behind the end there is nothing.
    """
    with pytest.raises(OutOfRange, match="3000000 bytes"):
        pieces(anna, service, offset=offset)


@pytest.mark.parametrize(
    "path",
    ["", "fedia3.json", "../ca.key", "/etc/passwd", "config.json/", "./config.json", "CONFIG.JSON"],
)
def test_only_what_the_manifest_lists_is_read(service: RunningService, anna, path: str) -> None:
    """
    No other name leads to any file, there or elsewhere.
    """
    with pytest.raises(NotFound, match="lists no file"):
        pieces(anna, service, path=path)


def test_nobody_reads_without_a_token(service: RunningService, calling) -> None:
    """
    Streams are checked as everything else.
    """
    with pytest.raises(BadToken):
        pieces(calling(), service)


def test_a_file_that_became_shorter_is_told(service: RunningService, anna, tmp_path: Path) -> None:
    """
    The pieces that are there come, then the error; the path on the coordinator stays its own.
    """
    path = service.settings.base / LARGE
    os.truncate(path, PIECE + 5)
    with pytest.raises(Corrupt, match=f"ends at {PIECE + 5} bytes") as refused:
        pieces(anna, service)
    assert str(tmp_path) not in str(refused.value)


def test_a_file_that_is_gone_is_told(service: RunningService, anna, tmp_path: Path) -> None:
    """
    As damage, without the coordinator's path.
    """
    (service.settings.base / "config.json").unlink()
    with pytest.raises(Corrupt) as refused:
        pieces(anna, service, path="config.json")
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize("offset", [0, 1, PIECE, 2**62])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_384, PIECE])
def test_a_piece_is_put_together_as_protobuf_would(offset: int, size: int) -> None:
    """
    Byte for byte.
    """
    data = os.urandom(size)
    expected = pb.FilePiece(offset=offset, data=data).SerializeToString()
    assert piece_bytes(offset, data) == expected


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """
    A file that was replaced by a link does not lead out of its folder.
    """
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(Corrupt, match="symbolic"):
        next(read_pieces(tmp_path / "link", 0, 6))


def test_whoever_stops_reading_leaves_no_file_open(service: RunningService, anna) -> None:
    """
    After a hundred readers that took one piece each, none of the file's descriptors is left.
    """
    request = pb.ReadFileRequest(digest=service.manifest.digest, path=LARGE)
    for _ in range(100):
        stream = anna.stream("BaseModels/ReadFile", request, pb.FilePiece)
        next(stream)
        stream.close()
    assert pieces(anna, service)  # queued behind the others' ends
    for _ in range(100):
        if (held := open_files().count(str(service.settings.base / LARGE))) == 0:
            break
        pieces(anna, service, path="config.json")
    assert held == 0


def open_files() -> list[str]:
    """The files that this process holds open."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(link.readlink()))
        except OSError:  # closed since it was listed
            continue
    return links


def test_two_bases_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """
    By name the trained one is meant, by digest each.
    """
    trained = paper_base(tmp_path / "trained", size=10)
    other = paper_base(tmp_path / "bases" / "y", size=11)
    manifests = Manifests(trained, BaseStore(tmp_path))
    assert manifests.named("paper") is manifests.trained
    assert manifests.find(read_manifest(other).digest).folder == other
