"""69 to 85: callers who are not who they say, or say what they did not sign."""

import base64
import contextlib
import json
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedia3.adapters.encoding import digest
from fedia3.coordinator.access import Limits
from fedia3.coordinator.certificates import make_authority
from fedia3.coordinator.directory import Token
from fedia3.coordinator.rates import Rate
from fedia3.coordinator.tokens import new_code, new_token, token_sha256
from fedia3.proto import adapters_pb2 as pb
from fedia3.proto import admin_pb2
from fedia3.proto import enrolment_pb2 as enrolment
from fedia3.proto.contract import METHODS
from fedia3.proto.rules_pb2 import Scope
from fedia3.proto.signing import SIGNATURE_HEADER, TOKEN_HEADER
from fedia3.testing_service import node_pem

from .scene import (
    BAD_INVITE,
    BAD_SIGNATURE,
    BAD_TOKEN,
    BEGIN,
    BOB,
    COMPARE,
    CONFLICT,
    ERASE,
    FETCH,
    LIST,
    NO_CONNECTION,
    NOT_ALLOWED,
    NOT_FOUND,
    PUBLISH,
    REPLAYED,
    RESOLVE,
    TOO_MANY_CALLS,
    UNKNOWN_METHOD,
    WRONG_CLOCK,
    Phone,
    Refused,
    Scene,
    Who,
    a_channel,
    a_scene,
    require_refused,
)

STATUS = "/fedia3.v1.Admin/Status"
HOUR_MS = 3_600_000


def shown(token: str) -> Callable[[Scene], bytes]:
    """A read with this token."""
    return lambda scene: scene.read(RESOLVE, BOB, Who(token))


def expired(scene: Scene) -> bytes:
    """A service's token of a millisecond ago."""
    token, now_ms = new_token("service"), scene.service.now_ms()
    scene.service.directory.add_token(Token(token_sha256(token), "service", "old", now_ms - 1))
    return scene.read(RESOLVE, BOB, Who(token))


def revoked(scene: Scene) -> Who:
    """A device of bob's that was shut out."""
    lost = scene.service.enrol("bob", "lost")
    scene.service.directory.revoke(lost.device_id, scene.service.now_ms())
    return scene.device(lost)


def mistyped(scene: Scene) -> bytes:
    """Anna's token with one letter changed."""
    token = scene.anna.token or ""
    other = "A" if token[20] != "A" else "B"
    return scene.read(RESOLVE, BOB, Who(token[:20] + other + token[21:]))


def jwt(algorithm: str) -> str:
    """What a service that takes JWTs would have to look at; here it is no token."""
    parts = ({"alg": algorithm, "typ": "JWT"}, {"sub": "operator", "scope": "admin"})
    coded = (base64.urlsafe_b64encode(json.dumps(part).encode()).decode() for part in parts)
    return ".".join(coded) + "."


def shown_twice(scene: Scene) -> bytes:
    """Two tokens: which of them counts is nobody's to guess."""
    both = [(TOKEN_HEADER, f"Bearer {who.token}") for who in (scene.anna, scene.operator)]
    return scene.call(STATUS, metadata=both)


def replayed(scene: Scene) -> bytes:
    """A publish, and the very same bytes and metadata again."""
    body = scene.publish_request().SerializeToString()
    metadata = scene.metadata(PUBLISH, body, scene.anna)
    scene.call(PUBLISH, body, metadata=metadata)
    return scene.call(PUBLISH, body, metadata=metadata)


def off_by(ms: int) -> Callable[[Scene], bytes]:
    """A signed call of a device whose clock is so far off."""

    def send(scene: Scene) -> bytes:
        body = pb.EraseRequest().SerializeToString()
        metadata = scene.metadata(ERASE, body, scene.anna, off_ms=ms)
        return scene.call(ERASE, body, metadata=metadata)

    return send


def another_body(scene: Scene) -> bytes:
    """Signed for one base model, sent for all."""
    signed = pb.EraseRequest(base_digest="0" * 64).SerializeToString()
    metadata = scene.metadata(ERASE, signed, scene.anna)
    return scene.call(ERASE, pb.EraseRequest(), metadata=metadata)


def another_method(scene: Scene) -> bytes:
    """Signed to pause, sent to resume."""
    metadata = scene.metadata("/fedia3.v1.Admin/Pause", b"", scene.operator)
    return scene.call("/fedia3.v1.Admin/Resume", metadata=metadata)


def another_signer(scene: Scene) -> bytes:
    """Anna's token, signed with bob's key."""
    return scene.publish(who=Who(scene.anna.token, scene.bob.key))


def without(header: str) -> Callable[[Scene], bytes]:
    """A signed call that lacks a part."""

    def send(scene: Scene) -> bytes:
        metadata = scene.metadata(ERASE, b"", scene.anna)
        return scene.call(ERASE, metadata=[(k, v) for k, v in metadata if k != header])

    return send


def over(**options: Any) -> Callable[[Scene], bytes]:
    """A call over a connection with these options, of a caller who believes one authority."""

    def send(scene: Scene) -> bytes:
        with a_channel(scene.service, **options) as channel:
            answer: bytes = channel.unary_unary(STATUS)(b"", timeout=5)
        return answer

    return send


def anothers_key(name: str, key: Callable[[Phone], bytes]) -> Callable[[Scene], bytes]:
    """A device that says another one's key is its own, and cannot sign with it."""

    def send(scene: Scene) -> bytes:
        return Phone().enrol(scene, scene.service.invite("eve"), **{name: key(Phone())})

    return send


def shut_out(scene: Scene) -> Phone:
    """A phone whose keys the coordinator has seen the last of."""
    phone = Phone()
    answer = phone.enrol(scene, scene.service.invite("eve"))
    device_id = enrolment.CompleteResponse.FromString(answer).device_id
    scene.service.directory.revoke(device_id, scene.service.now_ms())
    return phone


def used_code(scene: Scene) -> str:
    """A code that let another device in."""
    code = scene.service.invite("eve")
    Phone().enrol(scene, code)
    return code


NO_TOKEN = "this is no token of fedia3's: .*check sum"
TABLE = [
    Refused(69, "no token", lambda s: s.read(RESOLVE, BOB, Who()), BAD_TOKEN, "Bearer TOKEN"),
    Refused(69, "two tokens", shown_twice, BAD_TOKEN, "Bearer TOKEN"),
    Refused(70, "an expired token", expired, BAD_TOKEN, "unknown, expired or revoked; enrol"),
    Refused(
        72,
        "a revoked device",
        lambda scene, who: scene.read(RESOLVE, BOB, who),
        BAD_TOKEN,
        "unknown, expired or revoked; enrol",
        given=revoked,
    ),
    Refused(73, "another's token", shown(new_token("device")), BAD_TOKEN, "unknown, expired or"),
    Refused(74, "alg none", shown(jwt("none")), BAD_TOKEN, NO_TOKEN),
    Refused(74, "alg HS256", shown(jwt("HS256")), BAD_TOKEN, NO_TOKEN),
    Refused(75, "a mistyped token", mistyped, BAD_TOKEN, NO_TOKEN),
    Refused(75, "half a token", lambda s: shown(s.anna.token[:-9])(s), BAD_TOKEN, NO_TOKEN),
    Refused(
        76,
        "a token in the path",
        lambda s: s.call(f"{STATUS}?token={s.operator.token}"),
        UNKNOWN_METHOD,
        "not found",
    ),
    *(
        Refused(
            77,
            f"bob's by {path.rpartition('/')[2]}",
            lambda scene, path=path: scene.read(path, BOB),
            NOT_FOUND,
            "user 'bob' has no adapter for base model",
        )
        for path in (FETCH, RESOLVE, LIST, COMPARE)
    ),
    Refused(
        77,
        "bob's by its digest",
        lambda s: s.read(FETCH, BOB, if_none_match=digest(s.bobs)),
        NOT_FOUND,
        "user 'bob' has no adapter",
    ),
    *(
        Refused(
            78,
            f"a device on {method.name}",
            lambda scene, path=path: scene.call(path, b"", scene.anna),
            NOT_ALLOWED,
            f"a device's token does not reach {method.name}",
        )
        for path, method in METHODS.items()
        if method.scopes == {Scope.SCOPE_ADMIN}
    ),
    Refused(
        78,
        "a service that publishes",
        lambda scene: scene.publish(who=scene.web),
        NOT_ALLOWED,
        "a service's token does not reach Publish",
    ),
    Refused(79, "a nonce again", replayed, REPLAYED, "sign a new one with a new nonce"),
    Refused(80, "an hour ahead", off_by(HOUR_MS), WRONG_CLOCK, r"\+3600 s off .*fedia3-time"),
    Refused(80, "an hour behind", off_by(-HOUR_MS), WRONG_CLOCK, r"-3600 s off .*fedia3-time"),
    Refused(81, "another body", another_body, BAD_SIGNATURE, "sign the bytes that are sent"),
    Refused(81, "another method", another_method, BAD_SIGNATURE, "does not fit the request"),
    Refused(81, "another signer", another_signer, BAD_SIGNATURE, "the key that was enrolled"),
    *(
        Refused(81, f"no {header}", without(header), BAD_SIGNATURE, f"this call carries .*{header}")
        for header in ("fedia3-nonce-bin", "fedia3-time", SIGNATURE_HEADER)
    ),
    Refused(
        82,
        "another authority",
        over(ca=make_authority(datetime.now(UTC)).certificate),
        NO_CONNECTION,
        "CERTIFICATE_VERIFY_FAILED",
    ),
    Refused(
        82,
        "another name",
        over(ssl_target_name_override="elsewhere.example"),
        NO_CONNECTION,
        "Hostname Verification|not in peer certificate",
    ),
    Refused(
        83,
        "a used code",
        lambda scene, code: Phone().enrol(scene, code),
        BAD_INVITE,
        "unknown, used or expired; ask the operator",
        given=used_code,
    ),
    Refused(
        85,
        "another device's signing key",
        anothers_key("signing_key", lambda phone: phone.public),
        BAD_SIGNATURE,
        "proof of the device's keys does not hold",
    ),
    Refused(
        85,
        "another device's node key",
        anothers_key("node_key", lambda phone: node_pem(phone.node)),
        BAD_SIGNATURE,
        "proof of the device's keys does not hold",
    ),
    Refused(
        85,
        "keys that were shut out",
        lambda scene, phone: phone.enrol(scene, scene.service.invite("eve")),
        CONFLICT,
        "make new keys",
        given=shut_out,
    ),
]


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_a_caller_who_may_not_is_refused(scene: Scene, case: Refused) -> None:
    """Nothing is told and nothing is changed."""
    require_refused(scene, case)


def test_who_guesses_codes_has_to_wait(tmp_path: Path) -> None:
    """84: behind three wrong codes an address's fourth is not even looked at, right or wrong."""
    slow = Limits(wrong_codes=Rate(per_s=0.01, burst=3))
    with a_scene(tmp_path, limits=slow) as scene:
        for _ in range(3):
            require_refused(scene, Refused(84, "a guess", begun, BAD_INVITE, "ask the operator"))
        waits = Refused(
            84, "a good one", begun, TOO_MANY_CALLS, "come again in .* s", given=invited
        )
        require_refused(scene, waits)


def invited(scene: Scene) -> str:
    """A code that the operator did hand out."""
    return scene.service.invite("eve")


def begun(scene: Scene, code: str | None = None) -> bytes:
    """Ask with a code, one that nobody handed out where none is given."""
    return scene.call(BEGIN, enrolment.BeginRequest(code=code or new_code()))


def test_who_guesses_tokens_has_to_wait(tmp_path: Path) -> None:
    """84: a stranger's fourth call in a row waits, whatever token it shows; anna's does not."""
    slow = Limits(stranger=Rate(per_s=0.01, burst=3))
    with a_scene(tmp_path, limits=slow) as scene:
        guess = shown(new_token("admin"))
        for _ in range(3):
            require_refused(scene, Refused(84, "a guess", guess, BAD_TOKEN, "unknown"))
        require_refused(scene, Refused(84, "one more", guess, TOO_MANY_CALLS, "come again in .* s"))
        scene.read(RESOLVE, pb.Owner(user="anna"))


def test_no_secret_is_in_the_log(
    scene: Scene, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """76: good calls and refused ones leave neither token nor code in what is written."""
    caplog.set_level(logging.DEBUG)
    code, unknown = scene.service.invite("eve"), new_token("admin")
    for send in (
        lambda: scene.read(RESOLVE, pb.Owner(everyone=True)),
        lambda: scene.read(RESOLVE, BOB),
        lambda: scene.call(STATUS, b"", scene.anna),
        lambda: scene.call(STATUS, b"", Who(unknown)),
        lambda: scene.call(f"{STATUS}?token={unknown}"),
        lambda: scene.call(BEGIN, enrolment.BeginRequest(code=code)),
        lambda: scene.call("/fedia3.v1.Admin/Pause", admin_pb2.PauseRequest(), scene.operator),
    ):
        attempted(send)
    written = caplog.text + "".join(capfd.readouterr())
    assert "the operator paused the rounds" in written
    secrets = (scene.anna.token, scene.operator.token, unknown, code)
    assert [secret for secret in secrets if (secret or "?") in written] == []


def attempted(send: Callable[[], object]) -> None:
    """Call, whatever comes of it."""
    with contextlib.suppress(grpc.RpcError):
        send()


def test_erasing_reaches_no_other_user(scene: Scene) -> None:
    """77: an erasure names nobody; with bob's device it is bob's, and anna's part stays."""
    carol = scene.device(scene.service.enrol(f"carol {os.urandom(4).hex()}"))
    before = scene.kept()[0]
    scene.publish(who=carol)
    scene.call(ERASE, pb.EraseRequest(), carol)
    assert scene.kept()[0] == before


NUMBERS = {84, *(case.number for case in TABLE)}
