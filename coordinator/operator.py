"""What an operator says to a running coordinator, from the file that ``init`` wrote."""

import json
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedia3.errors import BadInput, NotFound
from fedia3.proto import admin_pb2 as pb
from fedia3.proto.caller import TIMEOUT_S, Caller

PAGE = 100  # devices asked for at once


@dataclass(frozen=True)
class PartState:
    """One part of the coordinator, as its supervisor last wrote it down."""

    name: str  # superlink, superexec, proxy, service
    state: str
    pid: int | None  # None while it does not run
    restarts: int
    last_exit: str


@dataclass(frozen=True)
class CoordinatorStatus:
    """How a coordinator is."""

    version: str
    base_digest: str
    paused: bool
    run_requested: bool
    round_num: int | None  # of the last committed round; None before the first
    round_committed_ms: int | None
    round_metrics: Mapping[str, float]
    devices: int
    devices_online: int
    parts: tuple[PartState, ...]
    waiting_for: str  # why the next round has not started; empty while one runs


@dataclass(frozen=True)
class DeviceState:
    """One enrolled device; times are ms since 1970."""

    device_id: str
    user: str
    name: str
    enrolled_ms: int
    revoked_ms: int | None
    last_seen_ms: int | None
    online: bool


@dataclass(frozen=True)
class InviteCode:
    """What a device enrols with, once."""

    user: str
    code: str
    expires_ms: int


@dataclass(frozen=True)
class ServiceToken:
    """What a service shows to read everybody's adapters."""

    name: str
    token: str
    expires_ms: int


class Operator:
    """The operator's commands. Any of them may raise what :meth:`Caller.call` raises."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    @classmethod
    def open(cls, path: Path, *, timeout_s: float = TIMEOUT_S) -> Self:
        """By the ``operator.json`` that ``fedia3 coordinator init`` wrote.

        ``timeout_s`` is how long a command may take, its repeats included.

        Raises:
            NotFound: there is no such file.
            BadInput: it holds something else.
        """
        address, ca, token, key = _read(path)
        return cls(Caller(address, ca=ca, token=token, signing_key=key, timeout_s=timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._caller.close()

    @property
    def address(self) -> str:
        """``host:port`` of the coordinator."""
        return self._caller.address

    def status(self) -> CoordinatorStatus:
        """Rounds, devices, parts."""
        answer = self._caller.call("Admin/Status", pb.StatusRequest(), pb.StatusResponse)
        has_round = answer.round_num >= 0
        return CoordinatorStatus(
            version=answer.version,
            base_digest=answer.base_digest,
            paused=answer.paused,
            run_requested=answer.run_requested,
            round_num=answer.round_num if has_round else None,
            round_committed_ms=answer.round_committed_ms if has_round else None,
            round_metrics=dict(answer.round_metrics),
            devices=answer.devices,
            devices_online=answer.devices_online,
            parts=tuple(_part(part) for part in answer.parts),
            waiting_for=answer.waiting_for,
        )

    def pause(self) -> None:
        """Start no more rounds; the one in flight ends."""
        self._caller.call("Admin/Pause", pb.PauseRequest(), pb.PauseResponse)

    def resume(self) -> None:
        """Start rounds again."""
        self._caller.call("Admin/Resume", pb.ResumeRequest(), pb.ResumeResponse)

    def run_now(self) -> None:
        """One round as soon as enough devices are online, also while paused."""
        self._caller.call("Admin/RunNow", pb.RunNowRequest(), pb.RunNowResponse)

    def devices(self) -> Iterator[DeviceState]:
        """Every device in the order of enrolment, revoked ones too, page by page."""
        after = ""
        while True:
            request = pb.ListDevicesRequest(after=after, limit=PAGE)
            page = self._caller.call("Admin/ListDevices", request, pb.ListDevicesResponse).devices
            yield from map(_device, page)
            if len(page) < PAGE:
                return
            after = page[-1].device_id

    def revoke(self, device_id: str) -> None:
        """Shut a device out for good.

        Raises:
            NotFound: there is no such device.
        """
        request = pb.RevokeDeviceRequest(device_id=device_id)
        self._caller.call("Admin/RevokeDevice", request, pb.RevokeDeviceResponse)

    def invite(self, user: str) -> InviteCode:
        """A code with which one device of ``user`` may enrol."""
        answer = self._caller.call("Admin/Invite", pb.InviteRequest(user=user), pb.InviteResponse)
        return InviteCode(user, answer.code, answer.expires_ms)

    def issue_service_token(self, name: str, days: int) -> ServiceToken:
        """A token for a service that reads everybody's adapters; ``name`` is for the log.

        Raises:
            BadInput: ``days`` does not lie in 1 … 366.
        """
        request = pb.IssueServiceTokenRequest(name=name, days=days)
        answer = self._caller.call("Admin/IssueServiceToken", request, pb.IssueServiceTokenResponse)
        return ServiceToken(name, answer.token, answer.token_expires_ms)


def _read(path: Path) -> tuple[str, bytes, str, Ed25519PrivateKey]:
    """Address, CA, token and signing key."""
    try:
        fields = json.loads(path.read_bytes())
        key = Ed25519PrivateKey.from_private_bytes(b64decode(fields["signing_key"], validate=True))
        return str(fields["address"]), fields["ca"].encode(), str(fields["token"]), key
    except OSError as error:
        raise NotFound(
            f"cannot read {path} ({error.strerror}); `fedia3 coordinator init` writes it, name it "
            "where it lies"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path} is no operator's file (expected address, ca, token and signing_key); take the "
            "one that `fedia3 coordinator init` wrote"
        ) from error


def _part(part: pb.PartStatus) -> PartState:
    return PartState(part.name, part.state, part.pid or None, part.restarts, part.last_exit)


def _device(device: pb.Device) -> DeviceState:
    return DeviceState(
        device_id=device.device_id,
        user=device.user,
        name=device.name,
        enrolled_ms=device.enrolled_ms,
        revoked_ms=device.revoked_ms or None,
        last_seen_ms=device.last_seen_ms or None,
        online=device.online,
    )
