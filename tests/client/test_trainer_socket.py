"""Frames on a socket: what is sent arrives, and nothing that is sent brings the server down."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from fedia3.client import trainer_socket
from fedia3.client.trainer_socket import (
    LENGTHS,
    LONGEST_PATH,
    Frame,
    FrameServer,
    RemoteTrainer,
    find_socket,
    place_socket,
    receive,
    send,
)
from fedia3.errors import BadData, BadInput, TrainerFailed, Unreachable


def answer(frame: Frame) -> Frame:
    """Echoes; fails as asked."""
    if frame.header.get("do") == "leak":
        raise RuntimeError("Dear diary")
    if frame.header.get("do") == "status":
        raise BadData("chat.jsonl:3: expected text")
    return frame


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A connection to a server of :func:`answer` at ``path``."""
    with FrameServer(path, answer) as server, socket.socket(socket.AF_UNIX) as connection:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        try:
            connection.settimeout(10)
            connection.connect(str(path))
            yield connection
        finally:
            server.shutdown()


def asked(connection: socket.socket, frame: Frame) -> Frame:
    """The answer to a frame."""
    send(connection, frame)
    answered = receive(connection)
    assert answered is not None
    return answered


def test_frames_come_back_as_they_were_sent(tmp_path: Path):
    """
    Header and vector, two frames on one connection, the second without a body.
    """
    with listening(tmp_path / "s") as connection:
        echo = asked(connection, Frame.with_vector({"do": "x"}, np.float32([1, 2.5])))
        assert (echo.header, echo.vector().tolist()) == ({"do": "x"}, [1.0, 2.5])
        assert asked(connection, Frame({"do": "y"})).body == b""


def test_a_failure_names_its_class_and_the_next_request_is_answered(tmp_path: Path):
    """
    Only fedia3's own errors keep their text: it quotes nobody.
    """
    with listening(tmp_path / "s") as connection:
        assert asked(connection, Frame({"do": "leak"})).header == {
            "error": "RuntimeError",
            "text": "",
        }
        assert asked(connection, Frame({"do": "y"})).header == {"do": "y"}


def test_errors_come_through_as_what_they_were(tmp_path: Path):
    """
    One of ours with its text; any other as a failure that names the class.
    """
    with listening(tmp_path / "s"):
        trainer = RemoteTrainer(tmp_path / "s")
        with pytest.raises(BadData, match=r"chat\.jsonl:3"):
            trainer.status()
    with pytest.raises(TrainerFailed) as failure:
        trainer_socket._raise_failure({"error": "OutOfMemoryError"})
    assert failure.value.kind == "OutOfMemoryError"


def test_nobody_there_is_unreachable(tmp_path: Path):
    """
    No socket, and one whose server is gone.
    """
    with pytest.raises(Unreachable, match="no trainer answers"):
        RemoteTrainer(tmp_path / "s").status()


@pytest.mark.parametrize(
    "sent",
    [
        LENGTHS.pack(1 << 30, 0),
        LENGTHS.pack(2, 1 << 60),
        LENGTHS.pack(4, 0) + b"nope",
        LENGTHS.pack(2, 0) + b"[]",
        LENGTHS.pack(3000, 0) + b"[" * 3000,
    ],
)
def test_what_is_no_frame_is_refused_and_costs_no_memory(tmp_path: Path, sent: bytes):
    """
    Lengths beyond the caps and headers that are no object end the connection, not the server.
    """
    with listening(tmp_path / "s") as connection:
        connection.sendall(sent)
        refused = receive(connection)
        assert refused is not None
        assert refused.header["error"] == "BadInput"
        with socket.socket(socket.AF_UNIX) as second:
            second.connect(str(tmp_path / "s"))
            assert asked(second, Frame({"do": "y"})).header == {"do": "y"}


def test_a_caller_that_goes_in_the_middle_harms_nobody(tmp_path: Path):
    """
    Half a frame and no more; the next caller is answered.
    """
    with listening(tmp_path / "s") as connection:
        connection.sendall(LENGTHS.pack(100, 0) + b"{")
        connection.close()
        with socket.socket(socket.AF_UNIX) as second:
            second.connect(str(tmp_path / "s"))
            assert asked(second, Frame({"do": "y"})).header == {"do": "y"}


def test_half_a_number_is_no_vector():
    """
    Five bytes are one float32 and a rest.
    """
    with pytest.raises(BadInput, match="5 bytes"):
        Frame({}, b"12345").vector()


def test_a_frame_too_large_to_read_is_not_sent(tmp_path: Path):
    """
    The sender learns it, before a byte is on its way.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(BadInput, match="at most"):
        send(ours, Frame({"words": "x" * (1 << 17)}))


def test_a_path_too_long_for_a_socket_gets_a_private_folder(tmp_path: Path):
    """
    The state folder remembers it, and only its owner can enter it.
    """
    deep = tmp_path / ("d" * LONGEST_PATH)
    deep.mkdir(mode=0o700)
    placed = place_socket(deep)
    assert len(str(placed).encode()) <= LONGEST_PATH
    assert placed.parent.stat().st_mode & 0o077 == 0
    assert find_socket(deep) == placed == place_socket(deep)
    placed.parent.rmdir()
    assert place_socket(deep) != placed  # the system cleaned its temporary folder up
    find_socket(deep).parent.rmdir()


def test_a_short_path_is_inside_the_state_folder(tmp_path: Path):
    """
    As the layout of a state folder says.
    """
    assert place_socket(Path("/s")) == find_socket(Path("/s")) == Path("/s/trainer.sock")


def test_a_header_is_plain_json(tmp_path: Path):
    """
    Whatever reads the socket needs no fedia3 to do so.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, Frame({"do": "status"}))
        data = theirs.recv(1000)
    assert json.loads(data[LENGTHS.size :]) == {"do": "status"}
