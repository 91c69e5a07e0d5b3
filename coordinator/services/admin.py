"""``fedia3.v1.Admin``: the operator looks, stops and starts rounds, lets devices in and out."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from fedia3.coordinator.directory import Device, Directory, Invite, Token
from fedia3.coordinator.last_seen import is_online
from fedia3.coordinator.operator import PartState
from fedia3.coordinator.records import checked_name
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.services.calls import Caller, Clock, Handlers
from fedia3.coordinator.services.enrolment import NodeRegistrar
from fedia3.coordinator.tokens import (
    DAY_MS,
    INVITE_MS,
    code_sha256,
    new_code,
    new_token,
    token_sha256,
)
from fedia3.errors import BadInput, Unreachable
from fedia3.proto import admin_pb2 as pb

log = logging.getLogger(__name__)

MAX_PAGE, PAGE = 1000, 100
MAX_TOKEN_DAYS = 366


@dataclass(frozen=True)
class Supervision:
    """What the coordinator's supervisor and scheduler last wrote down."""

    parts: tuple[PartState, ...] = ()
    waiting_for: str = ""  # why the next round has not started; empty while one runs


class AdminService:
    """The operator's calls.

    Args:
        supervision: reads what the supervisor and the scheduler last wrote down.
    """

    def __init__(
        self,
        registry: Registry,
        directory: Directory,
        registrar: NodeRegistrar,
        supervision: Callable[[], Supervision],
        base_digest: str,
        now_ms: Clock,
    ) -> None:
        self._registry, self._directory, self._registrar = registry, directory, registrar
        self._supervision, self._base_digest, self._now_ms = supervision, base_digest, now_ms

    @property
    def handlers(self) -> Handlers:
        """This service's methods by path."""
        return {
            "/fedia3.v1.Admin/Status": self.status,
            "/fedia3.v1.Admin/Pause": self.pause,
            "/fedia3.v1.Admin/Resume": self.resume,
            "/fedia3.v1.Admin/RunNow": self.run_now,
            "/fedia3.v1.Admin/ListDevices": self.list_devices,
            "/fedia3.v1.Admin/RevokeDevice": self.revoke_device,
            "/fedia3.v1.Admin/Invite": self.invite,
            "/fedia3.v1.Admin/IssueServiceToken": self.issue_service_token,
        }

    def status(self, _request: pb.StatusRequest, _caller: Caller) -> pb.StatusResponse:
        """How the coordinator is: rounds, devices, parts."""
        control, supervision = self._directory.round_control(), self._supervision()
        enrolled, now_ms = self._directory.enrolled(), self._now_ms()
        answer = pb.StatusResponse(
            version=version("fedia3"),
            base_digest=self._base_digest,
            paused=control.paused,
            run_requested=control.run_requested_ms is not None,
            round_num=-1,
            devices=len(enrolled),
            devices_online=sum(is_online(device.last_seen_ms, now_ms) for device in enrolled),
            parts=[_part(state) for state in supervision.parts],
            waiting_for=supervision.waiting_for,
        )
        self._tell_round(answer)
        return answer

    def pause(self, _request: pb.PauseRequest, _caller: Caller) -> pb.PauseResponse:
        """Start no more rounds; the one in flight ends."""
        self._directory.set_paused(True)
        log.info("the operator paused the rounds")
        return pb.PauseResponse()

    def resume(self, _request: pb.ResumeRequest, _caller: Caller) -> pb.ResumeResponse:
        """Start rounds again."""
        self._directory.set_paused(False)
        log.info("the operator resumed the rounds")
        return pb.ResumeResponse()

    def run_now(self, _request: pb.RunNowRequest, _caller: Caller) -> pb.RunNowResponse:
        """Ask for one round as soon as enough devices are online."""
        self._directory.request_run(self._now_ms())
        log.info("the operator asked for a round")
        return pb.RunNowResponse()

    def list_devices(
        self, request: pb.ListDevicesRequest, _caller: Caller
    ) -> pb.ListDevicesResponse:
        """A page of devices in the order they were enrolled, revoked ones too."""
        if not 0 <= request.limit <= MAX_PAGE:
            raise BadInput(f"a page holds 1 to {MAX_PAGE} devices, got limit {request.limit}")
        devices = self._directory.devices(request.after or None, request.limit or PAGE)
        now_ms = self._now_ms()
        return pb.ListDevicesResponse(devices=[_device(device, now_ms) for device in devices])

    def revoke_device(
        self, request: pb.RevokeDeviceRequest, _caller: Caller
    ) -> pb.RevokeDeviceResponse:
        """Shut a device out for good.

        The directory decides and is told first: without Flower's answer the device is out as well.
        """
        device = self._directory.revoke(request.device_id, self._now_ms())
        log.info("the operator shut device %s out", device.device_id)
        try:
            self._registrar.unregister(device.device_id)
        except Unreachable as error:
            log.warning("Flower still lists device %s: %s", device.device_id, error)
        return pb.RevokeDeviceResponse()

    def invite(self, request: pb.InviteRequest, _caller: Caller) -> pb.InviteResponse:
        """Make a single-use code with which one device of the user may enrol."""
        user = checked_name(request.user, "a user's name")
        code, expires_ms = new_code(), self._now_ms() + INVITE_MS
        self._directory.add_invite(Invite(code_sha256(code), user, expires_ms, os.urandom(32)))
        log.info("the operator invited a device")
        return pb.InviteResponse(code=code, expires_ms=expires_ms)

    def issue_service_token(
        self, request: pb.IssueServiceTokenRequest, _caller: Caller
    ) -> pb.IssueServiceTokenResponse:
        """Make a token for a service that reads everybody's adapters."""
        name = checked_name(request.name, "a service's name")
        if not 1 <= request.days <= MAX_TOKEN_DAYS:
            raise BadInput(f"a token lasts 1 to {MAX_TOKEN_DAYS} days, got {request.days}")
        text, expires_ms = new_token("service"), self._now_ms() + request.days * DAY_MS
        self._directory.add_token(Token(token_sha256(text), "service", name, expires_ms))
        log.info("the operator issued a token for service %r", name)
        return pb.IssueServiceTokenResponse(token=text, token_expires_ms=expires_ms)

    def _tell_round(self, answer: pb.StatusResponse) -> None:
        if (last := self._registry.latest_round()) is None:
            return
        answer.round_num = last.round_num
        answer.round_committed_ms = round(last.committed_at.timestamp() * 1000)
        answer.round_metrics.update(last.metrics)


def _part(state: PartState) -> pb.PartStatus:
    return pb.PartStatus(
        name=state.name,
        state=state.state,
        pid=state.pid or 0,
        restarts=state.restarts,
        last_exit=state.last_exit,
    )


def _device(device: Device, now_ms: int) -> pb.Device:
    return pb.Device(
        device_id=device.device_id,
        user=device.user,
        name=device.name,
        enrolled_ms=device.enrolled_ms,
        revoked_ms=device.revoked_ms or 0,
        last_seen_ms=device.last_seen_ms or 0,
        online=device.revoked_ms is None and is_online(device.last_seen_ms, now_ms),
    )
