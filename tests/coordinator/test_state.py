import numpy as np
import pytest

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator.state import ServerState, decode_state, encode_state
from fedia3.errors import Corrupt, WrongBaseModel

SCHEMA = Schema("0" * 64, (Target("layer", "k", 3),))
STATE = ServerState(7, Adapter(SCHEMA, np.array([1, 10, 0.1], np.float32)))


def test_a_state_survives_storage():
    """Round and adapter come back as they were."""
    assert decode_state(encode_state(STATE), SCHEMA) == STATE


def test_equal_states_have_equal_bytes():
    """A copy of the state gives the same bytes, another round gives others."""
    copy = ServerState(7, Adapter(SCHEMA, STATE.adapter.vector.copy()))
    assert encode_state(copy) == encode_state(STATE)
    assert encode_state(ServerState(8, STATE.adapter)) != encode_state(STATE)


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"not a state",
        b'{"format": "fedia3.state.v1", "round": -1}\n',
        b'{"format": "fedia3.state.v1", "round": true}\n',
        b'{"format": "fedia3.state.v9", "round": 1}\n',
        b"[]\n",
        encode_state(STATE)[:-1],
        encode_state(STATE) + b"x",
    ],
)
def test_broken_bytes_are_no_state(broken):
    """Anything but what was written is reported as corrupt."""
    with pytest.raises(Corrupt, match="server state"):
        decode_state(broken, SCHEMA)


def test_the_state_of_another_base_model_is_refused():
    """A state is read with the schema it was written with."""
    other = Schema("1" * 64, SCHEMA.targets)
    with pytest.raises(WrongBaseModel):
        decode_state(encode_state(STATE), other)
