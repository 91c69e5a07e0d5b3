"""Errors across the wire: fedia3's as google.rpc.Status with a :class:`Reason`, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from fedia3 import errors
from fedia3.errors import Fedia3Error
from fedia3.proto.rules_pb2 import Reason

DOMAIN = "fedia3"
MAX_TEXT = 1000  # bytes of a message; on the wire, twice in the metadata, up to five times that

# the first class that fits, so the branches' ends stand before their roots
_REASONS: tuple[tuple[type[Fedia3Error], Reason, int], ...] = (
    (errors.BadAdapter, Reason.REASON_BAD_ADAPTER, Code.INVALID_ARGUMENT),
    (errors.WrongBaseModel, Reason.REASON_WRONG_BASE_MODEL, Code.FAILED_PRECONDITION),
    (errors.NoDeadline, Reason.REASON_NO_DEADLINE, Code.INVALID_ARGUMENT),
    (errors.OutOfRange, Reason.REASON_OUT_OF_RANGE, Code.OUT_OF_RANGE),
    (errors.BadInput, Reason.REASON_BAD_INPUT, Code.INVALID_ARGUMENT),
    (errors.NotFound, Reason.REASON_NOT_FOUND, Code.NOT_FOUND),
    (errors.Erased, Reason.REASON_ERASED, Code.ABORTED),
    (errors.Conflict, Reason.REASON_CONFLICT, Code.ABORTED),
    (errors.Corrupt, Reason.REASON_CORRUPT, Code.DATA_LOSS),
    (errors.StorageFailed, Reason.REASON_STORAGE_FAILED, Code.RESOURCE_EXHAUSTED),
    (errors.BadToken, Reason.REASON_BAD_TOKEN, Code.UNAUTHENTICATED),
    (errors.BadInvite, Reason.REASON_BAD_INVITE, Code.UNAUTHENTICATED),
    (errors.BadSignature, Reason.REASON_BAD_SIGNATURE, Code.UNAUTHENTICATED),
    (errors.Replayed, Reason.REASON_REPLAYED, Code.UNAUTHENTICATED),
    (errors.WrongClock, Reason.REASON_CLOCK, Code.UNAUTHENTICATED),
    (errors.NotAllowed, Reason.REASON_NOT_ALLOWED, Code.PERMISSION_DENIED),
    (errors.TooManyCalls, Reason.REASON_TOO_MANY_CALLS, Code.RESOURCE_EXHAUSTED),
    (errors.Unreachable, Reason.REASON_UNAVAILABLE, Code.UNAVAILABLE),
)
_CLASSES: Mapping[str, type[Fedia3Error]] = {
    Reason.Name(reason): kind for kind, reason, _code in _REASONS
}


def to_status(error: Exception) -> Status:
    """An error as it is sent; what is not one of ours becomes a fault without its text."""
    for kind, reason, code in _REASONS:
        if isinstance(error, kind):
            return _status(code, str(error), reason, getattr(error, "retry_after_s", None))
    return _status(
        Code.INTERNAL, "a fault of the coordinator; its log says more", Reason.REASON_FAULT, None
    )


def from_rpc_error(error: grpc.RpcError) -> Fedia3Error:
    """A failed call's error as ours; without a status of ours, what the transport says."""
    try:
        told = _told(error)
    except (ValueError, OverflowError, DecodeError):  # a status that makes no sense is none
        told = None
    return told or _from_transport(error)


def _told(error: grpc.RpcError) -> Fedia3Error | None:
    """What a status of ours says, None where it is not ours."""
    status = rpc_status.from_call(error) if isinstance(error, grpc.Call) else None
    retry_after_s = None
    kind: type[Fedia3Error] | None = None
    details: Sequence[Any] = status.details if status else ()
    for detail in details:
        info, retry = ErrorInfo(), RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            kind = _CLASSES.get(info.reason, Fedia3Error)
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    if kind is None or status is None:
        return None
    if issubclass(kind, errors.Unreachable):
        return kind(_plain(status.message), retry_after_s)
    return kind(_plain(status.message))


def _plain(text: str) -> str:
    """What a stranger says, fit for a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _status(code: int, text: str, reason: Reason, retry_s: float | None) -> Status:
    # Cut in bytes: metadata is limited, and gRPC writes each byte beyond ASCII as three.
    cut = text.encode(errors="replace")[:MAX_TEXT].decode(errors="ignore")
    status = Status(code=code, message=cut)
    status.details.add().Pack(ErrorInfo(reason=Reason.Name(reason), domain=DOMAIN))
    if retry_s is not None:
        delay = Duration(nanos=round(retry_s * 1e9) % 10**9, seconds=int(retry_s))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return status


def _from_transport(error: grpc.RpcError) -> Fedia3Error:
    code = error.code() if isinstance(error, grpc.Call) else None
    said = f"{code.name if code else type(error).__name__}"
    details = _plain((error.details() if isinstance(error, grpc.Call) else "") or "")
    unreachable = {
        grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED,
    }  # fmt: skip
    if code in unreachable:
        return errors.Unreachable(f"the coordinator does not answer ({said}): {details[:200]}")
    return Fedia3Error(f"the call failed ({said}): {details[:200]}")
