"""The coordinator's own authority, and the certificate that its servers show.

Devices pin the authority at enrolment and trust no other, so that the public ones play no part.
The servers' certificate is renewed from it, well before it ends, whenever the coordinator starts
and while it runs; the authority lasts as long as an installation.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedia3.errors import BadInput

AUTHORITY_LASTS = timedelta(days=3652)
SERVER_LASTS = timedelta(days=397)
RENEWED_BEFORE = timedelta(days=30)
BACKDATED = timedelta(days=2)  # a device's clock may be behind
ALWAYS_NAMED = ("localhost", "127.0.0.1", "::1")  # the SuperLink and the operator on this machine


@dataclass(frozen=True)
class Issued:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


def make_authority(now: datetime) -> Issued:
    """A new authority, which signs servers' certificates and nothing else."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("fedia3 coordinator authority")
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + AUTHORITY_LASTS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    return Issued(_certificate_pem(certificate), key_pem(key))


def make_server_certificate(authority: Issued, hosts: Iterable[str], now: datetime) -> Issued:
    """A servers' certificate for these names and addresses, the authority's behind it.

    Raises:
        BadInput: the authority's files hold something else.
    """
    signer, signer_key = _authority(authority)
    key = ec.generate_private_key(ec.SECP256R1())
    names = dict.fromkeys([*hosts, *ALWAYS_NAMED])
    certificate = (
        x509.CertificateBuilder(
            signer.subject,
            _name("fedia3 coordinator"),
            key.public_key(),
            x509.random_serial_number(),
        )
        .not_valid_before(now - BACKDATED)
        .not_valid_after(min(now + SERVER_LASTS, signer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_named(n) for n in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()),
            critical=False,
        )
        .sign(signer_key, hashes.SHA256())
    )
    return Issued(_certificate_pem(certificate) + authority.certificate, key_pem(key))


def is_due(certificate: bytes, hosts: Iterable[str], now: datetime) -> bool:
    """Whether the servers need a new certificate: it ends soon, or lacks one of the hosts."""
    try:
        (made, *_) = x509.load_pem_x509_certificates(certificate)
        named = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return True
    lacks_a_host = any(_named(host) not in named for host in hosts)
    return lacks_a_host or made.not_valid_after_utc - now < RENEWED_BEFORE


def ends_at(certificate: bytes) -> datetime:
    """When the first certificate of a PEM chain ends.

    Raises:
        BadInput: it is no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    except ValueError as error:
        raise BadInput(f"expected a PEM certificate: {error}") from error


def _authority(authority: Issued) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate(authority.certificate)
        key = serialization.load_pem_private_key(authority.key, password=None)
    except (ValueError, TypeError) as error:
        raise BadInput(f"the authority's files hold no certificate and key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadInput(f"expected the authority's key on a curve, got {type(key).__name__}")
    if key.public_key() != certificate.public_key():
        raise BadInput("the authority's key does not belong to its certificate; restore both")
    return certificate, key


def _named(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(**what: bool) -> x509.KeyUsage:
    none = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
         "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
        False,
    )  # fmt: skip
    return x509.KeyUsage(**{**none, **what})


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    """A private key as its file holds it, PEM PKCS #8."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
