"""Tokens and invites' codes: what they look like, and what of them is kept.

A token is ``fedia3_KIND_SECRET_CHECK``: 256 random bits in base64url behind a readable kind, with a
CRC-32 of what stands before it, so that a mistyped or cut token is told from an unknown one without
a look into the database, and a leaked one is found by its shape.
"""

import os
import re
import zlib
from base64 import b32encode, urlsafe_b64encode
from collections.abc import Callable
from hashlib import sha256

from fedia3.coordinator.directory import PrincipalKind
from fedia3.errors import BadToken
from fedia3.proto.signing import normal_code

RandomBytes = Callable[[int], bytes]

DAY_MS = 24 * 3600 * 1000
DEVICE_TOKEN_MS = 30 * DAY_MS  # a device renews it when less than half is left
INVITE_MS = 10 * 60 * 1000

_TOKEN = re.compile(r"(fedia3_(?:device|service|admin)_[\w-]{43})_([0-9a-f]{8})", re.ASCII)
_GROUPS = (5, 5, 4, 4, 4, 4)  # of the 26 characters that 128 bits are in base32


def new_token(kind: PrincipalKind, random_bytes: RandomBytes = os.urandom) -> str:
    """A token nobody has yet."""
    secret = urlsafe_b64encode(random_bytes(32)).decode().rstrip("=")
    text = f"fedia3_{kind}_{secret}"
    return f"{text}_{_check(text)}"


def token_sha256(token: str) -> bytes:
    """What is kept of a token.

    Raises:
        BadToken: it has not the shape of one, or its check sum is another's.
    """
    found = _TOKEN.fullmatch(token)
    if found is None or _check(found[1]) != found[2]:
        raise BadToken(
            "this is no token of fedia3's: fedia3_KIND_SECRET_CHECK, with the check sum that fits; "
            "it may have been cut or mistyped"
        )
    return sha256(token.encode()).digest()


def new_code(random_bytes: RandomBytes = os.urandom) -> str:
    """An invite's code of 128 bits, in groups that people can read out."""
    text, groups = b32encode(random_bytes(16)).decode().rstrip("="), []
    for size in _GROUPS:
        groups.append(text[:size])
        text = text[size:]
    return "-".join(groups)


def code_sha256(code: str) -> bytes:
    """What is kept of a code, however it was typed."""
    return sha256(normal_code(code).encode(errors="replace")).digest()


def _check(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
