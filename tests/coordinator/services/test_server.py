"""The wire: TLS, limits, health, faults, and how a server ends."""

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from fedia3.coordinator.certificates import make_authority
from fedia3.coordinator.services import places, rpcs
from fedia3.coordinator.services.rpcs import MAX_STREAMS_OF_ONE, visible
from fedia3.errors import (
    BadSetting,
    BadToken,
    Conflict,
    Corrupt,
    Fedia3Error,
    StorageFailed,
    TooManyCalls,
    Unreachable,
)
from fedia3.proto import adapters_pb2, admin_pb2, base_models_pb2
from fedia3.proto.caller import Caller
from fedia3.proto.contract import MAX_MESSAGE, MAX_METADATA, METHODS
from fedia3.proto.signing import TIME_HEADER, TOKEN_HEADER
from fedia3.testing import CuttingProxy
from fedia3.testing_service import EnrolledDevice, RunningService, paper_base, running_service

STATUS = "/fedia3.v1.Admin/Status"
FETCH = "/fedia3.v1.Adapters/Fetch"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@contextmanager
def channel(
    service: RunningService, ca: bytes | None = None, address: str = ""
) -> Iterator[grpc.Channel]:
    """A connection without limits of its own."""
    credentials = grpc.ssl_channel_credentials(ca or service.ca)
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_metadata_size", 1 << 20),
        ("grpc.http2.bdp_probe", 0),  # or the window grows until a whole file fits it
        ("grpc.http2.lookahead_bytes", 1 << 16),
    ]
    place = address or service.address
    with grpc.secure_channel(place, credentials, options=options) as opened:
        yield opened


def shown(token: str) -> list[tuple[str, str]]:
    """The metadata of a caller with this token."""
    return [(TOKEN_HEADER, f"Bearer {token}")]


def reason(error: grpc.RpcError) -> str:
    """Our reason in a failed call's status; empty where the status is not ours."""
    status = rpc_status.from_call(error)
    info = ErrorInfo()
    if status is not None and status.details[0].Unpack(info):
        return info.reason
    return ""


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """The code and our reason with which a call fails."""
    with pytest.raises(grpc.RpcError) as failed:
        call()
    return failed.value.code(), reason(failed.value)


def test_only_tls_is_spoken(service: RunningService) -> None:
    """
    In plain text nobody gets an answer.
    """
    with grpc.insecure_channel(service.address) as plain:
        code, _ = refused(lambda: plain.unary_unary(STATUS)(b"", timeout=2))
    assert code is grpc.StatusCode.UNAVAILABLE


def test_another_authority_vouches_for_nobody(service: RunningService) -> None:
    """
    A caller that pinned another CA does not talk to us.
    """
    other = make_authority(datetime.now(UTC)).certificate
    with channel(service, other) as wrong:
        code, _ = refused(lambda: wrong.unary_unary(STATUS)(b"", timeout=2))
    assert code is grpc.StatusCode.UNAVAILABLE


def test_every_answer_tells_the_time(service: RunningService, clock) -> None:
    """
    Good ones, refusals and streams carry the coordinator's clock behind them.
    """
    token = shown(service.operator_token)
    file = base_models_pb2.ReadFileRequest(digest=service.manifest.digest, path="config.json")
    with channel(service) as opened:
        _, good = opened.unary_unary(STATUS).with_call(b"", timeout=5, metadata=token)
        stream = opened.unary_stream("/fedia3.v1.BaseModels/ReadFile")(
            file.SerializeToString(), timeout=5, metadata=token
        )
        assert len(list(stream)) == 1
        with pytest.raises(grpc.RpcError) as bad:
            opened.unary_unary(STATUS)(b"", timeout=5)
    for call in (good, stream, bad.value):
        assert dict(call.trailing_metadata())[TIME_HEADER] == str(clock())


def test_a_caller_whose_clock_is_wrong_is_heard(service: RunningService, clock) -> None:
    """
    An hour ahead or behind it learns the time from the first refusal, and signs anew.
    """
    for off_ms in (3_600_000, -3_600_000):
        with Caller(
            service.address,
            ca=service.ca,
            token=service.operator_token,
            signing_key=service.operator_key,
            now_ms=lambda off_ms=off_ms: clock() + off_ms,
        ) as caller:
            caller.call("Admin/Pause", admin_pb2.PauseRequest(), admin_pb2.PauseResponse)


def test_a_call_without_an_end_is_refused(service: RunningService) -> None:
    """
    No deadline, and one behind the rule's.
    """
    token = shown(service.operator_token)
    with channel(service) as opened:
        for timeout in (None, 60, 1e6):
            code, why = refused(
                lambda timeout=timeout: opened.unary_unary(STATUS)(
                    b"", timeout=timeout, metadata=token
                )
            )
            assert (code, why) == (grpc.StatusCode.INVALID_ARGUMENT, "REASON_NO_DEADLINE")


@pytest.mark.parametrize("body", [b"garbage", b"\xff" * 100, b"\x0a\xff", b"\x0a\x02\xff\xfe"])
def test_garbage_is_a_bad_request(service: RunningService, body: bytes) -> None:
    """
    Not a fault: bytes that are no message, cut ones, text that is not UTF-8.
    """
    token = shown(service.service_token())
    with channel(service) as opened:
        found = refused(lambda: opened.unary_unary(FETCH)(body, timeout=5, metadata=token))
    assert found == (grpc.StatusCode.INVALID_ARGUMENT, "REASON_BAD_INPUT")


def test_a_stranger_does_not_reach_the_parser(service: RunningService) -> None:
    """
    Garbage without a token is a matter of the token.
    """
    with channel(service) as opened:
        found = refused(lambda: opened.unary_unary(FETCH)(b"garbage", timeout=5))
    assert found == (grpc.StatusCode.UNAUTHENTICATED, "REASON_BAD_TOKEN")


def test_a_message_that_is_too_large_is_refused(service: RunningService) -> None:
    """
    Also one that only becomes large when it is unpacked.
    """
    token = shown(service.operator_token)
    large = b"\0" * (MAX_MESSAGE + 1000)
    with channel(service) as opened:
        code, _ = refused(lambda: opened.unary_unary(STATUS)(large, timeout=5, metadata=token))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        bomb = b"\0" * (64 << 20)
        assert len(gzip.compress(bomb)) < MAX_MESSAGE
        code, _ = refused(
            lambda: opened.unary_unary(STATUS)(
                bomb, timeout=5, metadata=token, compression=grpc.Compression.Gzip
            )
        )
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_metadata_that_is_too_large_is_refused(service: RunningService) -> None:
    """
    8 KiB are enough for everybody.
    """
    metadata = [*shown(service.operator_token), ("more", "x" * MAX_METADATA)]
    with channel(service) as opened:
        code, _ = refused(lambda: opened.unary_unary(STATUS)(b"", timeout=5, metadata=metadata))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "path", ["/fedia3.v1.Admin/Format", "/fedia3.v2.Admin/Status", "/flwr.Fleet/Pull", "/"]
)
def test_what_is_not_in_the_contract_is_not_there(service: RunningService, path: str) -> None:
    """
    Whoever asks.
    """
    token = shown(service.operator_token)
    with channel(service) as opened:
        code, _ = refused(lambda: opened.unary_unary(path)(b"", timeout=5, metadata=token))
    assert code is grpc.StatusCode.UNIMPLEMENTED


def test_words_of_any_length_and_script_arrive(service: RunningService) -> None:
    """
    A refusal that quotes a long foreign name still fits the metadata.
    """
    owner = adapters_pb2.Owner(user="語" * 128)
    request = adapters_pb2.FetchRequest(owner=owner, base_digest="0" * 64)
    token = shown(service.service_token())
    with channel(service) as opened:
        found = refused(
            lambda: opened.unary_unary(FETCH)(
                request.SerializeToString(), timeout=5, metadata=token
            )
        )
    assert found == (grpc.StatusCode.NOT_FOUND, "REASON_NOT_FOUND")


def test_a_fault_tells_nothing_and_is_logged(
    service: RunningService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """
    The caller sees INTERNAL and no word of what broke; the log has all of it.
    """

    def broken() -> None:
        raise RuntimeError("at /var/lib/secret")

    monkeypatch.setattr(service.directory, "round_control", broken)
    with channel(service) as opened, pytest.raises(grpc.RpcError) as failed:
        opened.unary_unary(STATUS)(b"", timeout=5, metadata=shown(service.operator_token))
    assert (failed.value.code(), reason(failed.value)) == (
        grpc.StatusCode.INTERNAL,
        "REASON_FAULT",
    )
    assert "secret" not in failed.value.details()
    assert "/var/lib/secret" in caplog.text


def test_a_slow_call_does_not_hold_others_up(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    While one call waits for a lock, another is answered.
    """
    gate, waiting = threading.Event(), threading.Event()
    ask = service.directory.round_control

    def slow():
        waiting.set()
        gate.wait(10)
        return ask()

    monkeypatch.setattr(service.directory, "round_control", slow)
    token = shown(service.operator_token)
    with channel(service) as opened, ThreadPoolExecutor(1) as pool:
        held = pool.submit(opened.unary_unary(STATUS), b"", timeout=10, metadata=token)
        assert waiting.wait(5)
        opened.unary_unary("/fedia3.v1.Admin/ListDevices")(b"", timeout=5, metadata=token)
        assert not held.done()
        gate.set()
        held.result()


def test_a_device_that_calls_is_heard_of(service: RunningService, calling) -> None:
    """
    When the server ends, at the latest, it is written down.
    """
    anna = service.enrol("anna")
    request = base_models_pb2.GetManifestRequest()
    calling(anna).call("BaseModels/GetManifest", request, base_models_pb2.SignedManifest)
    service.service._last_seen.flush()
    assert service.directory.device(anna.device_id).last_seen_ms == service.now_ms()


def stalled(opened: grpc.Channel, service: RunningService, device: EnrolledDevice):
    """A download whose caller has taken one piece and takes no more."""
    request = base_models_pb2.ReadFileRequest(
        digest=service.manifest.digest, path="model.safetensors"
    )
    stream = opened.unary_stream("/fedia3.v1.BaseModels/ReadFile")(
        request.SerializeToString(), timeout=60, metadata=shown(device.token)
    )
    next(stream)
    return stream


def test_one_device_has_so_many_downloads(tmp_path: Path) -> None:
    """
    Eight that stand still are enough; the ninth is told to come again, until one ends. Another
    device is not held up.
    """
    base = paper_base(tmp_path / "large", size=20_000_000)
    with (
        running_service(tmp_path / "service", base=base, in_memory=True) as service,
        channel(service) as opened,
    ):
        anna, bob = service.enrol("anna"), service.enrol("bob")
        held = [stalled(opened, service, anna) for _ in range(MAX_STREAMS_OF_ONE)]
        found = refused(lambda: stalled(opened, service, anna))
        assert found == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REASON_TOO_MANY_CALLS")
        stalled(opened, service, bob).cancel()
        held.pop().cancel()
        for _ in range(100):  # until the server has heard of it
            try:
                held.append(stalled(opened, service, anna))
                break
            except grpc.RpcError:
                time.sleep(0.02)
        assert len(held) == MAX_STREAMS_OF_ONE
        for stream in held:
            stream.cancel()


def test_a_caller_that_takes_nothing_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Its file is closed and its place is free; what it finds when it comes back is a broken stream.
    """
    monkeypatch.setattr(rpcs, "STALL_S", 0.1)
    base = paper_base(tmp_path / "large", size=20_000_000)
    with (
        running_service(tmp_path / "service", base=base, in_memory=True) as service,
        channel(service) as opened,
    ):
        stream = stalled(opened, service, service.enrol("anna"))
        for _ in range(500):
            if not service.service._rpcs._streams:
                break
            time.sleep(0.02)
        assert not service.service._rpcs._streams
        code, why = refused(lambda: list(stream))
    assert (code, why) == (grpc.StatusCode.UNAVAILABLE, "REASON_UNAVAILABLE")


def test_a_caller_that_hangs_up_is_no_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Whose connection is cut in the middle of a piece leaves no traceback in the log.
    """
    base = paper_base(tmp_path / "large", size=20_000_000)
    with (
        running_service(tmp_path / "service", base=base, in_memory=True) as service,
        CuttingProxy(service.address) as way,
    ):
        anna = service.enrol("anna")
        for _ in range(8):
            way.cut_after(3_000_000)
            place = way.address.replace("127.0.0.1", "localhost")
            with channel(service, address=place) as opened, pytest.raises(grpc.RpcError):
                list(stalled(opened, service, anna))
    assert [record for record in caplog.records if record.exc_info] == []
    assert "failed" not in caplog.text


def held_open(opened: grpc.Channel, method: str, gate: threading.Event) -> grpc.Future:
    """A call that has begun and whose request does not come before the gate is open."""

    def request() -> Iterator[bytes]:
        gate.wait(30)
        yield b""

    future: grpc.Future = opened.stream_unary(method).future(request())
    return future


def places_taken(service: RunningService, count: int) -> None:
    """Wait until so many calls are under way."""
    for _ in range(500):
        if service.service.places.taken == count:
            return
        time.sleep(0.01)
    raise AssertionError(f"waited in vain for {count} calls under way")


HELD = [STATUS, "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"]


@pytest.mark.parametrize("method", HELD)
def test_one_address_does_not_take_every_place(
    service: RunningService, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """
    Calls that begin and never go on are counted from their start, also those of other services.
    """
    monkeypatch.setattr(places, "PLACES_OF_ONE", 3)
    gate = threading.Event()
    with channel(service) as opened:
        held = [held_open(opened, method, gate) for _ in range(3)]
        places_taken(service, 3)
        found = refused(lambda: opened.unary_unary(STATUS)(b"", timeout=5))
        assert found == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REASON_TOO_MANY_CALLS")
        for call in held:
            call.cancel()
        places_taken(service, 0)
        opened.unary_unary(STATUS)(b"", timeout=5, metadata=shown(service.operator_token))
        gate.set()


@pytest.mark.parametrize("method", HELD)
def test_a_request_that_does_not_come_is_not_waited_for(
    service: RunningService, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """
    Its call is ended, whether it says a deadline or not.
    """
    monkeypatch.setattr(places, "REQUEST_S", 0.1)
    gate = threading.Event()
    with channel(service) as opened:
        found = refused(held_open(opened, method, gate).result)
        gate.set()
    assert found == (grpc.StatusCode.UNAVAILABLE, "REASON_UNAVAILABLE")


def test_a_call_without_a_request_is_bad_input(service: RunningService) -> None:
    """
    It ends before anything came.
    """
    with channel(service) as opened:
        call = opened.stream_unary(STATUS)
        found = refused(lambda: call(iter(()), timeout=5))
    assert found == (grpc.StatusCode.INVALID_ARGUMENT, "REASON_BAD_INPUT")


def test_nobody_watches_for_ever(service: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A health watch and a reflection without a deadline end by themselves; both may begin anew.
    """
    monkeypatch.setattr(places, "NO_DEADLINE_S", 0.3)
    gate = threading.Event()

    def asks() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        gate.wait(30)
        yield from ()

    with channel(service) as opened:
        watched = health_pb2_grpc.HealthStub(opened).Watch(health_pb2.HealthCheckRequest())
        assert next(watched).status == SERVING
        assert refused(lambda: list(watched))[0] is grpc.StatusCode.UNAVAILABLE
        reflected = reflection_pb2_grpc.ServerReflectionStub(opened).ServerReflectionInfo(asks())
        assert refused(lambda: list(reflected))[0] is grpc.StatusCode.UNAVAILABLE
        gate.set()


def test_health_is_told_for_every_service(service: RunningService) -> None:
    """
    Of each by its name, and of all of them by none; an unknown name is not found.
    """
    with channel(service) as opened:
        stub = health_pb2_grpc.HealthStub(opened)
        for name in ("", *{method.service for method in METHODS.values()}):
            request = health_pb2.HealthCheckRequest(service=name)
            assert stub.Check(request, timeout=5).status == SERVING
        code, _ = refused(lambda: stub.Check(health_pb2.HealthCheckRequest(service="x"), timeout=5))
        assert code is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_what_is_served(service: RunningService) -> None:
    """
    Tools find the services without our files.
    """
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with channel(service) as opened:
        stub = reflection_pb2_grpc.ServerReflectionStub(opened)
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
    names = {one.name for one in answer.list_services_response.service}
    assert {method.service for method in METHODS.values()} <= names


def test_a_server_that_stops_says_so_first_and_finishes_what_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Health turns to NOT_SERVING while a call is under way; that call gets its answer, and who comes
    later finds nobody.
    """
    gate, waiting = threading.Event(), threading.Event()
    running = running_service(tmp_path, in_memory=True, grace_s=10)
    service = running.__enter__()
    ask = service.directory.round_control

    def slow():
        waiting.set()
        gate.wait(10)
        return ask()

    monkeypatch.setattr(service.directory, "round_control", slow)
    token = shown(service.operator_token)
    with channel(service) as opened, ThreadPoolExecutor(2) as pool:
        watched = health_pb2_grpc.HealthStub(opened).Watch(
            health_pb2.HealthCheckRequest(service="fedia3.v1.Admin"), timeout=30
        )
        assert next(watched).status == SERVING
        under_way = pool.submit(opened.unary_unary(STATUS), b"", timeout=10, metadata=token)
        assert waiting.wait(5)
        stopping = pool.submit(running.__exit__, None, None, None)
        assert next(watched).status == NOT_SERVING
        watched.cancel()
        assert not under_way.done()
        gate.set()
        assert admin_pb2.StatusResponse.FromString(under_way.result()).round_num == -1
        stopping.result(timeout=10)
    with channel(service) as late:
        code, _ = refused(lambda: late.unary_unary(STATUS)(b"", timeout=2, metadata=token))
    assert code is grpc.StatusCode.UNAVAILABLE


def test_a_caller_that_takes_nothing_does_not_hold_the_end_up(tmp_path: Path) -> None:
    """
    A stalled download ends when the grace is over.
    """
    base = paper_base(tmp_path / "large", size=20_000_000)
    with running_service(tmp_path / "service", base=base, in_memory=True, grace_s=0.2) as service:
        opened = channel(service)
        stream = stalled(opened.__enter__(), service, service.enrol("anna"))
    with pytest.raises(grpc.RpcError):
        list(stream)
    opened.__exit__(None, None, None)


def test_two_servers_do_not_share_a_port(service: RunningService, tmp_path: Path) -> None:
    """
    The second is told; calls would otherwise reach either.
    """
    with (
        pytest.raises(BadSetting, match="choose a free port"),
        running_service(tmp_path / "second", port=service.port, in_memory=True),
    ):
        pass


def test_a_coordinator_comes_back_as_itself(tmp_path: Path) -> None:
    """
    On the same folder, a restarted server knows device, operator and adapters, on the same port;
    and Flower is told of the device again.
    """
    with running_service(tmp_path) as first:
        anna, port = first.enrol("anna"), first.port
    with running_service(tmp_path, port=port) as second, channel(second, first.ca) as opened:
        call = opened.unary_unary("/fedia3.v1.BaseModels/GetManifest")
        call(b"", timeout=5, metadata=shown(anna.token))
        opened.unary_unary(STATUS)(b"", timeout=5, metadata=shown(first.operator_token))
        for _ in range(100):
            if anna.device_id in second.registrar.nodes:
                break
            time.sleep(0.02)
        assert anna.device_id in second.registrar.nodes


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (StorageFailed("cannot write /srv/blobs"), StorageFailed),
        (BadSetting("/srv/registry.db: unable to open"), StorageFailed),
        (Corrupt("/srv/registry.db: malformed"), Corrupt),
        (Conflict("/srv/registry.db: locked"), Unreachable),
    ],
)
def test_what_the_disk_said_stays_here(error: Fedia3Error, seen: type[Fedia3Error]) -> None:
    """
    The kind of trouble is told, the coordinator's paths are not.
    """
    error.__cause__ = OSError("disk")
    told = visible(error)
    assert type(told) is seen
    assert "/srv" not in str(told)


def test_what_the_rules_say_is_told(service: RunningService) -> None:
    """
    A conflict of versions, or a wait, is the caller's to know.
    """
    for error in (Conflict("this key names other bytes"), TooManyCalls("wait", 1.0), BadToken("x")):
        assert visible(error) is error
