"""The coordinator's authority and what its servers show, judged by OpenSSL."""

import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread

import pytest
from cryptography import x509

from fedia3.coordinator.certificates import (
    Issued,
    ends_at,
    is_due,
    make_authority,
    make_server_certificate,
)
from fedia3.errors import BadInput

NOW = datetime.now(UTC).replace(microsecond=0)


def shake_hands(server: Issued, trusted: bytes, host: str, folder: Path) -> None:
    """A TLS handshake over a socket pair, as a client who asks for ``host``."""
    (folder / "chain.pem").write_bytes(server.certificate)
    (folder / "key.pem").write_bytes(server.key)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / "chain.pem", folder / "key.pem")
    calling = ssl.create_default_context(cadata=trusted.decode())
    calling.verify_flags |= ssl.VERIFY_X509_STRICT
    left, right = socket.socketpair()

    def serve() -> None:
        try:
            serving.wrap_socket(left, server_side=True).close()
        except OSError:
            left.close()

    thread = Thread(target=serve)
    thread.start()
    try:
        calling.wrap_socket(right, server_hostname=host).close()
    finally:
        right.close()
        thread.join()


@pytest.mark.parametrize("host", ["fl.example.org", "10.0.0.7", "localhost", "127.0.0.1"])
def test_a_client_that_pins_the_authority_accepts_the_server(tmp_path: Path, host: str) -> None:
    """
    By every name and address it was made for, and by this machine's own.
    """
    authority = make_authority(NOW)
    server = make_server_certificate(authority, ["fl.example.org", "10.0.0.7"], NOW)
    shake_hands(server, authority.certificate, host, tmp_path)


def test_another_authority_is_not_accepted(tmp_path: Path) -> None:
    """
    Who pins one authority turns another's servers away.
    """
    server = make_server_certificate(make_authority(NOW), ["localhost"], NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, make_authority(NOW).certificate, "localhost", tmp_path)


def test_a_name_it_was_not_made_for_is_not_accepted(tmp_path: Path) -> None:
    """
    The certificate speaks for its hosts alone.
    """
    authority = make_authority(NOW)
    server = make_server_certificate(authority, ["fl.example.org"], NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname"):
        shake_hands(server, authority.certificate, "evil.example.org", tmp_path)


def test_a_certificate_is_renewed_a_month_before_it_ends() -> None:
    """
    397 days; on day 366 it is left alone, on day 368 it is due.
    """
    server = make_server_certificate(make_authority(NOW), ["a"], NOW)
    assert ends_at(server.certificate) == NOW + timedelta(days=397)
    assert not is_due(server.certificate, ["a"], NOW + timedelta(days=366))
    assert is_due(server.certificate, ["a"], NOW + timedelta(days=368))


def test_a_new_host_makes_it_due() -> None:
    """
    An operator who adds a name gets a certificate with it at the next start.
    """
    server = make_server_certificate(make_authority(NOW), ["a"], NOW)
    assert is_due(server.certificate, ["a", "b"], NOW)
    assert is_due(b"no certificate", ["a"], NOW)


def test_it_never_outlives_its_authority() -> None:
    """
    Made in the authority's last days it ends with it.
    """
    authority = make_authority(NOW - timedelta(days=3650))
    server = make_server_certificate(authority, ["a"], NOW)
    assert ends_at(server.certificate) == NOW + timedelta(days=2)


def test_an_authority_signs_no_further_authorities() -> None:
    """
    Its path length is 0.
    """
    made = x509.load_pem_x509_certificate(make_authority(NOW).certificate)
    limits = made.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (limits.ca, limits.path_length) == (True, 0)


def test_a_key_of_another_authority_is_refused() -> None:
    """
    Two files of two installations make no certificate that would fail later.
    """
    mixed = Issued(make_authority(NOW).certificate, make_authority(NOW).key)
    with pytest.raises(BadInput, match="does not belong"):
        make_server_certificate(mixed, ["a"], NOW)
