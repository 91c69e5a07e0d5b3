"""How devices come in: by a code that is good once, with keys that are theirs."""

from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedia3.coordinator.access import Limits
from fedia3.coordinator.rates import Rate
from fedia3.coordinator.services.enrolment import register_everyone
from fedia3.coordinator.tokens import DEVICE_TOKEN_MS, INVITE_MS, new_code, token_sha256
from fedia3.errors import (
    BadInput,
    BadInvite,
    BadSignature,
    BadToken,
    Conflict,
    TooManyCalls,
    Unreachable,
)
from fedia3.proto import enrolment_pb2 as pb
from fedia3.proto.caller import Caller
from fedia3.proto.signing import enrolment_bytes
from fedia3.testing_service import FLEET_ADDRESS, RunningService, node_pem, running_service


@dataclass(frozen=True)
class Phone:
    """A device with its two keys, before it belongs to anybody."""

    signing: Ed25519PrivateKey
    node: ec.EllipticCurvePrivateKey

    def completed(self, code: str, challenge: bytes, **changed: object) -> pb.CompleteRequest:
        """What it sends to enrol, proofs over what it sends included; then changed."""
        public, node = self.signing.public_key().public_bytes_raw(), node_pem(self.node)
        proven = enrolment_bytes(code, challenge, "phone", public, node)
        request = pb.CompleteRequest(
            code=code,
            challenge=challenge,
            device_name="phone",
            signing_key=public,
            node_key=node,
            signing_key_proof=self.signing.sign(proven),
            node_key_proof=self.node.sign(proven, ec.ECDSA(SHA256())),
        )
        request.MergeFrom(pb.CompleteRequest(**changed))
        return request


def phone() -> Phone:
    """A device with new keys."""
    return Phone(Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()))


def begin(caller: Caller, code: str) -> bytes:
    """The challenge for this code."""
    return caller.call("Enrolment/Begin", pb.BeginRequest(code=code), pb.BeginResponse).challenge


def complete(caller: Caller, request: pb.CompleteRequest) -> pb.CompleteResponse:
    """The answer to a device that wants in."""
    return caller.call("Enrolment/Complete", request, pb.CompleteResponse)


def test_a_device_enrols(service: RunningService, calling, clock) -> None:
    """
    It gets an id, a token for thirty days and all that it has to know; Flower knows its node.
    """
    code, mine, anybody = service.invite("anna"), phone(), calling()
    answer = complete(anybody, mine.completed(code, begin(anybody, code)))
    (device,) = service.directory.enrolled()
    assert (answer.device_id, answer.user) == (device.device_id, "anna")
    assert len(answer.device_id) == 32
    assert answer.token_expires_ms == clock() + DEVICE_TOKEN_MS
    assert service.directory.principal(token_sha256(answer.token), clock()).user == "anna"
    assert answer.ca == service.ca
    assert list(answer.coordinator_keys) == [service.coordinator_key]
    assert answer.fleet_address == FLEET_ADDRESS
    assert answer.base_digest == service.manifest.digest
    assert service.registrar.nodes == {device.device_id: node_pem(mine.node)}


def test_a_code_may_be_typed_as_people_type(service: RunningService, calling) -> None:
    """
    In lower case with blanks between, in both calls.
    """
    code, anybody = service.invite("anna"), calling()
    typed = code.lower().replace("-", " ")
    assert complete(anybody, phone().completed(typed, begin(anybody, code))).user == "anna"


def test_a_lost_answer_costs_nothing(service: RunningService, calling) -> None:
    """
    The same request again gives the same device and a new token; the lost one opens nothing.
    """
    code, mine, anybody = service.invite("anna"), phone(), calling()
    challenge = begin(anybody, code)
    lost = complete(anybody, mine.completed(code, challenge))
    again = complete(anybody, mine.completed(code, begin(anybody, code)))
    assert again.device_id == lost.device_id
    assert len(service.directory.enrolled()) == 1
    with pytest.raises(BadToken):
        service.directory.principal(token_sha256(lost.token), 0)
    service.directory.principal(token_sha256(again.token), 0)


def test_a_code_lets_one_device_in(service: RunningService, calling) -> None:
    """
    A second device with the same code is refused, and Flower never hears of it.
    """
    code, anybody = service.invite("anna"), calling()
    challenge = begin(anybody, code)
    complete(anybody, phone().completed(code, challenge))
    with pytest.raises(BadInvite):
        complete(anybody, phone().completed(code, challenge))
    assert len(service.registrar.nodes) == 1


def test_a_code_ends_after_ten_minutes(service: RunningService, calling, clock) -> None:
    """
    A millisecond before it begins, then it is as if it never was.
    """
    code, anybody = service.invite("anna"), calling()
    clock.now_ms += INVITE_MS - 1
    challenge = begin(anybody, code)
    clock.now_ms += 1
    with pytest.raises(BadInvite):
        begin(anybody, code)
    with pytest.raises(BadInvite):
        complete(anybody, phone().completed(code, challenge))


def test_wrong_codes_are_all_told_alike(service: RunningService, calling, clock) -> None:
    """
    Unknown, ended or empty: the words are the same.
    """
    said, ended, anybody = set(), service.invite("anna"), calling()
    clock.now_ms += INVITE_MS
    for code in (new_code(), ended, "", "x" * 1000):
        with pytest.raises(BadInvite) as refused:
            begin(anybody, code)
        said.add(str(refused.value))
    assert len(said) == 1


def test_whoever_guesses_codes_has_to_wait(tmp_path, clock) -> None:
    """
    After three wrong codes the right one is not looked at either.
    """
    limits = Limits(wrong_codes=Rate(per_s=0.001, burst=3))
    with (
        running_service(tmp_path, in_memory=True, limits=limits, now_ms=clock) as service,
        Caller(service.address, ca=service.ca, timeout_s=3) as anybody,
    ):
        for _ in range(3):
            with pytest.raises(BadInvite):
                begin(anybody, new_code())
        with pytest.raises(TooManyCalls):
            begin(anybody, service.invite("anna"))


def test_everybody_together_guesses_so_often(tmp_path, clock) -> None:
    """
    Many addresses share one limit; right codes do not count.
    """
    limits = Limits(all_wrong_codes=Rate(per_s=0.001, burst=1))
    with (
        running_service(tmp_path, in_memory=True, limits=limits, now_ms=clock) as service,
        Caller(service.address, ca=service.ca, timeout_s=3) as anybody,
    ):
        for _ in range(3):
            begin(anybody, service.invite("anna"))
        with pytest.raises(BadInvite):
            begin(anybody, new_code())
        with pytest.raises(TooManyCalls):
            begin(anybody, service.invite("anna"))


def test_while_flower_is_down_the_invite_stays_unused(service: RunningService, calling) -> None:
    """
    The device is told to come again, nothing is kept; when it is up, the same code lets it in.
    """
    code, mine, anybody = service.invite("anna"), phone(), calling()
    challenge = begin(anybody, code)
    service.registrar.is_down = True
    request = mine.completed(code, challenge)
    with pytest.raises(Unreachable, match="SuperLink"):
        anybody.call("Enrolment/Complete", request, pb.CompleteResponse, timeout_s=0.5)
    assert service.directory.devices() == ()
    service.registrar.is_down = False
    assert complete(anybody, mine.completed(code, challenge)).user == "anna"


@pytest.mark.parametrize("field", ["signing_key_proof", "node_key_proof"])
def test_both_keys_are_proven(service: RunningService, calling, field: str) -> None:
    """
    A proof by another key is refused, and the code is still good.
    """
    code, mine, other, anybody = service.invite("anna"), phone(), phone(), calling()
    challenge = begin(anybody, code)
    theirs = getattr(other.completed(code, challenge), field)
    for wrong in (theirs, b"", b"x"):
        request = mine.completed(code, challenge)
        setattr(request, field, wrong)
        with pytest.raises(BadSignature):
            complete(anybody, request)
    assert service.registrar.nodes == {}
    complete(anybody, mine.completed(code, challenge))


def test_a_proof_is_of_what_is_sent(service: RunningService, calling) -> None:
    """
    Another name than the signed one, or another challenge, is refused.
    """
    code, anybody = service.invite("anna"), calling()
    challenge = begin(anybody, code)
    with pytest.raises(BadSignature):
        complete(anybody, phone().completed(code, challenge, device_name="tablet"))
    with pytest.raises(BadInvite):
        complete(anybody, phone().completed(code, b"c" * 32))
    assert service.directory.devices() == ()


def other_curve() -> bytes:
    """A P-256 key."""
    return node_pem(ec.generate_private_key(ec.SECP256R1()))


def as_der() -> bytes:
    """A right key in another form."""
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize(
    "key",
    [b"", b"-----BEGIN PUBLIC KEY-----", b"x" * 2000, other_curve(), as_der(), node_pem() + b"\n"],
    ids=["empty", "cut", "long", "other curve", "DER", "longer"],
)
def test_a_node_key_is_as_flower_writes_it(service: RunningService, calling, key: bytes) -> None:
    """
    One key has one form, or it could belong to two devices.
    """
    code, anybody = service.invite("anna"), calling()
    request = phone().completed(code, begin(anybody, code))
    request.node_key = key
    with pytest.raises(BadInput, match="P-384"):
        complete(anybody, request)


@pytest.mark.parametrize("key", [b"", b"k" * 31, b"k" * 33])
def test_a_signing_key_has_32_bytes(service: RunningService, calling, key: bytes) -> None:
    """
    Ed25519, raw.
    """
    code, anybody = service.invite("anna"), calling()
    request = phone().completed(code, begin(anybody, code))
    request.signing_key = key
    with pytest.raises(BadInput, match="32 bytes"):
        complete(anybody, request)


def test_a_device_has_a_name(service: RunningService, calling) -> None:
    """
    A blank one that is signed is still no name.
    """
    code, mine, anybody = service.invite("anna"), phone(), calling()
    challenge = begin(anybody, code)
    request = mine.completed(code, challenge)
    request.device_name = " "
    proven = enrolment_bytes(code, challenge, " ", request.signing_key, request.node_key)
    request.signing_key_proof = mine.signing.sign(proven)
    request.node_key_proof = mine.node.sign(proven, ec.ECDSA(SHA256()))
    with pytest.raises(BadInput, match="device's name"):
        complete(anybody, request)


def test_one_key_belongs_to_one_device(service: RunningService, calling) -> None:
    """
    Bob's device that shows anna's node key, which it can sign with, is refused.
    """
    annas, anybody = phone(), calling()
    first, second = service.invite("anna"), service.invite("bob")
    complete(anybody, annas.completed(first, begin(anybody, first)))
    half = Phone(phone().signing, annas.node)
    with pytest.raises(Conflict):
        complete(anybody, half.completed(second, begin(anybody, second)))
    assert len(service.registrar.nodes) == 1


def test_who_was_shut_out_does_not_come_back(service: RunningService, calling, clock) -> None:
    """
    Neither with the code it used nor with a new one; Flower is not told of it again.
    """
    code, mine, anybody = service.invite("anna"), phone(), calling()
    challenge = begin(anybody, code)
    answer = complete(anybody, mine.completed(code, challenge))
    service.directory.revoke(answer.device_id, clock())
    service.registrar.unregister(answer.device_id)
    again = service.invite("anna")
    for with_code in (code, again):
        with pytest.raises(Conflict, match="shut out"):
            complete(anybody, mine.completed(with_code, begin(anybody, with_code)))
    assert service.registrar.nodes == {}


def test_a_device_renews_its_token(service: RunningService, calling, clock) -> None:
    """
    The new one lasts thirty days from now; the old one keeps its time.
    """
    anna = service.enrol("anna")
    clock.now_ms += 1000
    answer = calling(anna).call("Enrolment/Renew", pb.RenewRequest(), pb.RenewResponse)
    assert answer.token_expires_ms == clock() + DEVICE_TOKEN_MS
    for token in (answer.token, anna.token):
        assert service.directory.principal(token_sha256(token), clock()).user == "anna"


def test_flower_is_told_of_every_device_again(service: RunningService) -> None:
    """
    After its database was lost, those who are not revoked are back; telling twice is no error.
    """
    devices = [service.enrol(user) for user in ("anna", "bob", "cyd")]
    service.directory.revoke(devices[1].device_id, 0)
    service.registrar.nodes.clear()
    for _ in range(2):
        assert register_everyone(service.directory, service.registrar) == 2
    assert list(service.registrar.nodes) == [devices[0].device_id, devices[2].device_id]


def test_codes_and_tokens_do_not_reach_the_log(service: RunningService, calling, caplog) -> None:
    """
    Neither a right code, nor a wrong one, nor the token that was given.
    """
    caplog.set_level("DEBUG")
    code, wrong, anybody = service.invite("anna"), new_code(), calling()
    with pytest.raises(BadInvite):
        begin(anybody, wrong)
    answer = complete(anybody, phone().completed(code, begin(anybody, code)))
    assert answer.device_id in caplog.text
    for secret in (code, wrong, answer.token, "anna"):
        assert secret not in caplog.text
