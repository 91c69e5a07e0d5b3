"""Whatever bytes arrive, a method answers or refuses: it has no faults, and the server lives."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from random import random
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.rpc.code_pb2 import Code
from hypothesis import strategies as st

from fedia3.coordinator.access import Call
from fedia3.coordinator.records import AliasMove, Owner
from fedia3.coordinator.services.rpcs import visible
from fedia3.proto import adapters_pb2, admin_pb2, base_models_pb2, enrolment_pb2
from fedia3.proto.contract import METHODS, Method
from fedia3.proto.status import to_status

from .fuzzing import fuzzed, mutated, scripts
from .scene import (
    ANNA,
    BEGIN,
    COMPLETE,
    ERASE,
    EVERYONE,
    HISTORY,
    PROMOTE,
    PUBLISH,
    ROLL_BACK,
    YANK,
    Phone,
    Scene,
    a_scene,
)

WORDS = ("", "anna", "../x", "a\0b", "0" * 64, "語", "x" * 200)
NUMBERS = (0, 1, -1, 2**31 - 1, -(2**31))

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.path)


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


WRONG = {
    grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED,
}  # fmt: skip


def outcome(scene: Scene, method: Method, body: bytes) -> grpc.StatusCode:
    """How the call of somebody who may call it ends."""
    try:
        scene.call(method.path, body, scene.who_may(method.path))
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@every_method
@fuzzed(25, body=st.binary(max_size=300))
def test_no_bytes_are_a_fault(scene: Scene, method: Method, body: bytes) -> None:
    """
    Random bytes as a body, signed where that is asked for, over the wire.
    """
    assert outcome(scene, method, body) not in WRONG


@every_method
@fuzzed(25, data=st.data())
def test_no_message_is_a_fault(scene: Scene, method: Method, data: st.DataObject) -> None:
    """
    Messages of the right kind whose fields hold anything at all, over the wire.
    """
    body = data.draw(messages(method.request)).SerializeToString()
    assert outcome(scene, method, body) not in WRONG


@pytest.fixture(scope="module")
def within(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A coordinator in memory, called without the wire, on a day that does not end."""
    folder = tmp_path_factory.mktemp("within")
    with a_scene(folder, in_memory=True, now_ms=lambda: 1_900_000_000_000) as running:
        yield running


def sound_request(scene: Scene, method: Method) -> bytes:
    """A request that the method answers, however often it comes."""
    code = scene.service.invite("eve")
    lost = scene.service.enrol("eve", os.urandom(4).hex())
    special: dict[str, Callable[[], Message]] = {
        BEGIN: lambda: enrolment_pb2.BeginRequest(code=code),
        COMPLETE: lambda: Phone().request(scene, code),
        PUBLISH: lambda: scene.publish_request(metrics={"loss": 0.5}),
        ERASE: lambda: adapters_pb2.EraseRequest(base_digest=scene.base),
        "/fedia3.v1.Adapters/Compare": lambda: adapters_pb2.CompareRequest(
            left_owner=EVERYONE, right_owner=EVERYONE, base_digest=scene.base, left_version=1
        ),
        "/fedia3.v1.BaseModels/ReadFile": lambda: base_models_pb2.ReadFileRequest(
            digest=scene.base, path="config.json", offset=1
        ),
        "/fedia3.v1.BaseModels/GetManifest": lambda: base_models_pb2.GetManifestRequest(
            name="paper"
        ),
        "/fedia3.v1.Admin/ListDevices": lambda: admin_pb2.ListDevicesRequest(
            after=lost.device_id, limit=5
        ),
        "/fedia3.v1.Admin/RevokeDevice": lambda: admin_pb2.RevokeDeviceRequest(
            device_id=lost.device_id
        ),
        "/fedia3.v1.Admin/Invite": lambda: admin_pb2.InviteRequest(user="eve"),
        "/fedia3.v1.Admin/IssueServiceToken": lambda: admin_pb2.IssueServiceTokenRequest(
            name="web", days=3
        ),
    }
    if method.path in special:
        return special[method.path]().SerializeToString()
    fields = method.request.DESCRIPTOR.fields_by_name
    asked = {"owner": EVERYONE, "base_digest": scene.base}
    if method.path in (PROMOTE, ROLL_BACK, YANK, HISTORY):
        asked = {**asked, "owner": ANNA, "name": "stable", **moved_stable(scene)}
    return method.request(**{k: v for k, v in asked.items() if k in fields}).SerializeToString()


def moved_stable(scene: Scene) -> dict[str, int]:
    """Anna's stable, moved from one version to another: its revision, and a third version."""
    registry, anna = scene.service.registry, Owner.user("anna")
    for _ in range(3):
        scene.publish(scene.part(0, random(), 0, 0, 0))
    third, *others = (r.version for r in registry.versions(anna, scene.base, limit=3))
    for version in others:
        move = AliasMove(owner=anna, base=scene.base, name="stable", version=version)
        moved = registry.promote(move)
    return {"version": third, "expected_rev": moved.rev}


def answered(scene: Scene, method: Method, body: bytes) -> int:
    """The status code with which the method's code ends, once the call was let in."""
    who = scene.who_may(method.path)
    call = Call(method, body, scene.metadata(method.path, body, who), 1.0, "ipv4:127.0.0.1:1")
    rpcs = scene.service.service._rpcs
    try:
        if method.streams:
            caller, request = rpcs._let_in(call)
            next(iter(rpcs._handlers[method.path](request, caller)), b"")
        else:
            method.response.FromString(rpcs.answer(call))
    except Exception as error:
        return int(to_status(visible(error)).code)
    return int(Code.OK)


FAULTS = {Code.INTERNAL, Code.UNKNOWN, Code.UNAVAILABLE, Code.DATA_LOSS}


@pytest.mark.slow
@every_method
def test_no_edit_of_a_sound_request_is_a_fault(within: Scene, method: Method) -> None:
    """
    Signed as it is sent, so that it reaches the method's code, which answers some of them.
    """
    sound, seen = sound_request(within, method), Counter[int]()

    @fuzzed(1_000, script=scripts)
    def ask(script: bytes) -> None:
        code = answered(within, method, mutated(sound, script))
        assert code not in FAULTS
        seen[code] += 1

    ask()
    assert seen[Code.OK]
