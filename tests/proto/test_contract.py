"""Every RPC says who may call it, how long it may take and what it is for, and has code."""

import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from fedia3.coordinator.access import Access, Call
from fedia3.coordinator.last_seen import LastSeen
from fedia3.coordinator.services.rpcs import Rpcs
from fedia3.coordinator.stores.memory_directory import MemoryDirectory
from fedia3.errors import NotAllowed
from fedia3.proto import rules_pb2
from fedia3.proto.contract import FILES, METHODS, Method
from fedia3.proto.rules_pb2 import Scope
from fedia3.proto.signing import enrolment_bytes, normal_code, request_bytes, signed_bytes
from fedia3.testing_service import NO_LIMITS, RunningService, running_service

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "proto"
SOURCES = sorted(path.name for path in PROTO.glob("*.proto"))

# What changes something. Begin and Complete carry their own proof; nobody knows the caller yet.
CHANGES = {
    "/fedia3.v1.Enrolment/Renew",
    "/fedia3.v1.Adapters/Publish",
    "/fedia3.v1.Adapters/Erase",
    "/fedia3.v1.Adapters/Promote",
    "/fedia3.v1.Adapters/RollBack",
    "/fedia3.v1.Adapters/Yank",
    "/fedia3.v1.Admin/Pause",
    "/fedia3.v1.Admin/Resume",
    "/fedia3.v1.Admin/RunNow",
    "/fedia3.v1.Admin/RevokeDevice",
    "/fedia3.v1.Admin/Invite",
    "/fedia3.v1.Admin/IssueServiceToken",
}
ANYBODY = {"/fedia3.v1.Enrolment/Begin", "/fedia3.v1.Enrolment/Complete"}

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.path)


def protoc(*options: str) -> None:
    """Compile all of our files from a folder in which their path is that of the imports."""
    google = importlib.resources.files("grpc_tools") / "_proto"
    files = [f"fedia3/proto/{name}" for name in SOURCES]
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc",
            f"-Ifedia3/proto={PROTO}", f"-I{google}", *options, *files,
        ],
        check=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    """Our files as protoc understands them, comments included."""
    path = tmp_path_factory.mktemp("descriptors") / "set"
    protoc(f"--descriptor_set_out={path}", "--include_source_info")
    return list(FileDescriptorSet.FromString(path.read_bytes()).file)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory):
    """A server, for what its code says of itself."""
    with running_service(tmp_path_factory.mktemp("service"), in_memory=True) as running:
        yield running


def comments(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    """The leading comment of every place in a file."""
    return {tuple(at.path): at.leading_comments for at in file.source_code_info.location}


@every_method
def test_a_method_says_who_may_call_it(method: Method) -> None:
    """
    It lists scopes, none of them the unset one; only enrolling is open to anybody.
    """
    assert method.scopes
    assert Scope.SCOPE_UNSPECIFIED not in method.scopes
    assert (Scope.SCOPE_ANYONE in method.scopes) == (method.path in ANYBODY)


@every_method
def test_a_method_says_how_long_it_may_take(method: Method) -> None:
    """
    A unary call ends within a minute, a stream within an hour.
    """
    assert 0 < method.max_deadline_s <= (3600 if method.streams else 60)


@every_method
def test_a_method_is_signed_where_it_changes_something(method: Method) -> None:
    """
    What only reads needs no signature; what changes something is listed here by hand.
    """
    assert method.is_signed == (method.path in CHANGES)


def test_a_method_says_what_it_is_for(described: list[FileDescriptorProto]) -> None:
    """
    Services and methods have a comment before them in their file.
    """
    seen = set()
    for file in described:
        said = comments(file)
        for s, service in enumerate(file.service):
            assert said.get((6, s), "").strip(), service.name  # 6: services of a file
            for m, method in enumerate(service.method):
                assert said.get((6, s, 2, m), "").strip(), method.name  # 2: methods of a service
                seen.add(f"/{file.package}.{service.name}/{method.name}")
    assert seen == set(METHODS)


@every_method
def test_a_methods_code_says_what_it_does(method: Method, running: RunningService) -> None:
    """
    Every method of the contract has a handler, and the handler a docstring.
    """
    assert running.service.handlers[method.path].__doc__


def test_no_code_is_without_a_method(running: RunningService) -> None:
    """
    What is not in the contract is not served.
    """
    assert running.service.handlers.keys() == METHODS.keys()


def test_a_service_without_code_for_a_method_does_not_start(tmp_path: Path) -> None:
    """
    A method that the contract has and no handler answers is noticed before anybody calls it.
    """
    with running_service(tmp_path, in_memory=True) as running:
        handlers = dict(running.service.handlers)
    handlers.popitem()
    with pytest.raises(AssertionError, match="no code"):
        Rpcs(handlers, access=None, last_seen=None, now_ms=lambda: 0)  # type: ignore[arg-type]  # unused


def test_a_method_without_a_rule_runs_no_code() -> None:
    """
    A method that somebody forgot to give a rule is refused by the server, whoever calls.
    """
    ran: list[bytes] = []
    forgotten = Method("/fedia3.v1.New/Call", Empty, Empty, False, frozenset(), 0, False)
    directory = MemoryDirectory()
    rpcs = Rpcs(
        {forgotten.path: lambda request, caller: ran.append(request)},
        Access(directory, NO_LIMITS, lambda: 0, lambda: 0.0),
        LastSeen(directory, lambda: 0),
        lambda: 0,
        {forgotten.path: forgotten},
    )
    with pytest.raises(NotAllowed, match="no rule"):
        rpcs.answer(Call(forgotten, b"", (), 1.0, "ipv4:127.0.0.1:1"))
    assert ran == []


def test_every_enum_begins_with_unspecified(described: list[FileDescriptorProto]) -> None:
    """
    A field that nobody set is told from every value that somebody chose.
    """
    for file in described:
        for enum in file.enum_type:
            first = enum.value[0]
            prefix = re.sub(r"(?<!^)([A-Z])", r"_\1", enum.name).upper()
            assert (first.number, first.name) == (0, f"{prefix}_UNSPECIFIED")


def test_every_message_and_file_is_of_this_version(described: list[FileDescriptorProto]) -> None:
    """
    One package with its version in the name.
    """
    assert {file.package for file in described} == {"fedia3.v1"}
    assert {f.DESCRIPTOR.name for f in (*FILES, rules_pb2)} == {f.name for f in described}


def test_the_generated_code_is_what_protoc_makes(tmp_path: Path) -> None:
    """
    Nobody forgot to generate it again, and nobody edited it.
    """
    protoc(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}")
    made = {path.name: path.read_bytes() for path in tmp_path.rglob("*_pb2.py*")}
    kept = {path.name: path.read_bytes() for path in PROTO.glob("*_pb2.py*")}
    assert made == kept


@every_method
def test_no_request_or_answer_is_shared_between_methods(method: Method) -> None:
    """
    Each may grow a field without touching another; records and manifests are what they are.
    """
    others = [other for other in METHODS.values() if other.path != method.path]
    assert method.request not in {other.request for other in others}
    assert issubclass(method.response, Message)


def test_what_is_signed_for_one_purpose_means_nothing_for_another() -> None:
    """
    Kinds, and where one part ends and the next begins, are part of the bytes.
    """
    assert signed_bytes("manifest", b"ab") != signed_bytes("record", b"ab")
    assert signed_bytes("x", b"a", b"b") != signed_bytes("x", b"ab", b"")
    assert signed_bytes("x", b"ab") == b"fedia3.v1/x\0" + b"\0\0\0\0\0\0\0\2ab"


def test_every_part_of_a_request_is_signed() -> None:
    """
    Another path, body, time, nonce or token gives other bytes.
    """
    plain = ("/a/b", b"body", 1, b"n" * 16, "token")
    other = ("/a/c", b"bodz", 2, b"m" * 16, "tokeo")
    changed = [(*plain[:i], other[i], *plain[i + 1 :]) for i in range(5)]
    assert len({request_bytes(*parts) for parts in [plain, *changed]}) == 6


def test_a_code_is_signed_however_it_was_typed() -> None:
    """
    Dashes, spaces and case are the typist's.
    """
    assert normal_code("ab cd-EF") == "ABCDEF"
    typed = enrolment_bytes("ab-cd", b"c", "phone", b"s", b"n")
    assert typed == enrolment_bytes("ABCD", b"c", "phone", b"s", b"n")
