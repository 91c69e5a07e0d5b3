"""What is signed, byte for byte: requests, enrolments, manifests and records.

Every signature is over ``fedia3.v1/KIND``, then each part behind its length (8 bytes, big endian),
so that bytes signed for one purpose mean nothing for another. Ed25519 (RFC 8032) throughout; a
device's node key, which Flower wants to be P-384, signs its enrolment with ECDSA and SHA-256.
"""

from hashlib import sha256

TOKEN_HEADER = "authorization"  # "Bearer TOKEN"
NONCE_HEADER = "fedia3-nonce-bin"  # 16 random bytes
TIME_HEADER = "fedia3-time"  # ms since 1970; the coordinator's, in its trailing metadata
SIGNATURE_HEADER = "fedia3-signature-bin"

NONCE_BYTES = 16
CLOCK_WINDOW_MS = 60_000  # how far a request's time may lie from the coordinator's


def signed_bytes(kind: str, *parts: bytes) -> bytes:
    """What a signature of ``kind`` over ``parts`` is made of."""
    framed = (len(part).to_bytes(8) + part for part in parts)
    return f"fedia3.v1/{kind}\0".encode() + b"".join(framed)


def request_bytes(path: str, body: bytes, time_ms: int, nonce: bytes, token: str) -> bytes:
    """What a device or operator signs for one call of a method whose rule says ``is_signed``."""
    return signed_bytes(
        "request",
        path.encode(),
        sha256(body).digest(),
        str(time_ms).encode(),
        nonce,
        sha256(token.encode()).digest(),
    )


def enrolment_bytes(
    code: str, challenge: bytes, device_name: str, signing_key: bytes, node_key: bytes
) -> bytes:
    """What a new device signs with both of its keys; ``code`` as :func:`normal_code` gives it."""
    return signed_bytes(
        "enrolment",
        normal_code(code).encode(),
        challenge,
        device_name.encode(),
        signing_key,
        node_key,
    )


def normal_code(code: str) -> str:
    """An invite's code without dashes and spaces, in upper case: people type it."""
    return code.replace("-", "").replace(" ", "").upper()
