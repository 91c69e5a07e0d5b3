"""Whatever bytes arrive, a method answers or refuses: it has no faults, and the server lives."""

import os
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedia3.proto.contract import METHODS, Method
from fedia3.proto.rules_pb2 import Scope
from fedia3.proto.signing import (
    NONCE_HEADER,
    SIGNATURE_HEADER,
    TIME_HEADER,
    TOKEN_HEADER,
    request_bytes,
)
from fedia3.testing_service import NO_LIMITS, RunningService, running_service

WORDS = ("", "anna", "../x", "a\0b", "0" * 64, "語", "x" * 200)
NUMBERS = (0, 1, -1, 2**31 - 1, -(2**31))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One server for all of it, on files."""
    with running_service(tmp_path_factory.mktemp("fuzz"), limits=NO_LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def channel(service: RunningService) -> Iterator[grpc.Channel]:
    """A connection to it."""
    credentials = grpc.ssl_channel_credentials(service.ca)
    with grpc.secure_channel(service.address, credentials) as opened:
        yield opened


@pytest.fixture(scope="module")
def callers(service: RunningService) -> dict[Scope, tuple[str, Any]]:
    """A token and a key that reach each kind of method."""
    anna = service.enrol("anna")
    return {
        Scope.SCOPE_DEVICE: (anna.token, anna.signing_key),
        Scope.SCOPE_ADMIN: (service.operator_token, service.operator_key),
    }


def metadata(service: RunningService, method: Method, body: bytes, callers: Any) -> list[Any]:
    """What lets the body in, whatever it is."""
    reached = next((callers[scope] for scope in sorted(method.scopes) if scope in callers), None)
    if reached is None:
        return []
    (token, key), time_ms, nonce = reached, service.now_ms(), os.urandom(16)
    signature = key.sign(request_bytes(method.path, body, time_ms, nonce, token))
    signed = [(NONCE_HEADER, nonce), (TIME_HEADER, str(time_ms)), (SIGNATURE_HEADER, signature)]
    return [(TOKEN_HEADER, f"Bearer {token}"), *(signed if method.is_signed else [])]


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """What one field may hold, odd things first."""
    plain: dict[int, st.SearchStrategy[Any]] = {
        FieldDescriptor.CPPTYPE_STRING: st.sampled_from(WORDS) | st.text(max_size=20),
        FieldDescriptor.CPPTYPE_INT32: st.sampled_from(NUMBERS),
        FieldDescriptor.CPPTYPE_INT64: st.sampled_from((*NUMBERS, 2**63 - 1, -(2**63))),
        FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
        FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    }
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=100)
    return plain[field.cpp_type]


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> Message:
    """A message of this kind with any of its fields set to anything."""
    message = kind()
    for field in message.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        if field.message_type is None:
            setattr(message, field.name, draw(values(field)))
        elif field.message_type.GetOptions().map_entry:
            getattr(message, field.name).update(draw(st.dictionaries(st.text(), st.floats())))
        else:
            getattr(message, field.name).CopyFrom(
                draw(messages(field.message_type._concrete_class))
            )
    return message


def outcome(channel: grpc.Channel, method: Method, body: bytes, said: list[Any]) -> grpc.StatusCode:
    """How the call ends."""
    try:
        if method.streams:
            list(channel.unary_stream(method.path)(body, timeout=10, metadata=said))
        else:
            channel.unary_unary(method.path)(body, timeout=10, metadata=said)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


WRONG = {
    grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED,
}  # fmt: skip

few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.path)
@few
@given(data=st.data())
def test_no_bytes_are_a_fault(service, channel, callers, method: Method, data: st.DataObject):
    """
    Random bytes as a body, signed where that is asked for.
    """
    body = data.draw(st.binary(max_size=300))
    said = metadata(service, method, body, callers)
    assert outcome(channel, method, body, said) not in WRONG


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.path)
@few
@given(data=st.data())
def test_no_message_is_a_fault(service, channel, callers, method: Method, data: st.DataObject):
    """
    Messages of the right kind whose fields hold anything at all.
    """
    body = data.draw(messages(method.request)).SerializeToString()
    said = metadata(service, method, body, callers)
    assert outcome(channel, method, body, said) not in WRONG
