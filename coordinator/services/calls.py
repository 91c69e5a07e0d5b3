"""What a service's code is given beside the request, and what it is registered as."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import Message

from fedia3.coordinator.directory import Principal
from fedia3.errors import BadToken
from fedia3.proto.signing import signed_bytes

Clock = Callable[[], int]  # ms since 1970

# The request's own class stands in each handler's signature; a table of them cannot say it.
Unary = Callable[[Any, "Caller"], Message]
Streamed = Callable[[Any, "Caller"], Iterator[bytes]]  # each the bytes of one message
Handlers = Mapping[str, Unary | Streamed]  # by the method's path


@dataclass(frozen=True)
class Caller:
    """Who calls, once the call was let in."""

    address: str  # whom rates count
    principal: Principal | None  # None where the method is open to anybody

    @property
    def known(self) -> Principal:
        """The caller by their token.

        Raises:
            BadToken: the method was open to anybody.
        """
        if self.principal is None:
            raise BadToken("this call needs a token")
        return self.principal


class Signer:
    """Signs what the coordinator vouches for."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()  # 32 bytes

    def sign(self, kind: str, payload: bytes) -> bytes:
        """The signature of these bytes for this purpose."""
        return self._key.sign(signed_bytes(kind, payload))
