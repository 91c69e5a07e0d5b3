from google.protobuf import descriptor_pb2 as _descriptor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Scope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCOPE_UNSPECIFIED: _ClassVar[Scope]
    SCOPE_ANYONE: _ClassVar[Scope]
    SCOPE_DEVICE: _ClassVar[Scope]
    SCOPE_SERVICE: _ClassVar[Scope]
    SCOPE_ADMIN: _ClassVar[Scope]

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASON_UNSPECIFIED: _ClassVar[Reason]
    REASON_BAD_INPUT: _ClassVar[Reason]
    REASON_BAD_ADAPTER: _ClassVar[Reason]
    REASON_WRONG_BASE_MODEL: _ClassVar[Reason]
    REASON_NO_DEADLINE: _ClassVar[Reason]
    REASON_NOT_FOUND: _ClassVar[Reason]
    REASON_CONFLICT: _ClassVar[Reason]
    REASON_CORRUPT: _ClassVar[Reason]
    REASON_STORAGE_FAILED: _ClassVar[Reason]
    REASON_BAD_TOKEN: _ClassVar[Reason]
    REASON_BAD_INVITE: _ClassVar[Reason]
    REASON_BAD_SIGNATURE: _ClassVar[Reason]
    REASON_REPLAYED: _ClassVar[Reason]
    REASON_CLOCK: _ClassVar[Reason]
    REASON_NOT_ALLOWED: _ClassVar[Reason]
    REASON_TOO_MANY_CALLS: _ClassVar[Reason]
    REASON_OUT_OF_RANGE: _ClassVar[Reason]
    REASON_UNAVAILABLE: _ClassVar[Reason]
    REASON_FAULT: _ClassVar[Reason]
    REASON_ERASED: _ClassVar[Reason]
SCOPE_UNSPECIFIED: Scope
SCOPE_ANYONE: Scope
SCOPE_DEVICE: Scope
SCOPE_SERVICE: Scope
SCOPE_ADMIN: Scope
REASON_UNSPECIFIED: Reason
REASON_BAD_INPUT: Reason
REASON_BAD_ADAPTER: Reason
REASON_WRONG_BASE_MODEL: Reason
REASON_NO_DEADLINE: Reason
REASON_NOT_FOUND: Reason
REASON_CONFLICT: Reason
REASON_CORRUPT: Reason
REASON_STORAGE_FAILED: Reason
REASON_BAD_TOKEN: Reason
REASON_BAD_INVITE: Reason
REASON_BAD_SIGNATURE: Reason
REASON_REPLAYED: Reason
REASON_CLOCK: Reason
REASON_NOT_ALLOWED: Reason
REASON_TOO_MANY_CALLS: Reason
REASON_OUT_OF_RANGE: Reason
REASON_UNAVAILABLE: Reason
REASON_FAULT: Reason
REASON_ERASED: Reason
RULE_FIELD_NUMBER: _ClassVar[int]
rule: _descriptor.FieldDescriptor

class Rule(_message.Message):
    __slots__ = ("scopes", "max_deadline_s", "is_signed")
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    MAX_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    IS_SIGNED_FIELD_NUMBER: _ClassVar[int]
    scopes: _containers.RepeatedScalarFieldContainer[Scope]
    max_deadline_s: int
    is_signed: bool
    def __init__(self, scopes: _Optional[_Iterable[_Union[Scope, str]]] = ..., max_deadline_s: _Optional[int] = ..., is_signed: _Optional[bool] = ...) -> None: ...
