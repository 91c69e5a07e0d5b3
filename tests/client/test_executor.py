import os
import signal
import threading
import time

from flwr.app import Message, MessageType, Metadata, RecordDict

from fedia3.client import executor
from fedia3.client.executor import IDLE_POLL_S, Pause


def test_a_signal_ends_a_long_pause():
    """The executor asks at once when a message has passed the gateway."""
    pause = Pause(signal.SIGURG)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGURG)).start()
    before = time.monotonic()
    pause.take()
    assert time.monotonic() - before < IDLE_POLL_S / 2


def test_after_a_signal_pauses_are_long_again(monkeypatch):
    """A question that comes early gets the task before its message is there."""
    monkeypatch.setattr(executor, "IDLE_POLL_S", 0.2)
    pause = Pause(signal.SIGURG)
    os.kill(os.getpid(), signal.SIGURG)
    pause.take()
    before = time.monotonic()
    pause.take()
    assert time.monotonic() - before >= 0.19


def test_a_message_that_hangs_does_not_keep_the_next_from_being_answered(monkeypatch):
    """The fork of a message that nobody waits for any more is ended for the next."""
    reading, writing = os.pipe()

    def answer(address: str, token: str) -> None:
        if token == "hangs":
            time.sleep(60)
        os.write(writing, token.encode())

    monkeypatch.setattr(executor, "answer", answer)
    worker = executor.Worker("nowhere")
    worker.begin("hangs")
    worker.begin("is quick")
    assert os.read(reading, 100) == b"is quick"
    worker.look(end=True)
    assert worker._pid is None


def test_a_reply_is_dated_as_the_message_it_answers():
    """A device whose clock is an hour ahead would send one that is over already."""
    asked, answered = (
        _message(created_at=1000.0, ttl=15.0),
        _message(created_at=4600.0, ttl=-3585.0),
    )
    reply = executor.in_its_time(answered, asked)
    assert (reply.metadata.created_at, reply.metadata.ttl) == (1000.0, 15.0)


def _message(created_at: float, ttl: float) -> Message:
    metadata = Metadata(1, "id", 1, 2, "", "", created_at, ttl, MessageType.TRAIN)
    return Message(RecordDict(), metadata=metadata)  # type: ignore[call-overload]  # Flower's own way
