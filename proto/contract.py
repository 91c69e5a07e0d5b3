"""Every method of the services, with the rule that its ``.proto`` file gives it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from fedia3.proto import adapters_pb2, admin_pb2, base_models_pb2, enrolment_pb2, rules_pb2
from fedia3.proto.rules_pb2 import Scope

FILES: tuple[ModuleType, ...] = (enrolment_pb2, base_models_pb2, adapters_pb2, admin_pb2)

PIECE = 1 << 20  # bytes; a file's pieces end at its multiples, as its manifest's chunks do
MAX_MESSAGE = 4 << 20  # bytes of one request or response
MAX_METADATA = 8 << 10  # bytes

_LIMITS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.max_metadata_size", MAX_METADATA),
    ("grpc.absolute_max_metadata_size", MAX_METADATA),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_LIMITS,
    ("grpc.max_concurrent_streams", 64),  # of one connection
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.keepalive_time_ms", 60_000),  # a peer that is gone is noticed, and let go of
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),  # two coordinators on one port would share calls at random
)
CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    *_LIMITS,
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


@dataclass(frozen=True)
class Method:
    """One RPC and what has to hold before it runs."""

    path: str  # "/fedia3.v1.Adapters/Fetch"
    request: type[Message]
    response: type[Message]
    streams: bool  # the response is a stream of messages
    scopes: frozenset[Scope]
    max_deadline_s: int
    is_signed: bool

    @property
    def service(self) -> str:
        """``fedia3.v1.Adapters``."""
        return self.path.split("/")[1]

    @property
    def name(self) -> str:
        """``Fetch``."""
        return self.path.split("/")[2]


def _methods() -> Iterator[Method]:
    for file in FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            yield from (_method(method) for method in service.methods)


def _method(described: MethodDescriptor) -> Method:
    rule = _rule(described)
    return Method(
        path=f"/{described.containing_service.full_name}/{described.name}",
        request=GetMessageClass(described.input_type),
        response=GetMessageClass(described.output_type),
        streams=bool(described.server_streaming),
        scopes=frozenset(rule.scopes),
        max_deadline_s=rule.max_deadline_s,
        is_signed=rule.is_signed,
    )


def _rule(described: MethodDescriptor) -> rules_pb2.Rule:
    options: Any = described.GetOptions()  # its type knows no extensions
    rule: rules_pb2.Rule = options.Extensions[rules_pb2.rule]
    return rule


METHODS: Mapping[str, Method] = {method.path: method for method in _methods()}
"""By path. A method that its file gives no rule has no scope, so that nobody may call it."""
