"""86 to 94: what is wrong below the words: connections, streams, sizes, deadlines."""

import gzip
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedia3.adapters.base_store import BaseStore
from fedia3.client.base_download import BaseDownload
from fedia3.coordinator.services import places, rpcs
from fedia3.errors import Corrupt
from fedia3.proto import base_models_pb2 as pb
from fedia3.proto.contract import MAX_MESSAGE, METHODS, PIECE
from fedia3.testing_service import paper_base

from .scene import (
    BAD_INPUT,
    EVERYONE,
    FETCH,
    NO_DEADLINE,
    OUT_OF_RANGE,
    RESOLVE,
    TOO_LARGE,
    TOO_MANY_CALLS,
    UNAVAILABLE,
    UNKNOWN_METHOD,
    Raised,
    Refused,
    Scene,
    a_scene,
    require_refused,
)

READ = "/fedia3.v1.BaseModels/ReadFile"
LARGE = "model.safetensors"  # 3,000,000 bytes


def read(offset: int, path: str = LARGE):
    """A file of the base model from this offset."""

    def send(scene: Scene) -> bytes:
        request = pb.ReadFileRequest(digest=scene.base, path=path, offset=offset)
        return scene.call(READ, request, scene.anna)

    return send


def bomb(scene: Scene) -> bytes:
    """64 MiB of zeros, which gRPC packs into 64 KiB."""
    zeros = b"\0" * (64 << 20)
    assert len(gzip.compress(zeros)) < MAX_MESSAGE
    return scene.call(FETCH, zeros, scene.anna, compression=grpc.Compression.Gzip)


def of_no_end(timeout: float | None):
    """A call that says no time to give up, or one far away."""
    return lambda scene: scene.call(FETCH, b"", scene.anna, timeout=timeout)


TABLE = [
    Refused(86, "a gzip bomb", bomb, TOO_LARGE, "message larger than max"),
    Refused(90, "offset -1", read(-1), OUT_OF_RANGE, "3000000 bytes, got offset -1; start below"),
    Refused(90, "offset -2^63", read(-(2**63)), OUT_OF_RANGE, "3000000 bytes, got offset -92"),
    Refused(90, "behind the end", read(3_000_001), OUT_OF_RANGE, "got offset 3000001; start"),
    Refused(90, "offset 2^63-1", read(2**63 - 1), OUT_OF_RANGE, "got offset 9223372036854775807"),
    *(
        Refused(
            91,
            f"garbage for {method.name}",
            # the operator's, or a device's: whose token reaches the method
            lambda scene, path=path: scene.call(path, b"\xff" * 40, scene.who_may(path)),
            BAD_INPUT,
            f"{method.name} takes a fedia3.v1.* got 40 bytes that are none",
        )
        for path, method in METHODS.items()
    ),
    *(
        Refused(
            92, path, lambda scene, path=path: scene.call(path, b"", scene.operator),
            UNKNOWN_METHOD, "[Mm]ethod not found",
        )
        for path in ("/fedia3.v1.Admin/Format", "/fedia3.v2.Adapters/Fetch", "/flwr.Fleet/Pull")
    ),
    *(
        Refused(94, f"a deadline of {timeout} s", of_no_end(timeout), NO_DEADLINE, says)
        for timeout, says in ((None, "within 30 s, got none"), (60, "within 30 s, got one in"))
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_what_is_wrong_on_the_wire_is_refused(scene: Scene, case: Refused) -> None:
    """And the connection, or the next one, serves on."""
    require_refused(scene, case)
    scene.read(RESOLVE, EVERYONE)


def stalled(scene: Scene, held: ExitStack) -> None:
    """A download that has taken one piece and takes no more."""
    request = pb.ReadFileRequest(digest=scene.base, path=LARGE).SerializeToString()
    shown = scene.metadata(READ, request, scene.anna)
    stream = scene.channel.unary_stream(READ)(request, timeout=60, metadata=shown)
    held.callback(stream.cancel)
    next(stream)


def test_replies_that_nobody_takes_have_an_end(tmp_path: Path) -> None:
    """87: eight downloads of a device may stand still, the ninth is refused; others' calls run."""
    base = paper_base(tmp_path / "large", size=20_000_000)
    with a_scene(tmp_path / "scene", base=base) as scene, ExitStack() as held:
        for _ in range(rpcs.MAX_STREAMS_OF_ONE):
            stalled(scene, held)
        ninth = Refused(
            87, "a ninth", lambda s: stalled(s, held), TOO_MANY_CALLS, "come again in 5 s"
        )
        require_refused(scene, ninth)
        scene.read(RESOLVE, EVERYONE, scene.bob)


def test_a_request_that_never_comes_is_not_waited_for(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """88: its call ends when the time for a request is over, which is a tenth of a second here."""
    monkeypatch.setattr(places, "REQUEST_S", 0.1)
    gate = threading.Event()

    def drop_by_drop() -> Iterator[bytes]:
        gate.wait(30)
        yield b""

    slow = Refused(
        88,
        "a request drop by drop",
        lambda s: s.channel.stream_unary(FETCH)(drop_by_drop(), timeout=30),
        UNAVAILABLE,
        "the request did not come within 0.1 s",
    )
    require_refused(scene, slow)
    gate.set()


def test_half_open_connections_hold_nobody_up(scene: Scene) -> None:
    """93: two hundred that say nothing, half a hello, or hung up one way: others' calls run."""
    with ExitStack() as opened:
        for number in range(200):
            one = socket.create_connection(("127.0.0.1", scene.service.port), timeout=5)
            opened.callback(one.close)
            if number % 3 == 1:
                one.sendall(b"\x16\x03\x01\x02\x00\x01")  # TLS begins, and does not go on
            if number % 3 == 2:
                one.shutdown(socket.SHUT_WR)
        for _ in range(20):
            scene.read(RESOLVE, EVERYONE)


class Liar:
    """A coordinator that sends a file's pieces as it likes."""

    def __init__(self, *pieces: tuple[int, bytes]) -> None:
        self.pieces = [pb.FilePiece(offset=at, data=data) for at, data in pieces]

    def stream(self, name: str, request: pb.ReadFileRequest, *_args: Any, **_more: Any):
        """The small file is sent as it is, of the large one what was told."""
        if request.path == LARGE:
            return iter(self.pieces)
        return iter([pb.FilePiece(offset=0, data=b"{}")])


def downloaded(*pieces: tuple[int, bytes]):
    """A download from a coordinator that sends these pieces."""

    def use(scene: Scene) -> object:
        store = BaseStore(scene.folder / "home")
        return BaseDownload(Liar(*pieces), store).fetch(scene.service.manifest)  # type: ignore[arg-type]

    return use


ONE = b"\0" * PIECE
PIECES = [
    Raised(89, "a gap", downloaded((PIECE, ONE)), Corrupt, "asked for byte 0, got 1048576"),
    Raised(89, "out of order", downloaded((PIECE, ONE), (0, ONE)), Corrupt, "asked for byte 0"),
    Raised(
        89, "a piece twice", downloaded((0, b"ab"), (0, b"ab")), Corrupt, "asked for byte 2, got 0"
    ),
    Raised(89, "other bytes", downloaded((0, ONE)), Corrupt, "chunk 0 of 3 came with sha256"),
]


@pytest.mark.parametrize("case", PIECES, ids=str)
def test_pieces_that_do_not_follow_are_refused(scene: Scene, case: Raised) -> None:
    """By the device: the coordinator takes no uploads in pieces. What is no base is not kept."""
    with pytest.raises(case.error, match=case.says):
        case.use(scene)
    assert [entry.name for entry in BaseStore(scene.folder / "home").list()] == ["tiny"]


NUMBERS = {87, 88, 93, *(case.number for case in (*TABLE, *PIECES))}
