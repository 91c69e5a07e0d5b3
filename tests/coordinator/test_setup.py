"""A new coordinator's folder: what is in it, who may read it, and what it will not overwrite."""

import contextlib
import json
import os
import tomllib
from base64 import b64decode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.manifest import read_manifest
from fedia3.coordinator.blobs import FileBlobs
from fedia3.coordinator.config import config_of, read_config
from fedia3.coordinator.directory import open_directory
from fedia3.coordinator.setup import (
    SETTINGS,
    Setting,
    read_signing_key,
    renew_certificate,
    serving_alone,
    set_up,
)
from fedia3.coordinator.tokens import token_sha256
from fedia3.errors import BadSetting, Conflict, Corrupt, NotFound

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
NOW_MS = int(NOW.timestamp() * 1000)
HERE = Setting(hosts=["localhost"])


def test_a_new_folder_holds_a_whole_coordinator(tmp_path: Path) -> None:
    """
    Settings that can be read, the base model's digest in them.
    """
    config = set_up(tmp_path / "fed", Setting(hosts=["fl.example.org", "10.0.0.7"]), NOW)
    assert read_config(tmp_path / "fed") == config
    assert config.address == "fl.example.org:8443"
    tiny = read_manifest(BaseStore().find("tiny")).digest
    assert config.coordinator.base == tiny
    assert renew_certificate(config, NOW) is False
    assert read_signing_key(config.signing_key)


def test_secrets_are_the_owners_alone(tmp_path: Path) -> None:
    """
    The folder is 0700, every file that init wrote 0600.
    """
    folder = tmp_path / "fed"
    set_up(folder, HERE, NOW)
    assert folder.stat().st_mode & 0o777 == 0o700
    secrets = [p for p in folder.iterdir() if p.is_file()]
    assert {p.stat().st_mode & 0o777 for p in secrets} == {0o600}


def test_nothing_of_a_new_coordinator_is_others_to_read(tmp_path: Path) -> None:
    """
    Whatever the umask: a backup that keeps modes keeps the database closed as well.
    """
    before = os.umask(0o022)
    try:
        config = set_up(tmp_path / "fed", HERE, NOW)
        FileBlobs(config.registry / "blobs").put(b"bytes")
        with contextlib.closing(open_directory(config.registry)) as directory:
            directory.set_paused(True)
            modes = {
                path.relative_to(config.folder): path.stat().st_mode & 0o077
                for path in config.folder.rglob("*")
            }
    finally:
        os.umask(before)
    assert Path("registry/registry.db-wal") in modes
    assert {path: mode for path, mode in modes.items() if mode} == {}


def test_the_operators_file_opens_the_admin_service(tmp_path: Path) -> None:
    """
    Its token is in the directory as a sha256, beside the public half of its signing key.
    """
    config = set_up(tmp_path, HERE, NOW)
    facts = json.loads(config.operator.read_text())
    directory = open_directory(config.registry)
    principal = directory.principal(token_sha256(facts["token"]), NOW_MS)
    directory.close()
    assert (principal.kind, principal.name) == ("admin", "operator")
    key = Ed25519PrivateKey.from_private_bytes(b64decode(facts["signing_key"]))
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    assert principal.signing_key == public
    assert facts["address"] == config.address
    assert facts["ca"] == config.ca.read_text()


def test_the_commented_defaults_are_the_defaults(tmp_path: Path) -> None:
    """
    Taking every # from the settings changes nothing but what has no default at all.
    """
    words = {"hosts": '["a"]', "base": "b", "base_name": "b", "bind": "0.0.0.0"}
    ports = {"grpc_port": 8443, "fleet_port": 8444, "superlink_port": 8441}
    text = SETTINGS.format(**words, **ports)
    bare = text.replace("\n#", "\n")
    lines = [line for line in bare.splitlines() if " = " in line or line.startswith("[")]
    spoken = tomllib.loads("\n".join(lines))
    del spoken["rounds"]["rounds_per_run"], spoken["training"]["max_steps"]
    told = "\n".join(
        [f"[{name}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in values.items())
         for name, values in spoken.items()]
    )  # fmt: skip
    assert config_of(told, tmp_path) == config_of(text, tmp_path)


def test_a_coordinator_may_keep_its_rows_on_a_server(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The database that the environment names knows the operator, the settings name it without its
    password, and there is no file beside them.
    """
    before_host, host = postgres_url.split("@", 1)
    url = f"{before_host.partition('://')[0]}://postgres:secret@{host}"
    monkeypatch.setenv("FEDIA3_DATABASE_URL", url)
    config = set_up(tmp_path, HERE, NOW)
    token = json.loads(config.operator.read_text())["token"]
    with contextlib.closing(open_directory(tmp_path / "other", url)) as directory:
        assert directory.principal(token_sha256(token), NOW_MS).kind == "admin"
    assert not list(config.registry.glob("registry.db*"))
    assert "secret" not in config.file.read_text()
    monkeypatch.delenv("FEDIA3_DATABASE_URL")
    assert read_config(tmp_path).database == url.replace(":secret", "")


def test_the_database_of_another_coordinator_is_not_taken(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The older operator's token would open the new one; nothing is made, nothing moved aside.
    """
    monkeypatch.setenv("FEDIA3_DATABASE_URL", postgres_url)
    set_up(tmp_path / "one", HERE, NOW)
    for folder, force in (("one", True), ("other", False)):
        with pytest.raises(Conflict, match="table token has rows; name one that is empty"):
            set_up(tmp_path / folder, HERE, NOW, force=force)
    assert not list(tmp_path.rglob("old-*"))
    assert not (tmp_path / "other").exists()


def test_a_coordinator_is_not_overwritten(tmp_path: Path) -> None:
    """
    A second init says what is there and changes nothing.
    """
    set_up(tmp_path, HERE, NOW)
    before = (tmp_path / "ca.pem").read_bytes()
    with pytest.raises(Conflict, match="--force"):
        set_up(tmp_path, HERE, NOW)
    assert (tmp_path / "ca.pem").read_bytes() == before


def test_force_moves_what_is_there_aside(tmp_path: Path) -> None:
    """
    Keys and database of the older coordinator lie in a folder of its own, whole.
    """
    set_up(tmp_path, HERE, NOW)
    before = (tmp_path / "ca.pem").read_bytes()
    set_up(tmp_path, HERE, NOW, force=True)
    aside = tmp_path / "old-20261125-120000"
    assert (aside / "ca.pem").read_bytes() == before
    assert (aside / "registry" / "registry.db").exists()
    assert (tmp_path / "ca.pem").read_bytes() != before


def test_a_coordinator_that_runs_is_not_moved(tmp_path: Path) -> None:
    """
    Not even with force.
    """
    set_up(tmp_path, HERE, NOW)
    with serving_alone(tmp_path), pytest.raises(Conflict, match="stop it"):
        set_up(tmp_path, HERE, NOW, force=True)


def test_an_unknown_base_makes_nothing(tmp_path: Path) -> None:
    """
    What cannot be served is refused before a file is written.
    """
    with pytest.raises(NotFound, match="tiny"):
        set_up(tmp_path / "fed", Setting(hosts=["a"], base="none"), NOW)
    assert not (tmp_path / "fed").exists()


@pytest.mark.parametrize("host", ["", "a b", 'a"', "https://a"])
def test_a_host_is_a_name_or_an_address(tmp_path: Path, host: str) -> None:
    """
    Nothing that would make the settings unreadable, and no URL.
    """
    with pytest.raises(BadSetting, match="a host is a name"):
        set_up(tmp_path, Setting(hosts=[host]), NOW)


def test_a_base_of_ones_own_is_named_by_its_folder(tmp_path: Path, toy_folder: Path) -> None:
    """
    One that is not in this machine's store is found where it lies.
    """
    config = set_up(tmp_path, Setting(hosts=["a"], base=str(toy_folder)), NOW)
    assert config.coordinator.base == str(toy_folder.resolve())


def test_the_certificate_is_renewed_when_it_is_due(tmp_path: Path) -> None:
    """
    A year later a start makes a new one; the authority stays what devices have pinned.
    """
    config = set_up(tmp_path, HERE, NOW)
    authority, server = config.ca.read_bytes(), config.certificate.read_bytes()
    assert renew_certificate(config, NOW + timedelta(days=380)) is True
    assert config.ca.read_bytes() == authority
    assert config.certificate.read_bytes() != server


def test_a_renewal_without_the_authority_says_what_is_missing(tmp_path: Path) -> None:
    """
    An operator who keeps the authority's key elsewhere learns which file to bring.
    """
    config = set_up(tmp_path, HERE, NOW)
    config.ca_key.unlink()
    with pytest.raises(NotFound, match=r"ca\.key"):
        renew_certificate(config, NOW + timedelta(days=380))


def test_a_damaged_signing_key_is_named(tmp_path: Path) -> None:
    """
    The file and what to do.
    """
    (tmp_path / "signing.key").write_text("none")
    with pytest.raises(Corrupt, match="backup"):
        read_signing_key(tmp_path / "signing.key")
    with pytest.raises(NotFound, match="backup"):
        read_signing_key(tmp_path / "gone.key")
