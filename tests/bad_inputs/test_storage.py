"""95 to 99: what lies on the disk, what is signed for it, and who names it by a path."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedia3.adapters.encoding import digest
from fedia3.client.records import (
    TrustedKeys,
    opened_manifest,
    opened_version,
    require_asked_for,
)
from fedia3.errors import BadSignature, Corrupt
from fedia3.proto import adapters_pb2, base_models_pb2
from fedia3.proto.signing import signed_bytes

from .scene import (
    ANNA,
    BAD_INPUT,
    CORRUPT,
    EVERYONE,
    FETCH,
    NOT_FOUND,
    RESOLVE,
    Raised,
    Refused,
    Scene,
    a_scene,
    require_refused,
)

MANIFEST, READ = "/fedia3.v1.BaseModels/GetManifest", "/fedia3.v1.BaseModels/ReadFile"


def blob(scene: Scene) -> Path:
    """Where anna's part lies."""
    name = digest(scene.good)
    return scene.folder / "registry" / "blobs" / name[:2] / name[2:4] / name


def linked(place: Callable[[Scene], Path]) -> Callable[[Scene], None]:
    """A file moved away, and a link to it in its place: the right bytes, by another way."""

    def move(scene: Scene) -> None:
        path = place(scene)
        path.replace(scene.folder / "moved")
        path.symlink_to(scene.folder / "moved")

    return move


def flipped(scene: Scene) -> None:
    """One bit of anna's part."""
    data = bytearray(blob(scene).read_bytes())
    data[-1] ^= 1
    blob(scene).write_bytes(data)


def in_the_base(scene: Scene) -> Path:
    """A file of the base model."""
    return scene.folder / "paper" / "config.json"


def read_file(path: str) -> Callable[..., bytes]:
    """A file of the base model, by a path of the caller's own."""
    return lambda scene, *_made: scene.call(
        READ, base_models_pb2.ReadFileRequest(digest=scene.base, path=path), scene.anna
    )


def fetch_annas(scene: Scene, *_made: object) -> bytes:
    """Anna's part."""
    return scene.read(FETCH, ANNA)


DAMAGE = [
    Refused(
        95,
        "a link for a blob",
        fetch_annas,
        CORRUPT,
        "^[0-9a-f/]+ in the blob store is a symbolic link",
        given=linked(blob),
    ),
    Refused(
        95,
        "a link for a blob's folder",
        fetch_annas,
        CORRUPT,
        "^[0-9a-f]./.. in the blob store is a symbolic link",
        given=linked(lambda scene: blob(scene).parent),
    ),
    Refused(
        95,
        "a publish onto a link",
        lambda scene, *_made: scene.publish(),
        CORRUPT,
        "is a symbolic link",
        given=linked(blob),
    ),
    Refused(
        95,
        "a link in the base model",
        read_file("config.json"),
        CORRUPT,
        "what the coordinator stored is damaged; its log says more",
        given=linked(in_the_base),
    ),
    Refused(96, "a flipped bit", fetch_annas, CORRUPT, "not served, restore it", given=flipped),
    Refused(
        96,
        "a file that is gone",
        fetch_annas,
        CORRUPT,
        "the bytes of version 1 of user 'anna' are gone; restore blob",
        given=lambda scene: blob(scene).unlink(),
    ),
]


@pytest.mark.parametrize("case", DAMAGE, ids=str)
def test_what_is_damaged_is_not_served(
    tmp_path: Path, case: Refused, caplog: pytest.LogCaptureFixture
) -> None:
    """The words tell no path of the coordinator's; its log has the fault; the rest is served."""
    with a_scene(tmp_path) as scene:
        require_refused(scene, case)
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        scene.read(FETCH, EVERYONE)


def manifest(scene: Scene) -> base_models_pb2.SignedManifest:
    """What the coordinator signed of its base model."""
    return base_models_pb2.SignedManifest.FromString(scene.call(MANIFEST, b"", scene.anna))


def trusted(scene: Scene) -> TrustedKeys:
    """The key that anna's phone was enrolled with."""
    return TrustedKeys((scene.service.coordinator_key,))


def signed_by_a_stranger(scene: Scene) -> object:
    """The very manifest, soundly signed, by a key nobody pinned."""
    key, said = Ed25519PrivateKey.generate(), manifest(scene)
    said.signature = key.sign(signed_bytes("manifest", said.manifest))
    said.key = key.public_key().public_bytes_raw()
    return opened_manifest(said, trusted(scene))


def with_a_strangers_signature(scene: Scene) -> object:
    """The pinned key's name over another one's signature: one good word of two is none."""
    said = manifest(scene)
    said.signature = Ed25519PrivateKey.generate().sign(signed_bytes("manifest", said.manifest))
    return opened_manifest(said, trusted(scene))


def signed_for_something_else(scene: Scene) -> object:
    """A record, soundly signed as one, shown as a manifest."""
    record = adapters_pb2.SignedRecord.FromString(scene.read(RESOLVE, EVERYONE))
    said = base_models_pb2.SignedManifest(
        manifest=record.record, signature=record.signature, key=record.key
    )
    return opened_manifest(said, trusted(scene))


def edited(scene: Scene) -> object:
    """A manifest with another size in it."""
    said = manifest(scene)
    said.manifest = said.manifest.replace(b"3000000", b"3000001")
    return opened_manifest(said, trusted(scene))


def older_than_the_floor(scene: Scene) -> object:
    """Version 1, where the device has seen version 2."""
    record = adapters_pb2.SignedRecord.FromString(scene.read(RESOLVE, EVERYONE))
    version = opened_version(record, trusted(scene))
    return require_asked_for(version, None, scene.base, floor=2)


SIGNED = [
    Raised(97, "an unknown key", signed_by_a_stranger, BadSignature, "not the coordinator's; .*en"),
    Raised(97, "another's signature", with_a_strangers_signature, BadSignature, "is not what the"),
    Raised(97, "another purpose", signed_for_something_else, BadSignature, "is not what the coord"),
    Raised(97, "an edited manifest", edited, BadSignature, "is not what the coordinator signed"),
    Raised(
        98, "a downgrade", older_than_the_floor, Corrupt, "revision 2 was here before; .*old backup"
    ),
]


@pytest.mark.parametrize("case", SIGNED, ids=str)
def test_a_device_does_not_believe_it(scene: Scene, case: Raised) -> None:
    """Answers of the real service, changed on their way."""
    with pytest.raises(case.error, match=case.says):
        case.use(scene)


def named(name: str) -> Callable[..., bytes]:
    """A base model by a name of the caller's own."""
    return lambda scene, *_made: scene.call(
        MANIFEST, base_models_pb2.GetManifestRequest(name=name), scene.anna
    )


PATHS = (
    "../paper.token", "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "./config.json",
    "//proc/self/root/etc/passwd", "config.json#", "config.json?x", "config.json\0", "paper/..",
    "fedia3.json", "models:/paper/1", "",
)  # fmt: skip
TRICKS = [
    *(
        Refused(99, f"file {path!r}", read_file(path), NOT_FOUND, "lists no file .*says which")
        for path in PATHS
    ),
    *(
        Refused(99, f"base {path!r}", named(path), NOT_FOUND, "has no base model .*the default")
        for path in PATHS
        if path
    ),
    *(
        Refused(
            99,
            f"digest {path!r}",
            lambda scene, path=path: scene.read(FETCH, EVERYONE, base_digest=path),
            BAD_INPUT,
            "a sha256 of 64 hex digits, got",
        )
        for path in PATHS
    ),
]


@pytest.mark.parametrize("case", TRICKS, ids=str)
def test_no_path_of_a_callers_is_followed(scene: Scene, case: Refused) -> None:
    """A file is what the manifest lists, a base what is offered, a digest a digest."""
    require_refused(scene, case)


NUMBERS = {case.number for case in (*DAMAGE, *SIGNED, *TRICKS)}
