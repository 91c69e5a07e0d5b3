"""Flower's fleet API on the wire: a node's calls, what is answered, and who looks at both.

A node's every call is one POST of a protobuf message to ``/v1/fleet/OPERATION``, with its public
key, a time and the key's signature over the time in headers. :mod:`fedia3.proto.relay` passes such
calls on and lets a judge look at each.
"""

import binascii
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from flwr.proto.fab_pb2 import GetFabRequest, GetFabResponse
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse
from google.protobuf.message import DecodeError, Message

from fedia3.errors import BadInput

PREFIX = "/v1/fleet/"
KEY_HEADER = "flwr-public-key"  # base64 of the node's key, PEM SubjectPublicKeyInfo
MEDIA_TYPE = "application/protobuf"

MAX_BODY = 12 << 20  # bytes of a request: an update is one object, of 10 MB for a 70B base
SMALL_CALL = 256 << 10  # bytes of a request that pushes no object

Headers = Mapping[str, str]


@dataclass(frozen=True)
class Operation:
    """One call of a node."""

    name: str
    request: type[Message]
    response: type[Message]
    max_body: int = SMALL_CALL  # bytes

    @property
    def path(self) -> str:
        """``/v1/fleet/pull-messages``."""
        return PREFIX + self.name


_OPERATIONS = (
    Operation("activate-node", ActivateNodeRequest, ActivateNodeResponse),
    Operation("deactivate-node", DeactivateNodeRequest, DeactivateNodeResponse),
    Operation("send-node-heartbeat", SendNodeHeartbeatRequest, SendNodeHeartbeatResponse),
    Operation("pull-messages", PullMessagesRequest, PullMessagesResponse),
    Operation("push-messages", PushMessagesRequest, PushMessagesResponse),
    Operation("get-run", GetRunRequest, GetRunResponse),
    Operation("get-fab", GetFabRequest, GetFabResponse),
    Operation("push-object", PushObjectRequest, PushObjectResponse, MAX_BODY),
    Operation("pull-object", PullObjectRequest, PullObjectResponse),
    Operation(
        "confirm-message-received", ConfirmMessageReceivedRequest, ConfirmMessageReceivedResponse
    ),
)
OPERATIONS: Mapping[str, Operation] = {operation.path: operation for operation in _OPERATIONS}
"""By path: what a registered node needs. It neither registers nor unregisters itself."""


@dataclass(frozen=True)
class Call:
    """One call of a node, as it came."""

    operation: Operation
    headers: Headers  # names in lower case
    body: bytes

    @cached_property
    def message(self) -> Message:
        """The body read.

        Raises:
            BadInput: it is no such message.
        """
        return _read(self.operation.request, self.body)

    @cached_property
    def key(self) -> bytes:
        """The node's public key that the call shows; the SuperLink checks that it has signed.

        Raises:
            BadInput: there is none.
        """
        try:
            return b64decode(self.headers.get(KEY_HEADER, ""), validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadInput(f"{KEY_HEADER} is not base64") from error


@dataclass(frozen=True)
class Answer:
    """What goes back to the node."""

    status: int = 200
    body: bytes = b""
    media_type: str = MEDIA_TYPE
    date: str = ""  # the answering clock, as HTTP writes it; empty where nobody answered

    def message(self, operation: Operation) -> Message:
        """The body read.

        Raises:
            BadInput: it is no such message.
        """
        return _read(operation.response, self.body)


def _read(kind: type[Message], data: bytes) -> Message:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise BadInput(f"expected a {kind.__name__}, got {len(data)} other bytes") from error


def refusal(status: int, why: str) -> Answer:
    """An answer that says no; a node's log shows the reason.

    Of these a node repeats a call only after 502, 503 and 504, and ends itself after a heartbeat's
    401.
    """
    return Answer(status, why.encode(), "text/plain; charset=utf-8")


class Judge(Protocol):
    """Who looks at the calls."""

    async def greet(self, call: Call) -> Answer | None:
        """An answer before the call's body is read, None to read it; ``call.body`` is empty yet.

        A ``BadInput`` raised here or below answers 400.
        """
        ...

    async def before(self, call: Call) -> Answer | None:
        """An answer instead of the SuperLink's, None to pass the call on."""
        ...

    async def after(self, call: Call, answer: Answer) -> Answer:
        """The SuperLink's answer, or another in its place."""
        ...


class LetThrough:
    """Lets every fleet call through."""

    async def greet(self, call: Call) -> Answer | None:  # noqa: ARG002  # the protocol's
        """Read it."""
        return None

    async def before(self, call: Call) -> Answer | None:  # noqa: ARG002  # the protocol's
        """Pass it on."""
        return None

    async def after(self, call: Call, answer: Answer) -> Answer:  # noqa: ARG002  # the protocol's
        """As it is."""
        return answer
