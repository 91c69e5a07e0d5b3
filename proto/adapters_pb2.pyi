from fedia3.proto import rules_pb2 as _rules_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Owner(_message.Message):
    __slots__ = ("everyone", "user")
    EVERYONE_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    everyone: bool
    user: str
    def __init__(self, everyone: _Optional[bool] = ..., user: _Optional[str] = ...) -> None: ...

class AdapterRecord(_message.Message):
    __slots__ = ("owner", "version", "digest", "size", "base_digest", "schema_digest", "round_num", "num_examples", "global_digest", "parent_digest", "created_ms", "metrics", "yanked", "revision", "alias")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    OWNER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUND_NUM_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PARENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CREATED_MS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    YANKED_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    owner: Owner
    version: int
    digest: str
    size: int
    base_digest: str
    schema_digest: str
    round_num: int
    num_examples: int
    global_digest: str
    parent_digest: str
    created_ms: int
    metrics: _containers.ScalarMap[str, float]
    yanked: bool
    revision: int
    alias: str
    def __init__(self, owner: _Optional[_Union[Owner, _Mapping]] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., size: _Optional[int] = ..., base_digest: _Optional[str] = ..., schema_digest: _Optional[str] = ..., round_num: _Optional[int] = ..., num_examples: _Optional[int] = ..., global_digest: _Optional[str] = ..., parent_digest: _Optional[str] = ..., created_ms: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., yanked: _Optional[bool] = ..., revision: _Optional[int] = ..., alias: _Optional[str] = ...) -> None: ...

class AliasMove(_message.Message):
    __slots__ = ("owner", "base_digest", "name", "version", "rev", "actor", "reason", "at_ms")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REV_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    owner: Owner
    base_digest: str
    name: str
    version: int
    rev: int
    actor: str
    reason: str
    at_ms: int
    def __init__(self, owner: _Optional[_Union[Owner, _Mapping]] = ..., base_digest: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[int] = ..., rev: _Optional[int] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ..., at_ms: _Optional[int] = ...) -> None: ...

class SignedRecord(_message.Message):
    __slots__ = ("record", "signature", "key")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    record: bytes
    signature: bytes
    key: bytes
    def __init__(self, record: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., key: _Optional[bytes] = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("base_digest", "data", "digest", "num_examples", "metrics", "idem_key", "age_ms")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    IDEM_KEY_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    base_digest: str
    data: bytes
    digest: str
    num_examples: int
    metrics: _containers.ScalarMap[str, float]
    idem_key: str
    age_ms: int
    def __init__(self, base_digest: _Optional[str] = ..., data: _Optional[bytes] = ..., digest: _Optional[str] = ..., num_examples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., idem_key: _Optional[str] = ..., age_ms: _Optional[int] = ...) -> None: ...

class ResolveRequest(_message.Message):
    __slots__ = ("owner", "base_digest", "version", "alias", "digest")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    owner: Owner
    base_digest: str
    version: int
    alias: str
    digest: str
    def __init__(self, owner: _Optional[_Union[Owner, _Mapping]] = ..., base_digest: _Optional[str] = ..., version: _Optional[int] = ..., alias: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("owner", "base_digest", "version", "alias", "digest", "if_none_match")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    IF_NONE_MATCH_FIELD_NUMBER: _ClassVar[int]
    owner: Owner
    base_digest: str
    version: int
    alias: str
    digest: str
    if_none_match: str
    def __init__(self, owner: _Optional[_Union[Owner, _Mapping]] = ..., base_digest: _Optional[str] = ..., version: _Optional[int] = ..., alias: _Optional[str] = ..., digest: _Optional[str] = ..., if_none_match: _Optional[str] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("unchanged", "record", "data")
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    unchanged: bool
    record: SignedRecord
    data: bytes
    def __init__(self, unchanged: _Optional[bool] = ..., record: _Optional[_Union[SignedRecord, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("owner", "base_digest", "before_version", "limit")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BEFORE_VERSION_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    owner: Owner
    base_digest: str
    before_version: int
    limit: int
    def __init__(self, owner: _Optional[_Union[Owner, _Mapping]] = ..., base_digest: _Optional[str] = ..., before_version: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[SignedRecord]
    def __init__(self, records: _Optional[_Iterable[_Union[SignedRecord, _Mapping]]] = ...) -> None: ...

class CompareRequest(_message.Message):
    __slots__ = ("left_owner", "left_version", "right_owner", "right_version", "base_digest")
    LEFT_OWNER_FIELD_NUMBER: _ClassVar[int]
    LEFT_VERSION_FIELD_NUMBER: _ClassVar[int]
    RIGHT_OWNER_FIELD_NUMBER: _ClassVar[int]
    RIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    left_owner: Owner
    left_version: int
    right_owner: Owner
    right_version: int
    base_digest: str
    def __init__(self, left_owner: _Optional[_Union[Owner, _Mapping]] = ..., left_version: _Optional[int] = ..., right_owner: _Optional[_Union[Owner, _Mapping]] = ..., right_version: _Optional[int] = ..., base_digest: _Optional[str] = ...) -> None: ...

class CompareResponse(_message.Message):
    __slots__ = ("targets", "distance")
    class Target(_message.Message):
        __slots__ = ("key", "distance", "largest")
        KEY_FIELD_NUMBER: _ClassVar[int]
        DISTANCE_FIELD_NUMBER: _ClassVar[int]
        LARGEST_FIELD_NUMBER: _ClassVar[int]
        key: str
        distance: float
        largest: float
        def __init__(self, key: _Optional[str] = ..., distance: _Optional[float] = ..., largest: _Optional[float] = ...) -> None: ...
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    targets: _containers.RepeatedCompositeFieldContainer[CompareResponse.Target]
    distance: float
    def __init__(self, targets: _Optional[_Iterable[_Union[CompareResponse.Target, _Mapping]]] = ..., distance: _Optional[float] = ...) -> None: ...

class EraseRequest(_message.Message):
    __slots__ = ("base_digest",)
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    base_digest: str
    def __init__(self, base_digest: _Optional[str] = ...) -> None: ...

class EraseResponse(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: int
    def __init__(self, versions: _Optional[int] = ...) -> None: ...

class ListAliasesRequest(_message.Message):
    __slots__ = ("owner", "base_digest")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    owner: Owner
    base_digest: str
    def __init__(self, owner: _Optional[_Union[Owner, _Mapping]] = ..., base_digest: _Optional[str] = ...) -> None: ...

class ListAliasesResponse(_message.Message):
    __slots__ = ("aliases",)
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    aliases: _containers.RepeatedCompositeFieldContainer[AliasMove]
    def __init__(self, aliases: _Optional[_Iterable[_Union[AliasMove, _Mapping]]] = ...) -> None: ...

class AliasHistoryRequest(_message.Message):
    __slots__ = ("owner", "base_digest", "name", "before_rev", "limit")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    BEFORE_REV_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    owner: Owner
    base_digest: str
    name: str
    before_rev: int
    limit: int
    def __init__(self, owner: _Optional[_Union[Owner, _Mapping]] = ..., base_digest: _Optional[str] = ..., name: _Optional[str] = ..., before_rev: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class AliasHistoryResponse(_message.Message):
    __slots__ = ("moves",)
    MOVES_FIELD_NUMBER: _ClassVar[int]
    moves: _containers.RepeatedCompositeFieldContainer[AliasMove]
    def __init__(self, moves: _Optional[_Iterable[_Union[AliasMove, _Mapping]]] = ...) -> None: ...

class PromoteRequest(_message.Message):
    __slots__ = ("owner", "base_digest", "name", "version", "expected_rev", "reason")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_REV_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    owner: Owner
    base_digest: str
    name: str
    version: int
    expected_rev: int
    reason: str
    def __init__(self, owner: _Optional[_Union[Owner, _Mapping]] = ..., base_digest: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[int] = ..., expected_rev: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class RollBackRequest(_message.Message):
    __slots__ = ("owner", "base_digest", "name", "expected_rev", "reason")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_REV_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    owner: Owner
    base_digest: str
    name: str
    expected_rev: int
    reason: str
    def __init__(self, owner: _Optional[_Union[Owner, _Mapping]] = ..., base_digest: _Optional[str] = ..., name: _Optional[str] = ..., expected_rev: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class YankRequest(_message.Message):
    __slots__ = ("owner", "base_digest", "version", "undo")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    owner: Owner
    base_digest: str
    version: int
    undo: bool
    def __init__(self, owner: _Optional[_Union[Owner, _Mapping]] = ..., base_digest: _Optional[str] = ..., version: _Optional[int] = ..., undo: _Optional[bool] = ...) -> None: ...
