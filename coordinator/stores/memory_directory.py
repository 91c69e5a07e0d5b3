"""A directory that forgets at exit: the honest twin of the SQL one, for tests and trial runs."""

from collections.abc import Sequence
from dataclasses import replace
from threading import Lock

from fedia3.coordinator.directory import (
    FORGOTTEN,
    INVITE_KEPT_MS,
    TOKENS_OF_A_DEVICE,
    Device,
    Invite,
    OpenRound,
    Principal,
    RoundControl,
    Token,
    enrolled_before,
    no_device,
    replayed,
    require_invite,
    require_known_token,
)
from fedia3.coordinator.store import require_positive
from fedia3.errors import Conflict


class MemoryDirectory:
    """Dictionaries behind one lock; see :class:`fedia3.coordinator.directory.Directory`."""

    def __init__(self) -> None:
        self._devices: dict[str, Device] = {}  # in the order they were enrolled
        self._tokens: dict[bytes, Token] = {}
        self._invites: dict[bytes, Invite] = {}
        self._nonces: dict[tuple[str, bytes], int] = {}  # when each is forgotten
        self._control = RoundControl()
        self._lock = Lock()

    def add_invite(self, invite: Invite) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.add_invite`."""
        long_over = invite.expires_ms - INVITE_KEPT_MS
        with self._lock:
            self._invites = {k: i for k, i in self._invites.items() if i.expires_ms > long_over}
            self._invites[invite.code_sha256] = invite

    def invite(self, code_sha256: bytes, now_ms: int) -> Invite:
        """See :meth:`fedia3.coordinator.directory.Directory.invite`."""
        with self._lock:
            return require_invite(self._invites.get(code_sha256), now_ms)

    def enrol(self, invite: Invite, device: Device, token: Token, now_ms: int) -> Device:
        """See :meth:`fedia3.coordinator.directory.Directory.enrol`."""
        with self._lock:
            kept = require_invite(self._invites.get(invite.code_sha256), now_ms)
            alike = [known for known in self._devices.values() if _alike(known, device)]
            enrolled = enrolled_before(kept, device, alike) or replace(device, user=kept.user)
            self._devices[enrolled.device_id] = enrolled
            self._end_tokens(enrolled.device_id)
            self._tokens[token.sha256] = replace(token, principal=enrolled.device_id)
            self._invites[kept.code_sha256] = replace(kept, device_id=enrolled.device_id)
            return enrolled

    def add_token(self, token: Token) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.add_token`."""
        with self._lock:
            if token.kind == "device":
                device = self._device(token.principal)
                if device.revoked_ms is not None:
                    raise no_device(token.principal)
            if token.sha256 in self._tokens:
                raise Conflict("this token is there already; make a new one")
            self._tokens[token.sha256] = token
            if token.kind == "device":
                self._keep_last_tokens(token.principal)

    def principal(self, token_sha256: bytes, now_ms: int) -> Principal:
        """See :meth:`fedia3.coordinator.directory.Directory.principal`."""
        with self._lock:
            token = self._tokens.get(token_sha256)
            device = self._devices.get(token.principal) if token else None
            return require_known_token(token, device, token_sha256, now_ms)

    def use_nonce(self, principal: str, nonce: bytes, expires_ms: int, now_ms: int) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.use_nonce`."""
        with self._lock:
            self._nonces = {k: until for k, until in self._nonces.items() if until > now_ms}
            if (principal, nonce) in self._nonces:
                raise replayed()
            self._nonces[principal, nonce] = expires_ms

    def devices(self, after: str | None = None, limit: int = 100) -> tuple[Device, ...]:
        """See :meth:`fedia3.coordinator.directory.Directory.devices`."""
        require_positive(limit)
        with self._lock:
            known = list(self._devices)
            first = 0 if after is None else known.index(self._device(after).device_id) + 1
            return tuple(self._devices[device_id] for device_id in known[first : first + limit])

    def device(self, device_id: str) -> Device:
        """See :meth:`fedia3.coordinator.directory.Directory.device`."""
        with self._lock:
            return self._device(device_id)

    def enrolled(self) -> Sequence[Device]:
        """See :meth:`fedia3.coordinator.directory.Directory.enrolled`."""
        with self._lock:
            return tuple(d for d in self._devices.values() if d.revoked_ms is None)

    def revoke(self, device_id: str, now_ms: int) -> Device:
        """See :meth:`fedia3.coordinator.directory.Directory.revoke`."""
        with self._lock:
            device = self._device(device_id)
            if device.revoked_ms is None:
                device = self._devices[device_id] = replace(device, revoked_ms=now_ms)
            self._end_tokens(device_id)
            return device

    def devices_of(self, user: str) -> Sequence[Device]:
        """See :meth:`fedia3.coordinator.directory.Directory.devices_of`."""
        with self._lock:
            return tuple(d for d in self._devices.values() if d.user == user)

    def forget_user(self, user: str, now_ms: int) -> bool:
        """See :meth:`fedia3.coordinator.directory.Directory.forget_user`."""
        for device in self.devices_of(user):
            self.revoke(device.device_id, now_ms)
            with self._lock:
                revoked = self._devices[device.device_id]
                self._devices[device.device_id] = replace(revoked, user=FORGOTTEN, name=FORGOTTEN)
        with self._lock:
            self._invites = {k: i for k, i in self._invites.items() if i.user != user}
        return True

    def saw(self, device_ids: Sequence[str], now_ms: int) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.saw`."""
        with self._lock:
            for device_id in set(device_ids) & self._devices.keys():
                device = self._devices[device_id]
                self._devices[device_id] = replace(device, last_seen_ms=now_ms)

    def round_control(self) -> RoundControl:
        """See :meth:`fedia3.coordinator.directory.Directory.round_control`."""
        with self._lock:
            return self._control

    def set_paused(self, paused: bool) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.set_paused`."""
        with self._lock:
            self._control = replace(self._control, paused=paused)

    def request_run(self, now_ms: int) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.request_run`."""
        with self._lock:
            self._control = replace(self._control, run_requested_ms=now_ms)

    def run_started(self, requested_ms: int) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.run_started`."""
        with self._lock:
            asked = self._control.run_requested_ms
            if asked is not None and asked <= requested_ms:
                self._control = replace(self._control, run_requested_ms=None)

    def open_round(self, opened: OpenRound | None) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.open_round`."""
        with self._lock:
            self._control = replace(self._control, open_round=opened)

    def close(self) -> None:
        """Nothing to let go of."""

    def _device(self, device_id: str) -> Device:
        if device_id not in self._devices:
            raise no_device(device_id)
        return self._devices[device_id]

    def _end_tokens(self, device_id: str) -> None:
        for token in self._tokens_of(device_id):
            del self._tokens[token.sha256]

    def _keep_last_tokens(self, device_id: str) -> None:
        by_end = sorted(self._tokens_of(device_id), key=lambda token: token.expires_ms)
        for token in by_end[:-TOKENS_OF_A_DEVICE]:
            del self._tokens[token.sha256]

    def _tokens_of(self, device_id: str) -> list[Token]:
        every = self._tokens.values()
        return [t for t in every if (t.kind, t.principal) == ("device", device_id)]


def _alike(known: Device, device: Device) -> bool:
    return (
        known.device_id == device.device_id
        or known.signing_key == device.signing_key
        or known.node_key == device.node_key
    )
