"""How a device comes to belong to a user: two keys, a code, a proof that it has the keys.

The keys are on the disk before anything is sent, so that a lost answer is asked for again with the
same keys and costs nothing.
"""

from collections.abc import Callable

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedia3.client.device import DeviceFolder, DeviceKeys, Enrolment
from fedia3.clock import wall_ms
from fedia3.errors import BadInput, Conflict
from fedia3.proto.caller import TIMEOUT_S, Caller, checked_ca
from fedia3.proto.enrolment_pb2 import (
    BeginRequest,
    BeginResponse,
    CompleteRequest,
    CompleteResponse,
)
from fedia3.proto.signing import enrolment_bytes, normal_code


def enroll(
    address: str,
    code: str,
    ca: bytes,
    folder: DeviceFolder,
    device_name: str,
    *,
    timeout_s: float = TIMEOUT_S,
    now_ms: Callable[[], int] = wall_ms,
) -> Enrolment:
    """Make the device in ``folder`` one of the user for whom ``code`` was made.

    Args:
        address: ``host:port`` of the coordinator.
        code: as its operator handed it out; dashes and case do not matter.
        ca: PEM of who signs the coordinator's certificates.
        folder: the device's state, not enrolled yet.
        device_name: what the owner calls it, 1 to 128 characters.
        timeout_s: how long each of the two calls may take, its repeats included.
        now_ms: this machine's clock.

    Raises:
        Conflict: the folder is enrolled already.
        BadInvite: the code is unknown, used or over.
        BadInput: what the coordinator answers cannot be used.
        Unreachable: the coordinator does not answer; ask again with the same code.
    """
    _require_new(folder)
    if not normal_code(code):
        raise BadInput("enrolling takes the code that the coordinator's operator handed out")
    with Caller(address, ca=ca, timeout_s=timeout_s) as caller:
        try:
            answer = _completed(caller, code, folder.made_keys(), device_name)
        except Conflict:
            # They are the keys of a device of somebody else, or of one that was shut out.
            folder.replace_keys()
            answer = _completed(caller, code, folder.keys(), device_name)
    enrolment = Enrolment(
        address=address,
        fleet_address=answer.fleet_address,
        device_id=answer.device_id,
        user=answer.user,
        name=device_name,
        token=answer.token,
        token_issued_ms=now_ms(),
        token_expires_ms=answer.token_expires_ms,
        coordinator_keys=tuple(answer.coordinator_keys),
        base_digest=answer.base_digest,
    )
    folder.keep(enrolment, checked_ca(answer.ca) if answer.ca else ca)
    return enrolment


def _require_new(folder: DeviceFolder) -> None:
    if folder.is_enrolled:
        known = folder.enrolment()
        raise Conflict(
            f"{folder.path} is enrolled with {known.address} as a device of {known.user!r}; name "
            "another folder with --state, or delete its device.json to enrol it anew"
        )


def _completed(caller: Caller, code: str, keys: DeviceKeys, name: str) -> CompleteResponse:
    begun = caller.call("Enrolment/Begin", BeginRequest(code=code), BeginResponse)
    proven = enrolment_bytes(code, begun.challenge, name, keys.signing_public, keys.node_public)
    request = CompleteRequest(
        code=code,
        challenge=begun.challenge,
        device_name=name,
        signing_key=keys.signing_public,
        node_key=keys.node_public,
        signing_key_proof=keys.signing.sign(proven),
        node_key_proof=keys.node.sign(proven, ec.ECDSA(hashes.SHA256())),
    )
    return caller.call("Enrolment/Complete", request, CompleteResponse)
