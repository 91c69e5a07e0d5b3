"""The directory that lasts: SQLAlchemy tables, in the registry's database."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    Connection,
    ForeignKey,
    LargeBinary,
    Row,
    String,
    Text,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Mapped, mapped_column

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
from fedia3.coordinator.stores.engine import Database, Table, findable, retried

_DIRECTORY = "the directory"  # its writers come one after another


class DeviceRow(Table):
    """One enrolled device; numbers grow in the order of enrolment."""

    __tablename__ = "device"

    number: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[str] = mapped_column(String(64), unique=True)
    user_name: Mapped[str] = mapped_column(String(128))
    name: Mapped[str] = mapped_column(String(128))
    signing_key: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    node_key: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    enrolled_ms: Mapped[int] = mapped_column(BigInteger)
    revoked_ms: Mapped[int | None] = mapped_column(BigInteger)
    last_seen_ms: Mapped[int | None] = mapped_column(BigInteger)


class TokenRow(Table):
    """The sha256 of a token that its holder shows."""

    __tablename__ = "token"

    sha256: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    principal: Mapped[str] = mapped_column(String(128), index=True)
    expires_ms: Mapped[int] = mapped_column(BigInteger)
    signing_key: Mapped[bytes | None] = mapped_column(LargeBinary)


class InviteRow(Table):
    """The sha256 of a code with which one device may enrol."""

    __tablename__ = "invite"

    code_sha256: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    user_name: Mapped[str] = mapped_column(String(128))
    expires_ms: Mapped[int] = mapped_column(BigInteger)
    challenge: Mapped[bytes] = mapped_column(LargeBinary)
    device_id: Mapped[str | None] = mapped_column(
        ForeignKey("device.device_id", ondelete="RESTRICT")
    )


class NonceRow(Table):
    """A signed request's nonce, until nobody could send it again."""

    __tablename__ = "nonce"

    principal: Mapped[str] = mapped_column(String(128), primary_key=True)
    nonce: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    expires_ms: Mapped[int] = mapped_column(BigInteger, index=True)


class RoundControlRow(Table):
    """The operator's word; there is one row once there is any."""

    __tablename__ = "round_control"

    id: Mapped[int] = mapped_column(primary_key=True)  # 1
    paused: Mapped[bool]
    run_requested_ms: Mapped[int | None] = mapped_column(BigInteger)
    open_round: Mapped[str | None] = mapped_column(Text)  # JSON


class SqlDirectory:
    """The directory in a database; see :class:`fedia3.coordinator.directory.Directory`.

    All that it writes is about the directory, so its changes are decided on one after another.

    Its errors are :class:`fedia3.coordinator.stores.engine.Database`'s.
    """

    def __init__(self, url: str | URL) -> None:
        self._database = Database(url)

    @classmethod
    def at(cls, path: Path) -> "SqlDirectory":
        """The directory in this file, created where there is none."""
        return cls(Database.url_of(path))

    @retried
    def add_invite(self, invite: Invite) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.add_invite`."""
        long_over = invite.expires_ms - INVITE_KEPT_MS
        with self._database.writing(_DIRECTORY) as connection:
            connection.execute(delete(InviteRow).where(InviteRow.expires_ms <= long_over))
            connection.execute(insert(InviteRow).values(_invite_values(invite)))

    def invite(self, code_sha256: bytes, now_ms: int) -> Invite:
        """See :meth:`fedia3.coordinator.directory.Directory.invite`."""
        with self._database.reading() as connection:
            return require_invite(_find_invite(connection, code_sha256), now_ms)

    @retried
    def enrol(self, invite: Invite, device: Device, token: Token, now_ms: int) -> Device:
        """See :meth:`fedia3.coordinator.directory.Directory.enrol`."""
        with self._database.writing(_DIRECTORY) as connection:
            kept = require_invite(_find_invite(connection, invite.code_sha256), now_ms)
            enrolled = enrolled_before(kept, device, _alike(connection, device))
            if enrolled is None:
                enrolled = replace(device, user=kept.user)
                connection.execute(insert(DeviceRow).values(_device_values(enrolled)))
            _end_tokens(connection, enrolled.device_id)
            _insert_token(connection, replace(token, principal=enrolled.device_id))
            connection.execute(
                update(InviteRow)
                .where(InviteRow.code_sha256 == kept.code_sha256)
                .values(device_id=enrolled.device_id)
            )
            return enrolled

    @retried
    def add_token(self, token: Token) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.add_token`."""
        with self._database.writing(_DIRECTORY) as connection:
            if token.kind == "device":
                device = _find_device(connection, token.principal)
                if device is None or device.revoked_ms is not None:
                    raise no_device(token.principal)
            _insert_token(connection, token)
            if token.kind == "device":
                _keep_last_tokens(connection, token.principal)

    def principal(self, token_sha256: bytes, now_ms: int) -> Principal:
        """See :meth:`fedia3.coordinator.directory.Directory.principal`."""
        query = select(TokenRow.__table__).where(TokenRow.sha256 == token_sha256)
        with self._database.reading() as connection:
            row = connection.execute(query).one_or_none()
            token = None if row is None else _token(row)
            device = _find_device(connection, token.principal) if token else None
        return require_known_token(token, device, token_sha256, now_ms)

    @retried
    def use_nonce(self, principal: str, nonce: bytes, expires_ms: int, now_ms: int) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.use_nonce`."""
        used = select(NonceRow.expires_ms).where(
            NonceRow.principal == principal, NonceRow.nonce == nonce
        )
        with self._database.writing(_DIRECTORY) as connection:
            connection.execute(delete(NonceRow).where(NonceRow.expires_ms <= now_ms))
            if connection.execute(used).one_or_none() is not None:
                raise replayed()
            connection.execute(
                insert(NonceRow).values(principal=principal, nonce=nonce, expires_ms=expires_ms)
            )

    def devices(self, after: str | None = None, limit: int = 100) -> tuple[Device, ...]:
        """See :meth:`fedia3.coordinator.directory.Directory.devices`."""
        require_positive(limit)
        query = select(DeviceRow.__table__).order_by(DeviceRow.number).limit(limit)
        with self._database.reading() as connection:
            if after is not None:
                query = query.where(DeviceRow.number > _number_of(connection, after))
            return tuple(_device(row) for row in connection.execute(query))

    def device(self, device_id: str) -> Device:
        """See :meth:`fedia3.coordinator.directory.Directory.device`."""
        with self._database.reading() as connection:
            return _require_device(connection, device_id)

    def enrolled(self) -> Sequence[Device]:
        """See :meth:`fedia3.coordinator.directory.Directory.enrolled`."""
        query = select(DeviceRow.__table__).where(DeviceRow.revoked_ms.is_(None))
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(DeviceRow.number)).all()
        return tuple(_device(row) for row in rows)

    @retried
    def revoke(self, device_id: str, now_ms: int) -> Device:
        """See :meth:`fedia3.coordinator.directory.Directory.revoke`."""
        with self._database.writing(_DIRECTORY) as connection:
            connection.execute(
                update(DeviceRow)
                .where(DeviceRow.device_id == findable(device_id), DeviceRow.revoked_ms.is_(None))
                .values(revoked_ms=now_ms)
            )
            _end_tokens(connection, device_id)
            return _require_device(connection, device_id)

    def devices_of(self, user: str) -> Sequence[Device]:
        """See :meth:`fedia3.coordinator.directory.Directory.devices_of`."""
        query = select(DeviceRow.__table__).where(DeviceRow.user_name == findable(user))
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(DeviceRow.number)).all()
        return tuple(_device(row) for row in rows)

    @retried
    def forget_user(self, user: str, now_ms: int) -> bool:
        """See :meth:`fedia3.coordinator.directory.Directory.forget_user`."""
        user = findable(user)
        theirs = DeviceRow.user_name == user
        with self._database.writing(_DIRECTORY) as connection:
            for device_id in connection.scalars(select(DeviceRow.device_id).where(theirs)).all():
                _end_tokens(connection, device_id)
            connection.execute(delete(InviteRow).where(InviteRow.user_name == user))
            revoked_ms = func.coalesce(DeviceRow.revoked_ms, now_ms)
            forgotten = {"revoked_ms": revoked_ms, "user_name": FORGOTTEN, "name": FORGOTTEN}
            connection.execute(update(DeviceRow).where(theirs).values(forgotten))
        return self._database.empty_log()

    @retried
    def saw(self, device_ids: Sequence[str], now_ms: int) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.saw`."""
        if not device_ids:
            return
        seen = (
            update(DeviceRow)
            .where(DeviceRow.device_id == bindparam("seen_id"))
            .values(last_seen_ms=now_ms)
        )
        with self._database.writing(_DIRECTORY) as connection:
            connection.execute(seen, [{"seen_id": findable(device_id)} for device_id in device_ids])

    def round_control(self) -> RoundControl:
        """See :meth:`fedia3.coordinator.directory.Directory.round_control`."""
        with self._database.reading() as connection:
            return _control(connection)

    @retried
    def set_paused(self, paused: bool) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.set_paused`."""
        with self._database.writing(_DIRECTORY) as connection:
            _set_control(connection, replace(_control(connection), paused=paused))

    @retried
    def request_run(self, now_ms: int) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.request_run`."""
        with self._database.writing(_DIRECTORY) as connection:
            _set_control(connection, replace(_control(connection), run_requested_ms=now_ms))

    @retried
    def run_started(self, requested_ms: int) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.run_started`."""
        with self._database.writing(_DIRECTORY) as connection:
            control = _control(connection)
            if control.run_requested_ms is not None and control.run_requested_ms <= requested_ms:
                _set_control(connection, replace(control, run_requested_ms=None))

    @retried
    def open_round(self, opened: OpenRound | None) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.open_round`."""
        with self._database.writing(_DIRECTORY) as connection:
            _set_control(connection, replace(_control(connection), open_round=opened))

    def close(self) -> None:
        """See :meth:`fedia3.coordinator.directory.Directory.close`."""
        self._database.close()


def _find_invite(connection: Connection, code_sha256: bytes) -> Invite | None:
    query = select(InviteRow.__table__).where(InviteRow.code_sha256 == code_sha256)
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    return Invite(row.code_sha256, row.user_name, row.expires_ms, row.challenge, row.device_id)


def _alike(connection: Connection, device: Device) -> list[Device]:
    """The devices that have this one's id or one of its keys."""
    query = select(DeviceRow.__table__).where(
        or_(
            DeviceRow.device_id == device.device_id,
            DeviceRow.signing_key == device.signing_key,
            DeviceRow.node_key == device.node_key,
        )
    )
    return [_device(row) for row in connection.execute(query)]


def _find_device(connection: Connection, device_id: str) -> Device | None:
    query = select(DeviceRow.__table__).where(DeviceRow.device_id == findable(device_id))
    row = connection.execute(query).one_or_none()
    return None if row is None else _device(row)


def _require_device(connection: Connection, device_id: str) -> Device:
    if (device := _find_device(connection, device_id)) is None:
        raise no_device(device_id)
    return device


def _number_of(connection: Connection, device_id: str) -> int:
    query = select(DeviceRow.number).where(DeviceRow.device_id == findable(device_id))
    if (number := connection.execute(query).scalar_one_or_none()) is None:
        raise no_device(device_id)
    return number


def _insert_token(connection: Connection, token: Token) -> None:
    connection.execute(insert(TokenRow).values(**vars(token)))


def _end_tokens(connection: Connection, device_id: str) -> None:
    connection.execute(
        delete(TokenRow).where(TokenRow.kind == "device", TokenRow.principal == findable(device_id))
    )


def _keep_last_tokens(connection: Connection, device_id: str) -> None:
    of_device = (TokenRow.kind == "device", TokenRow.principal == findable(device_id))
    by_end = select(TokenRow.sha256).where(*of_device).order_by(TokenRow.expires_ms.desc())
    kept = by_end.limit(TOKENS_OF_A_DEVICE)
    connection.execute(delete(TokenRow).where(*of_device, TokenRow.sha256.not_in(kept)))


def _control(connection: Connection) -> RoundControl:
    row = connection.execute(select(RoundControlRow.__table__)).one_or_none()
    if row is None:
        return RoundControl()
    opened = None if row.open_round is None else _open_round(row.open_round)
    return RoundControl(row.paused, row.run_requested_ms, opened)


def _set_control(connection: Connection, control: RoundControl) -> None:
    opened = None if control.open_round is None else json.dumps(vars(control.open_round))
    connection.execute(delete(RoundControlRow))
    connection.execute(
        insert(RoundControlRow).values(
            id=1,
            paused=control.paused,
            run_requested_ms=control.run_requested_ms,
            open_round=opened,
        )
    )


def _open_round(text: str) -> OpenRound:
    fields = json.loads(text)
    return OpenRound(fields["round_num"], tuple(fields["cohort"]), fields["until_ms"])


def _invite_values(invite: Invite) -> dict[str, object]:
    fields = dict(vars(invite))
    return {"user_name": fields.pop("user"), **fields}


def _device_values(device: Device) -> dict[str, object]:
    fields = dict(vars(device))
    return {"user_name": fields.pop("user"), **fields}


def _device(row: Row[Any]) -> Device:  # Any: rows are read by name
    return Device(
        device_id=row.device_id,
        user=row.user_name,
        name=row.name,
        signing_key=row.signing_key,
        node_key=row.node_key,
        enrolled_ms=row.enrolled_ms,
        revoked_ms=row.revoked_ms,
        last_seen_ms=row.last_seen_ms,
    )


def _token(row: Row[Any]) -> Token:  # Any: rows are read by name
    return Token(row.sha256, row.kind, row.principal, row.expires_ms, row.signing_key)
