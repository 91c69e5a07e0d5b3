"""What the coordinator knows between two rounds, as one value stored whole."""

import json
from dataclasses import dataclass

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter
from fedia3.adapters.schema import Schema
from fedia3.errors import BadAdapter, Corrupt

FORMAT = "fedia3.state.v1"


@dataclass(frozen=True)
class ServerState:
    """The global adapter after ``round_num`` rounds; round 0 is where training starts."""

    round_num: int
    adapter: Adapter


def encode_state(state: ServerState) -> bytes:
    """One line of JSON with the format and the round, then the adapter's file.

    Equal states give equal bytes.
    """
    head = {"format": FORMAT, "round": state.round_num}
    return json.dumps(head, sort_keys=True).encode() + b"\n" + encoding.encode(state.adapter)


def decode_state(data: bytes, schema: Schema) -> ServerState:
    """Read :func:`encode_state`'s form.

    Raises:
        Corrupt: the bytes are no server state; restore them from a backup.
        WrongBaseModel: the state was trained on another base model than ``schema``'s.
    """
    head, _, body = data.partition(b"\n")
    round_num = _round_of(head)
    try:
        return ServerState(round_num, encoding.decode(body, schema))
    except BadAdapter as error:
        raise Corrupt(f"the server state of round {round_num} holds no adapter: {error}") from error


def _round_of(head: bytes) -> int:
    try:
        fields = json.loads(head)
        if fields["format"] == FORMAT and type(fields["round"]) is int and fields["round"] >= 0:
            return int(fields["round"])
    except (ValueError, KeyError, TypeError):
        pass
    raise Corrupt(f"expected a server state in the form {FORMAT}, got {head[:60]!r}")
