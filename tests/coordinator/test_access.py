"""What has to hold before a method's code runs; every way in which it may not."""

import itertools
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.empty_pb2 import Empty

from fedia3.coordinator.access import Access, Call, Limits, peer_address
from fedia3.coordinator.directory import Device, Invite, Token
from fedia3.coordinator.rates import Rate
from fedia3.coordinator.stores.memory_directory import MemoryDirectory
from fedia3.coordinator.tokens import new_token, token_sha256
from fedia3.errors import (
    BadInput,
    BadSignature,
    BadToken,
    Fedia3Error,
    NoDeadline,
    NotAllowed,
    Replayed,
    TooManyCalls,
    WrongClock,
)
from fedia3.proto.contract import MAX_MESSAGE, METHODS, Method
from fedia3.proto.rules_pb2 import Scope
from fedia3.proto.signing import (
    NONCE_HEADER,
    SIGNATURE_HEADER,
    TIME_HEADER,
    TOKEN_HEADER,
    request_bytes,
)

NOON = 1_900_000_000_000
HOUR = 3_600_000
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
DEVICE, SERVICE, OPERATOR = (new_token(kind) for kind in ("device", "service", "admin"))
FETCH = METHODS["/fedia3.v1.Adapters/Fetch"]
PUBLISH = METHODS["/fedia3.v1.Adapters/Publish"]
PAUSE = METHODS["/fedia3.v1.Admin/Pause"]
STATUS = METHODS["/fedia3.v1.Admin/Status"]
BEGIN = METHODS["/fedia3.v1.Enrolment/Begin"]

_nonces = itertools.count()


class Clock:
    """Both clocks of a coordinator; they stand until they are moved."""

    now_ms = NOON
    now_s = 0.0


@pytest.fixture
def clock() -> Clock:
    """At noon."""
    return Clock()


@pytest.fixture
def directory() -> MemoryDirectory:
    """With anna's phone, a service and the operator; their tokens last an hour."""
    directory, public = MemoryDirectory(), KEY.public_key().public_bytes_raw()
    invite = Invite(b"i" * 32, "anna", NOON + HOUR, b"c" * 32)
    device = Device("a" * 32, "anna", "phone", public, b"node key", NOON)
    directory.add_invite(invite)
    directory.enrol(invite, device, Token(token_sha256(DEVICE), "device", "", NOON + HOUR), NOON)
    directory.add_token(Token(token_sha256(SERVICE), "service", "web", NOON + HOUR))
    directory.add_token(Token(token_sha256(OPERATOR), "admin", "operator", NOON + HOUR, public))
    return directory


@pytest.fixture
def access(directory: MemoryDirectory, clock: Clock) -> Access:
    """With the usual limits."""
    return Access(directory, Limits(), lambda: clock.now_ms, lambda: clock.now_s)


def call(method: Method = FETCH, token: str | None = DEVICE, body: bytes = b"body") -> Call:
    """A call in order, not signed, ten seconds before its end."""
    shown = [] if token is None else [(TOKEN_HEADER, f"Bearer {token}")]
    return Call(method, body, shown, remaining_s=10.0, peer="ipv4:192.0.2.7:50123")


def signed(
    method: Method = PUBLISH,
    token: str = DEVICE,
    body: bytes = b"body",
    *,
    key: Ed25519PrivateKey = KEY,
    time_ms: int = NOON,
    nonce: bytes | None = None,
) -> Call:
    """A call in order, signed, with a nonce of its own."""
    nonce = nonce or next(_nonces).to_bytes(16)
    signature = key.sign(request_bytes(method.path, body, time_ms, nonce, token))
    plain = call(method, token, body)
    parts = [(NONCE_HEADER, nonce), (TIME_HEADER, str(time_ms)), (SIGNATURE_HEADER, signature)]
    return replace(plain, metadata=[*plain.metadata, *parts])


def with_header(given: Call, name: str, *values: str | bytes) -> Call:
    """The call with these values for a header, none of them: without it."""
    others = [(key, value) for key, value in given.metadata if key != name]
    return replace(given, metadata=[*others, *((name, value) for value in values)])


def test_a_call_in_order_is_let_in_as_who_it_is(access: Access) -> None:
    """
    A device by its token, with its user; an operator by theirs; anybody where anybody may.
    """
    device = access.admit(call())
    assert device is not None
    assert (device.kind, device.name, device.user) == ("device", "a" * 32, "anna")
    assert access.admit(call(FETCH, SERVICE)).kind == "service"
    assert access.admit(call(STATUS, OPERATOR)).kind == "admin"
    assert access.admit(call(BEGIN, None)) is None


def test_a_signed_call_in_order_is_let_in(access: Access) -> None:
    """
    With a body's signature, our time and a new nonce.
    """
    assert access.admit(signed()).name == "a" * 32
    assert access.admit(signed(PAUSE, OPERATOR)).name == "operator"


@pytest.mark.parametrize("remaining_s", [None, 31.0, 3600.0, float("inf")])
def test_a_call_has_to_end(access: Access, remaining_s: float | None) -> None:
    """
    Fetching takes 30 s at most: without a deadline, or with one behind that, nobody fetches.
    """
    with pytest.raises(NoDeadline, match="within 30 s"):
        access.admit(replace(call(), remaining_s=remaining_s))


def test_a_deadline_may_be_as_grpc_rounds_it(access: Access) -> None:
    """
    30 s arrive as 30.1.
    """
    access.admit(replace(call(), remaining_s=30.1))


@pytest.mark.parametrize("rule", [{"scopes": frozenset()}, {"max_deadline_s": 0}])
def test_a_method_without_a_rule_lets_nobody_in(access: Access, rule: dict) -> None:
    """
    A method that somebody forgot to give scopes or a deadline is closed to all.
    """
    forgotten = Method("/fedia3.v1.New/Call", Empty, Empty, False, FETCH.scopes, 30, False)
    for token in (DEVICE, SERVICE, OPERATOR, None):
        with pytest.raises(NotAllowed, match="no rule"):
            access.admit(call(replace(forgotten, **rule), token))


def test_the_unset_scope_lets_nobody_in(access: Access) -> None:
    """
    Scope 0 is nobody's.
    """
    unset = replace(FETCH, scopes=frozenset({Scope.SCOPE_UNSPECIFIED}))
    for token in (DEVICE, SERVICE, OPERATOR):
        with pytest.raises(NotAllowed):
            access.admit(call(unset, token))


def test_a_message_has_a_size(access: Access) -> None:
    """
    4 MiB are let in, one byte more is not.
    """
    access.admit(call(body=b"x" * MAX_MESSAGE))
    with pytest.raises(BadInput, match="4194304 bytes"):
        access.admit(call(body=b"x" * (MAX_MESSAGE + 1)))


def test_a_call_without_a_token_is_refused(access: Access) -> None:
    """
    Missing, of another scheme, or there twice.
    """
    wrong = [
        call(token=None),
        with_header(call(), TOKEN_HEADER, DEVICE),
        with_header(call(), TOKEN_HEADER, f"Basic {DEVICE}"),
        with_header(call(), TOKEN_HEADER, f"Bearer {DEVICE}", f"Bearer {DEVICE}"),
    ]
    for refused in wrong:
        with pytest.raises(BadToken, match="needs a token"):
            access.admit(refused)


def test_a_token_that_is_not_known_is_refused(access: Access) -> None:
    """
    One that nobody issued, one with a letter changed, and one whose check sum fits another.
    """
    for token in (new_token("device"), DEVICE[:-1], DEVICE[:20] + "-" + DEVICE[21:]):
        with pytest.raises(BadToken):
            access.admit(call(token=token))


def test_a_token_ends(access: Access, clock: Clock) -> None:
    """
    After an hour it is over.
    """
    clock.now_ms = NOON + HOUR
    with pytest.raises(BadToken):
        access.admit(call())


def test_a_revoked_devices_token_is_refused(access: Access, directory: MemoryDirectory) -> None:
    """
    From the next call on.
    """
    access.admit(call())
    directory.revoke("a" * 32, NOON)
    with pytest.raises(BadToken):
        access.admit(call())


def test_a_token_reaches_what_its_kind_may_call(access: Access) -> None:
    """
    Neither a device nor a service does what operators do, nor an operator what devices do.
    """
    for given in (signed(PAUSE), call(STATUS), call(STATUS, SERVICE), signed(PUBLISH, OPERATOR)):
        with pytest.raises(NotAllowed, match="does not reach"):
            access.admit(given)


@pytest.mark.parametrize("path", METHODS)
@pytest.mark.parametrize("token", [DEVICE, SERVICE, OPERATOR])
def test_every_method_lets_in_whom_its_file_lists(access: Access, path: str, token: str) -> None:
    """
    By kind of token, all of them: who is listed passes the check, everybody else does not.
    """
    method = replace(METHODS[path], is_signed=False)
    scope = {DEVICE: Scope.SCOPE_DEVICE, SERVICE: Scope.SCOPE_SERVICE, OPERATOR: Scope.SCOPE_ADMIN}
    if scope[token] in method.scopes or Scope.SCOPE_ANYONE in method.scopes:
        access.admit(call(method, token))
    else:
        with pytest.raises(NotAllowed):
            access.admit(call(method, token))


@pytest.mark.parametrize("header", [NONCE_HEADER, TIME_HEADER, SIGNATURE_HEADER])
def test_a_signed_call_lacks_nothing(access: Access, header: str) -> None:
    """
    Without any one of the three, or with it twice, the call is refused.
    """
    given = signed()
    (value,) = [value for key, value in given.metadata if key == header]
    for refused in (with_header(given, header), with_header(given, header, value, value)):
        with pytest.raises(BadSignature, match=header):
            access.admit(refused)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        (NONCE_HEADER, b"short"),
        (NONCE_HEADER, b"n" * 17),
        (TIME_HEADER, "noon"),
        (TIME_HEADER, f"-{NOON}"),
        (TIME_HEADER, f"{NOON}.0"),
        (TIME_HEADER, "9" * 20),
        (TIME_HEADER, "١٢٣"),
        (TIME_HEADER, ""),
        (SIGNATURE_HEADER, b""),
        (SIGNATURE_HEADER, b"s" * 64),
        (SIGNATURE_HEADER, b"s" * 65),
    ],
)
def test_a_signed_calls_parts_are_what_they_should_be(
    access: Access, header: str, value: str | bytes
) -> None:
    """
    A nonce of another length, a time that is no number, a signature that is none.
    """
    with pytest.raises(BadSignature):
        access.admit(with_header(signed(), header, value))


def test_what_was_signed_is_what_is_done(access: Access) -> None:
    """
    Another body, method, time, nonce or token than the signed one is refused.
    """
    given = signed(body=b"mine")
    changed = [
        replace(given, body=b"theirs"),
        replace(given, method=METHODS["/fedia3.v1.Adapters/Erase"]),
        with_header(given, TIME_HEADER, str(NOON + 1)),
        with_header(given, NONCE_HEADER, b"n" * 16),
    ]
    for refused in changed:
        with pytest.raises(BadSignature, match="does not fit"):
            access.admit(refused)


def test_another_token_of_the_same_device_is_not_what_was_signed(
    access: Access, directory: MemoryDirectory
) -> None:
    """
    A signature is bound to the token it was made for.
    """
    renewed = new_token("device")
    directory.add_token(Token(token_sha256(renewed), "device", "a" * 32, NOON + HOUR))
    with pytest.raises(BadSignature):
        access.admit(with_header(signed(), TOKEN_HEADER, f"Bearer {renewed}"))


def test_a_stolen_token_alone_changes_nothing(access: Access) -> None:
    """
    Without the device's key nobody can sign.
    """
    with pytest.raises(BadSignature, match="does not fit"):
        access.admit(signed(key=OTHER_KEY))


def test_who_has_no_key_signs_nothing(access: Access, directory: MemoryDirectory) -> None:
    """
    An operator's token that was made without a key only looks.
    """
    keyless = new_token("admin")
    directory.add_token(Token(token_sha256(keyless), "admin", "watcher", NOON + HOUR))
    access.admit(call(STATUS, keyless))
    with pytest.raises(NotAllowed, match="without a signing key"):
        access.admit(signed(PAUSE, keyless))


@pytest.mark.parametrize("off_ms", [-HOUR, -60_001, 60_001, HOUR])
def test_a_request_from_another_time_is_refused(access: Access, off_ms: int) -> None:
    """
    An hour or a minute and a millisecond off, in either direction.
    """
    with pytest.raises(WrongClock, match="off the coordinator's"):
        access.admit(signed(time_ms=NOON + off_ms))


@pytest.mark.parametrize("off_ms", [-60_000, 60_000])
def test_a_minute_off_is_good_enough(access: Access, off_ms: int) -> None:
    """
    Clocks differ.
    """
    access.admit(signed(time_ms=NOON + off_ms))


def test_a_request_is_answered_once(access: Access) -> None:
    """
    Sent again, byte for byte, it is a replay; signed anew, it is another one.
    """
    given = signed()
    access.admit(given)
    with pytest.raises(Replayed):
        access.admit(given)
    access.admit(signed())


def test_a_request_is_answered_once_though_clocks_step(access: Access, clock: Clock) -> None:
    """
    Our clock goes an hour forward, others call, and it comes back: the old request stays old.
    """
    given = signed()
    access.admit(given)
    clock.now_ms = NOON + HOUR - 1
    access.admit(signed(time_ms=clock.now_ms))
    clock.now_ms = NOON
    with pytest.raises(Replayed):
        access.admit(given)


def test_nobody_uses_up_anothers_nonce(access: Access) -> None:
    """
    A nonce in a request whose signature or time is wrong is still new.
    """
    nonce = b"n" * 16
    for refused in (signed(nonce=nonce, key=OTHER_KEY), signed(nonce=nonce, time_ms=NOON + HOUR)):
        with pytest.raises((BadSignature, WrongClock)):
            access.admit(refused)
    access.admit(signed(nonce=nonce))


def limited(directory: MemoryDirectory, clock: Clock, **rates: Rate) -> Access:
    """An access with some other rates."""
    return Access(directory, Limits(**rates), lambda: clock.now_ms, lambda: clock.now_s)


def test_a_caller_calls_so_often(directory: MemoryDirectory, clock: Clock) -> None:
    """
    With two at once and one a second, the third waits a second; another principal does not.
    """
    access = limited(directory, clock, device=Rate(per_s=1, burst=2))
    access.admit(call())
    access.admit(call())
    with pytest.raises(TooManyCalls) as refused:
        access.admit(call())
    assert refused.value.retry_after_s == pytest.approx(1)
    access.admit(call(token=SERVICE))
    clock.now_s = 1.0
    access.admit(call())


def test_strangers_are_counted_by_where_they_come_from(
    directory: MemoryDirectory, clock: Clock
) -> None:
    """
    Two wrong tokens from one address, on any port, and the third is told to wait; a known device
    behind the same address is not, nor a stranger from elsewhere.
    """
    access = limited(directory, clock, stranger=Rate(per_s=1, burst=2))
    tried = [replace(call(token=None), peer=f"ipv4:192.0.2.7:{port}") for port in (1, 2, 3)]
    for wrong in tried[:2]:
        with pytest.raises(BadToken):
            access.admit(wrong)
    with pytest.raises(TooManyCalls):
        access.admit(tried[2])
    access.admit(call())
    with pytest.raises(BadToken):
        access.admit(replace(tried[2], peer="ipv4:192.0.2.8:3"))


def test_what_anybody_may_call_they_call_so_often(directory: MemoryDirectory, clock: Clock) -> None:
    """
    Enrolling is counted by address as well.
    """
    access = limited(directory, clock, stranger=Rate(per_s=1, burst=1))
    access.admit(call(BEGIN, None))
    with pytest.raises(TooManyCalls):
        access.admit(call(BEGIN, None))


@pytest.mark.parametrize(
    ("peer", "counted"),
    [
        ("ipv4:127.0.0.1:50123", "127.0.0.1"),
        ("ipv6:%5B::1%5D:50123", "::"),
        ("ipv6:[2001:db8:1:2:3::4]:5", "2001:db8:1:2::"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5", "fe80::"),
        ("ipv6:[::ffff:192.0.2.7]:5", "192.0.2.7"),
        ("unix:/run/socket", "unix:/run/socket"),
        ("ipv4:nonsense", "ipv4:nonsense"),
        ("", ""),
    ],
)
def test_who_has_a_whole_network_is_counted_once(peer: str, counted: str) -> None:
    """
    An IPv6 customer has 2^64 addresses.
    """
    assert peer_address(peer) == counted


def test_checks_come_in_their_order(access: Access) -> None:
    """
    Of everything that is wrong with a call the first in the order is told.
    """
    everything = replace(
        signed(PAUSE, DEVICE, b"x" * (MAX_MESSAGE + 1), key=OTHER_KEY), remaining_s=None
    )
    expected: list[tuple[type[Fedia3Error], dict]] = [
        (NoDeadline, {"remaining_s": 1.0}),
        (BadInput, {"body": b""}),
        (BadToken, {}),
        (NotAllowed, {"method": PUBLISH}),
        (BadSignature, {}),
    ]
    given = with_header(everything, TOKEN_HEADER)
    for kind, mended in expected:
        with pytest.raises(kind) as refused:
            access.admit(given)
        assert type(refused.value) is kind
        given = replace(given, **mended)
        if kind is BadToken:
            given = with_header(given, TOKEN_HEADER, f"Bearer {DEVICE}")
