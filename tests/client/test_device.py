"""A device's state folder: what it keeps, who may read it, who may use it."""

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedia3.client.device import DeviceFolder, Enrolment
from fedia3.errors import BadInput, BadSetting, Conflict, NotFound

ENROLMENT = Enrolment(
    address="home:8443",
    fleet_address="home:8444",
    device_id="ab" * 16,
    user="ann",
    name="Ann's phone",
    token="secret",
    token_issued_ms=1000,
    token_expires_ms=2000,
    coordinator_keys=(b"k" * 32,),
    base_digest="cd" * 32,
)


def mode(path: Path) -> int:
    """The permissions' bits."""
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def folder(tmp_path: Path) -> DeviceFolder:
    """A state folder that is not there yet."""
    return DeviceFolder(tmp_path / "state")


def test_what_is_kept_comes_back(folder: DeviceFolder):
    """
    An enrolment read is the one that was written, its keys in bytes.
    """
    folder.keep(ENROLMENT, b"pem")
    assert folder.enrolment() == ENROLMENT
    assert folder.ca() == b"pem"


def test_nothing_is_made_by_looking(folder: DeviceFolder):
    """
    Asking whether a device is enrolled leaves no folder behind.
    """
    assert not folder.is_enrolled
    with pytest.raises(NotFound, match="fedia3 client enroll"):
        folder.enrolment()
    assert not folder.path.exists()


def test_only_the_owner_reads_it(folder: DeviceFolder):
    """
    Files are 0600 and the folder 0700.
    """
    folder.made_keys()
    folder.keep(ENROLMENT, b"pem")
    assert mode(folder.path) == 0o700
    assert {mode(path) for path in folder.path.iterdir()} == {0o600}


def test_keys_are_made_once(folder: DeviceFolder):
    """
    Asked again, the same keys come back; asked for new ones, others.
    """
    first, second = folder.made_keys(), folder.made_keys()
    assert first.signing_public == second.signing_public
    assert first.node_public == second.node_public
    folder.replace_keys()
    assert folder.keys().signing_public != first.signing_public


def test_the_node_key_is_what_flower_reads(folder: DeviceFolder):
    """
    The private key is in OpenSSH's form, and the public one is the PEM that Flower sends.
    """
    keys = folder.made_keys()
    private = load_ssh_private_key(folder.node_key_file.read_bytes(), None)
    from flwr.supercore.primitives.asymmetric import (  # noqa: PLC0415 - seconds
        public_key_to_bytes,
    )

    assert public_key_to_bytes(private.public_key()) == keys.node_public


def test_a_half_written_pair_of_keys_does_not_count(folder: DeviceFolder):
    """
    A node key without its signing key is what a crash leaves; both are made anew.
    """
    old = folder.made_keys()
    (folder.path / "signing.key").unlink()
    assert folder.made_keys().node_public != old.node_public


def test_a_damaged_file_says_what_to_do(folder: DeviceFolder):
    """
    A device.json that is no JSON, and a key that is no key, are named.
    """
    folder.write("device.json", b"{")
    folder.write("signing.key", b"x")
    folder.write("node.key", b"x")
    with pytest.raises(BadInput, match=r"device\.json.*--state"):
        folder.enrolment()
    with pytest.raises(BadInput, match="a key in"):
        folder.keys()


def test_one_agent_at_a_time(folder: DeviceFolder):
    """
    A second agent of the same folder is refused while the first runs, and let in after it.
    """
    with folder.locked(), pytest.raises(Conflict, match="another agent"), folder.locked():
        pass
    with folder.locked():
        pass


def test_somebody_elses_folder_is_left_alone(tmp_path: Path):
    """
    A folder that others read and that serves something else is neither closed nor filled.
    """
    (tmp_path / "photos").mkdir()
    tmp_path.chmod(0o755)
    with pytest.raises(BadSetting, match="photos"):
        DeviceFolder(tmp_path).made_keys()
    assert mode(tmp_path) == 0o755


def test_an_empty_open_folder_is_closed(tmp_path: Path):
    """
    What `mkdir` made for the purpose is taken, and its permissions put right.
    """
    tmp_path.chmod(0o755)
    DeviceFolder(tmp_path).made_keys()
    assert mode(tmp_path) == 0o700


def test_a_token_is_renewed_at_half_its_life(folder: DeviceFolder):
    """
    Issued at 1000 and over at 2000: half is over behind 1500.
    """
    assert not ENROLMENT.needs_renewal(1500)
    assert ENROLMENT.needs_renewal(1501)
