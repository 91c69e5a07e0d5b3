"""The way to a device's resident trainer: a Unix socket, frames of JSON and raw bytes, no pickle.

A frame is the length of its header (4 bytes, big endian), the length of its body (8 bytes), the
header as a JSON object and the body, which is a float32 vector or nothing. A request's header says
what to ``do``; an answer's holds facts, or the class of what went wrong. Nothing here imports
torch: Flower starts a process per message, which must be small.
"""

import json
import os
import socket
import socketserver
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedia3 import errors
from fedia3.adapters.adapter import Vector, vector_bytes, vector_of
from fedia3.adapters.update import ClientUpdate, TrainingPlan, TrainRequest
from fedia3.errors import BadInput, Fedia3Error, TrainerFailed, Unreachable

SOCKET_VARIABLE = "FEDIA3_TRAINER_SOCKET"  # names the socket to Flower's short-lived ClientApp
MAX_HEADER = 64 << 10  # bytes
MAX_BODY = 64 << 20  # bytes; an adapter of 16 million scales
LONGEST_PATH = 103  # bytes of a socket's path; macOS has room for 104 with the NUL, Linux for 108
ANSWER_WITHIN_S = 6 * 3600.0  # a training on a slow machine, waited for between two sleeps
LENGTHS = struct.Struct(">IQ")


@dataclass(frozen=True, eq=False)
class Frame:
    """One request or answer."""

    header: Mapping[str, Any]
    body: bytes = b""

    @classmethod
    def with_vector(cls, header: Mapping[str, Any], vector: Vector) -> "Frame":
        """A frame that carries a flat vector."""
        return cls(header, vector_bytes(vector))

    def vector(self) -> Vector:
        """The body as a flat float32 vector.

        Raises:
            BadAdapter: it has no whole number of scales.
        """
        return vector_of(self.body)


Answering = Callable[[Frame], Frame]


def send(connection: socket.socket, frame: Frame) -> None:
    """Write a frame.

    Raises:
        BadInput: it is larger than a reader would take.
    """
    header = json.dumps(dict(frame.header)).encode()
    _require_sizes(len(header), len(frame.body))
    connection.sendall(LENGTHS.pack(len(header), len(frame.body)) + header)
    connection.sendall(frame.body)


def receive(connection: socket.socket) -> Frame | None:
    """The next frame; None where the other end has hung up behind the last one.

    Raises:
        BadInput: it is too large, or its header is no JSON object.
        Unreachable: the other end was gone in the middle.
    """
    first = connection.recv(1)
    if not first:
        return None
    lengths = first + _exactly(connection, LENGTHS.size - 1)
    header_size, body_size = LENGTHS.unpack(lengths)
    _require_sizes(header_size, body_size)
    return Frame(_parsed(_exactly(connection, header_size)), _exactly(connection, body_size))


def _require_sizes(header: int, body: int) -> None:
    if header > MAX_HEADER or body > MAX_BODY:
        raise BadInput(
            f"a frame has a header of at most {MAX_HEADER} bytes and a body of at most {MAX_BODY}, "
            f"got {header} and {body}"
        )


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise Unreachable(f"the other end was gone after {len(data)} of {size} bytes")
        data += piece
    return bytes(data)


def _parsed(header: bytes) -> Mapping[str, Any]:
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise BadInput("expected a header of JSON, got something else") from error
    if not isinstance(fields, dict):
        raise BadInput(f"expected a header that is an object, got {type(fields).__name__}")
    return fields


# --- where it is ----------------------------------------------------------------------------


def place_socket(state: Path) -> Path:
    """Where the trainer of a state folder is to listen; only the owner can reach it.

    Inside the state folder; where that path is too long for a socket, in a temporary folder that
    ``trainer.sock.at`` names.
    """
    inside = state / "trainer.sock"
    if len(os.fsencode(inside)) <= LONGEST_PATH:
        return inside
    found = find_socket(state)
    if found.parent != state and _is_private(found.parent):
        return found
    short = Path(tempfile.mkdtemp(prefix="fedia3-", dir=_short_tmp())) / "trainer.sock"
    (state / "trainer.sock.at").write_text(str(short))
    return short


def find_socket(state: Path) -> Path:
    """Where the trainer of a state folder listens, if one runs."""
    try:
        return Path((state / "trainer.sock.at").read_text())
    except FileNotFoundError:
        return state / "trainer.sock"


def _is_private(folder: Path) -> bool:
    try:
        facts = folder.lstat()
    except OSError:
        return False
    return folder.is_dir() and facts.st_uid == os.getuid() and not facts.st_mode & 0o077


def _short_tmp() -> str | None:
    """The system's own temporary folder where ``TMPDIR`` is as deep as the state folder."""
    usual = tempfile.gettempdir()
    return None if len(os.fsencode(usual)) <= LONGEST_PATH - 40 else "/tmp"


# --- the answering end ----------------------------------------------------------------------


class FrameServer(socketserver.ThreadingUnixStreamServer):
    """Answers frames on a socket; whatever a request does wrong, the next is answered.

    An answer of a request that failed holds the error's class. Its text goes along only where it is
    one of fedia3's, which quote no person's words, and ``keeps_text`` says so of the request.
    """

    daemon_threads = True
    request_queue_size = 16

    def __init__(
        self,
        path: Path,
        answer: Answering,
        keeps_text: Callable[[Frame], bool] = lambda _: True,
        failed: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self.answer, self.keeps_text, self.failed = answer, keeps_text, failed
        path.unlink(missing_ok=True)  # of a trainer that was killed
        super().__init__(str(path), _Connection)
        path.chmod(0o600)


class _Connection(socketserver.BaseRequestHandler):
    server: FrameServer

    def handle(self) -> None:
        try:
            while (frame := receive(self.request)) is not None:
                send(self.request, self._answer(frame))
        except BadInput as error:  # no way to tell where the next frame begins
            send(self.request, Frame(_failure(error, with_text=True)))
        except (OSError, Unreachable):
            return  # who asked has gone

    def _answer(self, frame: Frame) -> Frame:
        try:
            return self.server.answer(frame)
        except Exception as error:  # one request's failure is no other's
            self.server.failed(error)
            return Frame(_failure(error, with_text=self.server.keeps_text(frame)))


def _failure(error: Exception, *, with_text: bool) -> dict[str, str]:
    text = str(error)[:1000] if with_text and isinstance(error, Fedia3Error) else ""
    return {"error": type(error).__name__, "text": text}


# --- the asking end -------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainerStatus:
    """How a device's trainer is."""

    base_digest: str
    schema_digest: str
    texts: int = 0
    data_digest: str = ""
    skipped: int = 0  # lines that cannot be read
    first_skipped: str | None = None  # file, line and reason
    too_little: str | None = None  # why the text is not enough to train on
    doing: str | None = None  # "training round 12", "personalizing"
    is_held: bool = False
    rounds: int = 0  # trained since it started
    last_round: int | None = None
    last_round_ms: int | None = None  # when it was through, ms since 1970
    last_loss: float | None = None  # mean training loss of that round
    last_failure: str | None = None  # class of the last error


@dataclass(frozen=True, eq=False)
class OwnPart:
    """What personalizing gave: the owner's own part, judged on text it was not trained on."""

    delta: Vector  # (n_params,)
    choice: Literal["personal", "global"]
    global_loss: float  # validation, nats per learned token; what the choice rests on
    personal_loss: float
    num_examples: int
    data_digest: str
    test: Mapping[str, float] = field(default_factory=dict)  # loss of base, global and personal


class RemoteTrainer:
    """The trainer behind a socket, as the thin ClientApp and the agent see it."""

    def __init__(self, path: Path, timeout_s: float = ANSWER_WITHIN_S) -> None:
        self._path, self._timeout_s = path, timeout_s

    def train(self, request: TrainRequest) -> ClientUpdate:
        """One round's work; the trainer knows whose text it has, whatever the client is called.

        Raises:
            TrainerFailed: it could not; ``kind`` names the error's class.
            Unreachable: no trainer listens, or it ended.
        """
        header = {
            "do": "train",
            "round": request.round_num,
            "seed": request.seed,
            "schema": request.schema_digest,
            "plan": asdict(request.plan),
        }
        answer = self._ask(Frame.with_vector(header, request.vector))
        return ClientUpdate(
            answer.vector(), answer.header["num_examples"], answer.header["metrics"]
        )

    def personalize(
        self, vector: Vector, global_digest: str, plan: TrainingPlan, seed: int
    ) -> OwnPart:
        """The owner's own part on the global adapter ``vector``; errors as :meth:`train`."""
        header = {
            "do": "personalize",
            "global_digest": global_digest,
            "seed": seed,
            "plan": asdict(plan),
        }
        answer = self._ask(Frame.with_vector(header, vector))
        return OwnPart(delta=answer.vector(), **answer.header)

    def reload(self) -> TrainerStatus:
        """Read the owner's text again, behind a training under way."""
        return TrainerStatus(**self._ask(Frame({"do": "reload"})).header)

    def status(self, timeout_s: float = 5.0) -> TrainerStatus:
        """How it is; answered during a training too."""
        return TrainerStatus(**self._ask(Frame({"do": "status"}), timeout_s).header)

    def hold(self, held: bool) -> None:
        """Stop between two batches, or go on; a held trainer keeps what it was doing."""
        self._ask(Frame({"do": "hold", "held": held}), 5.0)

    def _ask(self, frame: Frame, timeout_s: float | None = None) -> Frame:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s or self._timeout_s)
            try:
                connection.connect(str(self._path))
                send(connection, frame)
                answer = receive(connection)
            except OSError as error:
                raise Unreachable(
                    f"no trainer answers on {self._path} ({error.strerror or error})"
                ) from error
        if answer is None:
            raise Unreachable("the trainer ended without an answer")
        _raise_failure(answer.header)
        return answer


def _raise_failure(header: Mapping[str, Any]) -> None:
    if (name := header.get("error")) is None:
        return
    text = str(header.get("text", ""))
    kind = getattr(errors, str(name), None)
    if text and isinstance(kind, type) and issubclass(kind, Fedia3Error):
        raise kind(text)
    raise TrainerFailed(f"the trainer failed with {name}; its log says more", str(name))
