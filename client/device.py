"""A device's state folder: who it is, its keys, and where everything else of it lies.

    device.json    who this device is to its coordinator; none before it is enrolled
    ca.pem         who signs the coordinator's certificates
    signing.key    Ed25519, signs requests
    node.key       P-384 in OpenSSH's form, the device's identity towards Flower
    adapters/      verified adapters, see fedia3.client.cache
    personal/      the owner's own parts
    trainer.sock, status.json, control.json, logs/   of a running agent

Only its owner reads it: files 0600, folders 0700. Whatever is replaced is replaced whole.
"""

import fcntl
import json
import os
import re
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from fedia3.adapters.base_store import default_home
from fedia3.adapters.encoding import SHA256_HEX
from fedia3.errors import BadInput, BadSetting, Conflict, NotFound
from fedia3.private_files import write_private
from fedia3.proto.caller import checked_address

KEY = 32  # bytes of an Ed25519 key
MAX_NAME = 128  # characters
_DEVICE_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_TOKEN = re.compile(r"[!-~]{1,512}", re.ASCII)

_OURS = {
    *("device.json", "ca.pem", "signing.key", "node.key", "adapters", "personal", "agent.lock"),
    *("status.json", "control.json", "bytes.json", "logs", "flwr", "gateway.pem", "gateway.key"),
    *("trainer.json", "trainer.sock", "trainer.sock.at", "trainer-parts.json"),
    *("flower-parts.json", "superexec.secret"),
}


@dataclass(frozen=True)
class Enrolment:
    """Who a device is to its coordinator; times are ms since 1970.

    Most of it is the coordinator's word, and parts become paths, arguments and headers.

    Raises:
        BadInput: something cannot be what it stands for.
    """

    address: str  # host:port of the coordinator
    fleet_address: str  # host:port of the Flower fleet
    device_id: str  # 32 hex digits; also its name in rounds
    user: str  # whose text it learns from
    name: str  # what its owner calls it
    token: str
    token_issued_ms: int
    token_expires_ms: int
    coordinator_keys: tuple[bytes, ...]  # Ed25519, raw; sign manifests and records
    base_digest: str  # of the base model that rounds train

    def __post_init__(self) -> None:
        checked_address(self.address)
        checked_address(self.fleet_address)
        is_sound = {
            "device id": _DEVICE_ID.fullmatch(self.device_id),
            "base model": SHA256_HEX.fullmatch(self.base_digest),
            "token": _TOKEN.fullmatch(self.token),
            "user": self.user.isprintable() and 0 < len(self.user) <= MAX_NAME,
            "keys": self.coordinator_keys and all(len(k) == KEY for k in self.coordinator_keys),
        }
        if unsound := [name for name, holds in is_sound.items() if not holds]:
            raise BadInput(
                f"what {self.address} says of this device cannot be used ({', '.join(unsound)}); "
                "tell its operator"
            )

    def needs_renewal(self, now_ms: int) -> bool:
        """Whether half of the token's life is over."""
        return now_ms > (self.token_issued_ms + self.token_expires_ms) // 2


@dataclass(frozen=True)
class DeviceKeys:
    """What proves that a device is itself."""

    signing: Ed25519PrivateKey
    node: ec.EllipticCurvePrivateKey

    @property
    def signing_public(self) -> bytes:
        """Raw, 32 bytes."""
        return self.signing.public_key().public_bytes_raw()

    @property
    def node_public(self) -> bytes:
        """PEM, byte for byte what Flower's ``flwr-public-key`` header carries."""
        return self.node.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class DeviceFolder:
    """The state folder of one device, by default ``client`` in fedia3's home.

    Nothing is created before something is written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_home() / "client"

    @property
    def adapters(self) -> Path:
        """Verified adapters."""
        return self.path / "adapters"

    @property
    def personal(self) -> Path:
        """The owner's own parts."""
        return self.path / "personal"

    @property
    def status_file(self) -> Path:
        """What the agent is doing."""
        return self.path / "status.json"

    @property
    def control_file(self) -> Path:
        """What the owner wants of the agent."""
        return self.path / "control.json"

    @property
    def logs(self) -> Path:
        """What the agent's processes print."""
        return self.path / "logs"

    @property
    def node_key_file(self) -> Path:
        """The key that ``flower-supernode --auth-supernode-private-key`` reads."""
        return self.path / "node.key"

    @property
    def ca_file(self) -> Path:
        """PEM of who signs the coordinator's certificates."""
        return self.path / "ca.pem"

    @property
    def is_enrolled(self) -> bool:
        """Whether the device belongs to a coordinator."""
        return self._device_file.exists()

    def enrolment(self) -> Enrolment:
        """Who this device is.

        Raises:
            NotFound: it is not enrolled.
            BadInput: what is kept about it cannot be read.
        """
        try:
            fields = json.loads(self._device_file.read_bytes())
            keys = tuple(b64decode(key, validate=True) for key in fields["coordinator_keys"])
            return Enrolment(**fields | {"coordinator_keys": keys})
        except FileNotFoundError as error:
            raise NotFound(
                f"{self.path} holds no enrolled device; ask the coordinator's operator for a code "
                "and run `fedia3 client enroll HOST:PORT CODE --ca ca.pem`"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{self._device_file} cannot be read ({error}); restore it, or enrol anew with "
                "another --state folder"
            ) from error

    def ca(self) -> bytes:
        """PEM of who signs the coordinator's certificates.

        Raises:
            NotFound: it is not enrolled.
        """
        return _read(self.ca_file)

    def keys(self) -> DeviceKeys:
        """The device's keys.

        Raises:
            NotFound: there are none.
            BadInput: a file holds something else.
        """
        try:
            signing = load_pem_private_key(_read(self._signing_key_file), None)
            node = load_ssh_private_key(_read(self.node_key_file), None)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise BadInput(
                f"a key in {self.path} cannot be read ({error}); restore it, or enrol anew with "
                "another --state folder"
            ) from error
        if not isinstance(signing, Ed25519PrivateKey) or not isinstance(
            node, ec.EllipticCurvePrivateKey
        ):
            raise BadInput(f"a key in {self.path} is of another kind than expected")
        return DeviceKeys(signing, node)

    def made_keys(self) -> DeviceKeys:
        """The device's keys, made and written down where there are none yet."""
        if not self._signing_key_file.exists():
            self.replace_keys()
        return self.keys()

    def replace_keys(self) -> None:
        """Make new keys; the signing key is written last, so that both are there or none counts."""
        node, signing = ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate()
        self._signing_key_file.unlink(missing_ok=True)
        self.write("node.key", _private(node, PrivateFormat.OpenSSH))
        self.write("signing.key", _private(signing, PrivateFormat.PKCS8))

    def keep(self, enrolment: Enrolment, ca: bytes | None = None) -> None:
        """Write down who this device is; with ``ca``, also whom it trusts."""
        if ca is not None:
            self.write("ca.pem", ca)
        keys = [b64encode(key).decode() for key in enrolment.coordinator_keys]
        fields = asdict(enrolment) | {"coordinator_keys": keys}
        self.write("device.json", json.dumps(fields, indent=1).encode())

    def write(self, name: str, data: bytes) -> None:
        """Put a file into the folder, whole or not at all, for its owner only.

        Raises:
            BadSetting: the folder cannot be made, or serves something else.
            StorageFailed: the disk refused.
        """
        self._make()
        write_private(self.path / name, data)

    def make(self) -> None:
        """Have the folder, for its owner only.

        Raises:
            BadSetting: it cannot be made, or serves something else.
        """
        self._make()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only agent of this folder.

        Raises:
            Conflict: another one runs.
        """
        self._make()
        descriptor = os.open(self.path / "agent.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise Conflict(
                f"another agent works with {self.path}; stop it, or name another --state folder"
            ) from error
        try:
            yield
        finally:
            os.close(descriptor)

    @property
    def _device_file(self) -> Path:
        return self.path / "device.json"

    @property
    def _signing_key_file(self) -> Path:
        return self.path / "signing.key"

    def _make(self) -> None:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.path.stat().st_mode & 0o077:
                self._close_to_others()
        except OSError as error:
            raise BadSetting(
                f"cannot keep a device in {self.path} ({error.strerror}); name a folder of yours "
                "with --state"
            ) from error

    def _close_to_others(self) -> None:
        """Only a folder that serves nothing else: it may be somebody's home."""
        others = {path.name for path in self.path.iterdir()} - _OURS
        if others and not self._signing_key_file.exists():
            raise BadSetting(
                f"{self.path} holds other things ({', '.join(sorted(others)[:3])}) and others may "
                "read it; name a new folder with --state"
            )
        self.path.chmod(0o700)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFound(
            f"cannot read {path} ({error.strerror}); is this device enrolled?"
        ) from error


def _private(key: Any, form: PrivateFormat) -> bytes:
    pem: bytes = key.private_bytes(Encoding.PEM, form, NoEncryption())
    return pem
