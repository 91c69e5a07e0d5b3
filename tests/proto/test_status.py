"""Errors cross the wire as what they are: class, words and when to come again."""

from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from fedia3 import errors
from fedia3.errors import Fedia3Error, TooManyCalls, Unreachable
from fedia3.proto.rules_pb2 import Reason
from fedia3.proto.status import DOMAIN, MAX_TEXT, from_rpc_error, to_status

# What happens on a device only, and never reaches a caller as itself.
ELSEWHERE = {"BadData", "BadTargets", "BadSetting", "NoGradient", "QuorumNotMet", "TrainerFailed"}


def every_error() -> Iterator[type[Fedia3Error]]:
    """The whole tree, without its root."""
    waiting = list(Fedia3Error.__subclasses__())
    while waiting:
        kind = waiting.pop()
        if kind.__module__ == errors.__name__:
            yield kind
            waiting.extend(kind.__subclasses__())


class Failed(grpc.RpcError, grpc.Call):
    """A call that ended with this status, as gRPC hands it to its caller."""

    def __init__(self, status: Status) -> None:
        self._status = rpc_status.to_status(status)

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return self._status.details

    def trailing_metadata(self):
        return self._status.trailing_metadata

    def initial_metadata(self):
        return ()

    def is_active(self):
        return False

    def time_remaining(self):
        return None

    def cancel(self):
        return False

    def add_callback(self, callback):
        return False


def sent(error: Exception) -> Fedia3Error:
    """The error as it arrives on the other side."""
    return from_rpc_error(Failed(to_status(error)))


@pytest.mark.parametrize("kind", sorted(every_error(), key=lambda kind: kind.__name__))
def made(kind: type[Fedia3Error]) -> Fedia3Error:
    """An error of this kind that says "said", whatever else its constructor wants."""
    error = kind.__new__(kind)
    Exception.__init__(error, "said")
    return error


@pytest.mark.parametrize("kind", sorted(every_error(), key=lambda kind: kind.__name__))
def test_every_error_arrives_as_itself(kind: type[Fedia3Error]) -> None:
    """
    A caller can tell every error that a coordinator raises; those that only happen elsewhere
    arrive as what they are a kind of.
    """
    arrived = sent(made(kind))
    assert isinstance(made(kind), type(arrived))
    assert (type(arrived) is kind) == (kind.__name__ not in ELSEWHERE)
    assert str(arrived) == "said" or type(arrived) is Fedia3Error


def test_when_to_come_again_arrives() -> None:
    """
    Two and a half seconds stay two and a half; where nothing is known, nothing arrives.
    """
    assert sent(TooManyCalls("wait", 2.5)).retry_after_s == 2.5
    assert sent(Unreachable("down")).retry_after_s is None


def test_a_fault_says_nothing_of_itself() -> None:
    """
    What broke inside stays inside.
    """
    status = to_status(KeyError("/var/lib/secret"))
    assert "secret" not in str(status)
    assert grpc.StatusCode.INTERNAL.value[0] == status.code
    assert type(sent(KeyError("secret"))) is Fedia3Error


@pytest.mark.parametrize("text", ["x" * 5000, "語" * 5000, "\udcff" * 5000, "a\nb"])
def test_words_are_cut_to_what_metadata_holds(text: str) -> None:
    """
    However long and whatever its letters, a message fits, and is one that can be sent.
    """
    status = to_status(errors.BadInput(text))
    assert len(status.message.encode()) <= MAX_TEXT
    assert status.SerializeToString()


def test_every_reason_is_raised_by_some_error() -> None:
    """
    The enum holds no reason without an error, and no error without a reason.
    """
    told = {detail_reason(to_status(made(kind))) for kind in every_error()}
    assert told == set(Reason.keys()) - {"REASON_UNSPECIFIED"}


def detail_reason(status: Status) -> str:
    """The name of the reason in a status of ours."""
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == DOMAIN
    return info.reason


def test_what_the_transport_says_is_translated() -> None:
    """
    A status that is not ours is nobody there, or a plain failure.
    """
    gone = from_rpc_error(Failed(Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="x")))
    odd = from_rpc_error(Failed(Status(code=grpc.StatusCode.UNIMPLEMENTED.value[0], message="x")))
    assert type(gone) is Unreachable
    assert type(odd) is Fedia3Error


def test_a_status_that_makes_no_sense_is_a_plain_failure() -> None:
    """
    One that contradicts its code, a pause of a hundred thousand years, bytes that are no detail:
    whatever a stranger answers, the caller gets an error of ours.
    """
    mixed = Failed(to_status(errors.NotFound("x")))
    mixed.code = lambda: grpc.StatusCode.ABORTED  # type: ignore[method-assign]
    odd = to_status(errors.NotFound("x"))
    odd.details[0].value = b"\xff\xff"
    long = to_status(TooManyCalls("x", 1.0))
    long.details[1].Pack(RetryInfo(retry_delay=Duration(seconds=2**62)))
    for failed in (mixed, Failed(odd), Failed(long)):
        assert isinstance(from_rpc_error(failed), Fedia3Error)


def test_a_message_cannot_drive_a_terminal() -> None:
    """
    What a coordinator says is printed: control characters are gone.
    """
    assert str(sent(errors.NotFound("\x1b[2J\x07none\n"))) == " [2J none "
