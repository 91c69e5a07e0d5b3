from fedia3.proto import rules_pb2 as _rules_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class BeginRequest(_message.Message):
    __slots__ = ("code",)
    CODE_FIELD_NUMBER: _ClassVar[int]
    code: str
    def __init__(self, code: _Optional[str] = ...) -> None: ...

class BeginResponse(_message.Message):
    __slots__ = ("challenge",)
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    challenge: bytes
    def __init__(self, challenge: _Optional[bytes] = ...) -> None: ...

class CompleteRequest(_message.Message):
    __slots__ = ("code", "challenge", "device_name", "signing_key", "node_key", "signing_key_proof", "node_key_proof")
    CODE_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    SIGNING_KEY_FIELD_NUMBER: _ClassVar[int]
    NODE_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNING_KEY_PROOF_FIELD_NUMBER: _ClassVar[int]
    NODE_KEY_PROOF_FIELD_NUMBER: _ClassVar[int]
    code: str
    challenge: bytes
    device_name: str
    signing_key: bytes
    node_key: bytes
    signing_key_proof: bytes
    node_key_proof: bytes
    def __init__(self, code: _Optional[str] = ..., challenge: _Optional[bytes] = ..., device_name: _Optional[str] = ..., signing_key: _Optional[bytes] = ..., node_key: _Optional[bytes] = ..., signing_key_proof: _Optional[bytes] = ..., node_key_proof: _Optional[bytes] = ...) -> None: ...

class CompleteResponse(_message.Message):
    __slots__ = ("device_id", "user", "token", "token_expires_ms", "ca", "coordinator_keys", "fleet_address", "base_digest")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    CA_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_KEYS_FIELD_NUMBER: _ClassVar[int]
    FLEET_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    user: str
    token: str
    token_expires_ms: int
    ca: bytes
    coordinator_keys: _containers.RepeatedScalarFieldContainer[bytes]
    fleet_address: str
    base_digest: str
    def __init__(self, device_id: _Optional[str] = ..., user: _Optional[str] = ..., token: _Optional[str] = ..., token_expires_ms: _Optional[int] = ..., ca: _Optional[bytes] = ..., coordinator_keys: _Optional[_Iterable[bytes]] = ..., fleet_address: _Optional[str] = ..., base_digest: _Optional[str] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("token", "token_expires_ms")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    token: str
    token_expires_ms: int
    def __init__(self, token: _Optional[str] = ..., token_expires_ms: _Optional[int] = ...) -> None: ...
