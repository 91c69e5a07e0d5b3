"""A new coordinator: settings, authority, keys, database and the operator's file, in one folder."""

import fcntl
import json
import os
import secrets
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.manifest import read_manifest
from fedia3.coordinator.certificates import (
    Issued,
    is_due,
    key_pem,
    make_authority,
    make_server_certificate,
)
from fedia3.coordinator.config import (
    DATABASE_VARIABLE,
    FILE_NAME,
    CoordinatorConfig,
    read_config,
)
from fedia3.coordinator.directory import Token, open_directory
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.tokens import new_token, token_sha256
from fedia3.errors import BadSetting, Conflict, Corrupt, NotFound
from fedia3.private_files import write_private

OPERATOR_LASTS = timedelta(days=3650)
SETTINGS = """\
# A fedia3 coordinator. Everything it keeps lies in this folder; docs/deploy.md says what is what.
# A key that is not known is an error. What stands behind # is the default.

[coordinator]
# Names and addresses that devices reach this machine by. The first is handed out at enrolment, and
# the servers' certificate speaks for all of them; it is made anew when the coordinator starts with
# another list.
hosts = {hosts}

# The base model whose adapters the rounds train: {base_name}. `fedia3 base list` shows what there
# is. It stays the same for as long as this coordinator lives.
base = "{base}"

# Where it listens: "127.0.0.1" for this machine alone. Open the first two ports to the devices.
bind = "{bind}"
grpc_port = {grpc_port}
fleet_port = {fleet_port}
# Flower's SuperLink, always on 127.0.0.1. Never open it: it asks nobody who they are.
superlink_port = {superlink_port}

[registry]
# Where versions, rounds, devices and tokens are kept: "" for registry/registry.db, or a PostgreSQL
# database such as "postgresql://role@host/fedia3". Keep the password in ~/.pgpass, or the whole URL
# in the environment variable FEDIA3_DATABASE_URL, which counts before this line. Adapters' bytes
# are files in registry/blobs/ in any case.
#database = ""

[rounds]
# Seconds from the end of a round to the start of the next; 0 runs them back to back.
#every_s = 0.0
# Devices asked in a round; as many of those online as there are, where there are fewer.
#cohort = 100
# Devices that have to be online before a round starts.
#min_clients = 2
# Usable updates without which a round changes nothing.
#quorum = 2
# Seconds that a round waits for its devices.
#deadline_s = 600.0
# Draws the cohorts and seeds the devices' training.
#seed = 0
# Rounds of one Flower run: 20 back to back, else 1.
#rounds_per_run = 20

[training]
# What a device does in a round.
#learning_rate = 0.03
#epochs = 1
#max_steps = 100
#batch_size = 8
#warmup_steps = 2
#clip_norm = 1.0
#weight_decay = 0.0
#max_length = 128

[limits]
# How far one device may pull everyone's adapter: a larger update is refused, a larger weight cut.
#max_norm = 100.0
#max_examples = 10000
"""


@dataclass(frozen=True)
class Setting:
    """What a new coordinator is told."""

    hosts: Sequence[str]
    base: str = "tiny"  # name, digest or folder
    bind: str = "0.0.0.0"
    grpc_port: int = 8443
    fleet_port: int = 8444
    superlink_port: int = 8441


def set_up(
    folder: Path, setting: Setting, now: datetime, *, force: bool = False
) -> CoordinatorConfig:
    """Make ``folder`` a coordinator's; its settings.

    With ``force`` what an older coordinator kept there is moved into a folder inside: nothing is
    lost, but its devices are strangers to the new one.

    Where the environment names a database, rows are kept there and the settings say so.

    Raises:
        Conflict: the folder or the database holds a coordinator already.
        BadSetting: a setting is outside its range, the folder cannot be written, or the database
            not be opened.
        NotFound: there is no such base model.
        StorageFailed: the disk refused.
    """
    if database := os.environ.get(DATABASE_VARIABLE):
        from fedia3.coordinator.stores.copy import require_empty  # noqa: PLC0415  # SQLAlchemy

        require_empty(database)
    text = _settings(setting, database or None)
    _make_room(folder, now, force=force)
    write_private(folder / FILE_NAME, text.encode())
    config = read_config(folder)
    _make_keys(config, now)
    renew_certificate(config, now)
    _make_operator(config, now)
    return config


def renew_certificate(config: CoordinatorConfig, now: datetime) -> bool:
    """Make the servers' certificate anew if it is due; whether it was.

    Raises:
        NotFound: the authority's files are not there.
        StorageFailed: the disk refused.
    """
    hosts = config.coordinator.hosts
    if config.certificate.exists() and not is_due(config.certificate.read_bytes(), hosts, now):
        return False
    try:
        authority = Issued(config.ca.read_bytes(), config.ca_key.read_bytes())
    except OSError as error:
        raise NotFound(
            f"the servers' certificate is due, but {error.filename} cannot be read "
            f"({error.strerror}); restore it from a backup"
        ) from error
    made = make_server_certificate(authority, hosts, now)
    write_private(config.certificate_key, made.key)
    write_private(config.certificate, made.certificate)
    return True


def read_signing_key(path: Path) -> Ed25519PrivateKey:
    """The key that signs manifests and adapter records.

    Raises:
        NotFound: there is no such file.
        Corrupt: it holds something else.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise NotFound(
            f"cannot read {path} ({error.strerror}); restore it from a backup"
        ) from error
    except ValueError as error:
        raise Corrupt(f"{path} holds no private key; restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise Corrupt(f"{path} holds a {type(key).__name__}, not an Ed25519 key")
    return key


def _make_room(folder: Path, now: datetime, *, force: bool) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise BadSetting(
            f"cannot keep a coordinator in {folder}: {error.strerror}; choose a folder you can "
            "write"
        ) from error
    if not (folder / FILE_NAME).exists():
        return
    if not force:
        raise Conflict(
            f"{folder} holds a coordinator already; `fedia3 coordinator serve --config "
            f"{folder / FILE_NAME}` runs it, --force begins anew and moves what is there aside"
        )
    with serving_alone(folder):
        _set_aside(folder, folder / f"old-{now:%Y%m%d-%H%M%S}")


def _set_aside(folder: Path, aside: Path) -> None:
    aside.mkdir(mode=0o700)
    for path in folder.iterdir():
        if not path.name.startswith("old-"):
            path.rename(aside / path.name)


@contextmanager
def serving_alone(folder: Path) -> Iterator[None]:
    """Hold a coordinator's folder; it is let go of when the block is left or the process dies.

    Raises:
        Conflict: a coordinator is being served from it.
    """
    lock = os.open(folder / "serve.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise Conflict(f"a coordinator is being served from {folder} already; stop it") from error
    finally:
        os.close(lock)


def _settings(setting: Setting, database: str | None) -> str:
    base = BaseStore().find(setting.base)
    manifest = read_manifest(base)
    bad = [host for host in setting.hosts if not host or any(c in host for c in ' "\\/\n')]
    if bad:
        raise BadSetting(f"a host is a name or an address, got {bad[0]!r}")
    text = SETTINGS.format(
        hosts=json.dumps(list(setting.hosts)),
        base=manifest.digest if _is_kept(manifest.digest) else base.resolve(),
        base_name=manifest.name,
        bind=setting.bind,
        grpc_port=setting.grpc_port,
        fleet_port=setting.fleet_port,
        superlink_port=setting.superlink_port,
    )
    if database is None:
        return text
    return text.replace('#database = ""', f"database = {json.dumps(_without_password(database))}")


def _without_password(url: str) -> str:
    """Which database it is, so that a start without the environment does not begin another one."""
    parts = urlsplit(url)
    query = parse_qsl(parts.query)
    if parts.password is None and "password" not in dict(query):
        return url
    user, at, host = parts.netloc.rpartition("@")
    kept = urlencode([(key, value) for key, value in query if key != "password"])
    return parts._replace(netloc=user.partition(":")[0] + at + host, query=kept).geturl()


def _is_kept(digest: str) -> bool:
    """Whether the base is among this machine's own, found by its digest alone."""
    return any(entry.digest == digest for entry in BaseStore().list())


def _make_keys(config: CoordinatorConfig, now: datetime) -> None:
    authority = make_authority(now)
    write_private(config.ca_key, authority.key)
    write_private(config.ca, authority.certificate)
    write_private(config.signing_key, key_pem(Ed25519PrivateKey.generate()))
    write_private(config.superexec_secret, secrets.token_hex(32).encode())


def _make_operator(config: CoordinatorConfig, now: datetime) -> None:
    """The operator's file, and in the directory only what checks it."""
    token, key = new_token("admin"), Ed25519PrivateKey.generate()
    expires_ms = int((now + OPERATOR_LASTS).timestamp() * 1000)
    Registry.open(config.registry, config.database).close()
    directory = open_directory(config.registry, config.database)
    try:
        directory.add_token(
            Token(
                token_sha256(token),
                "admin",
                "operator",
                expires_ms,
                key.public_key().public_bytes_raw(),
            )
        )
    finally:
        directory.close()
    facts = {
        "address": config.address,
        "ca": config.ca.read_text(),
        "token": token,
        "signing_key": b64encode(key.private_bytes_raw()).decode(),
    }
    write_private(config.operator, json.dumps(facts, indent=1).encode())
