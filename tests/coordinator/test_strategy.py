import numpy as np
import pytest

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.schema import Schema, Target
from fedia3.adapters.update import ClientUpdate
from fedia3.coordinator.state import ServerState
from fedia3.coordinator.strategy import FedAvg
from fedia3.errors import QuorumNotMet

SCHEMA = Schema("0" * 64, (Target("layer", "k", 1),))
START = ServerState(4, Adapter.ones(SCHEMA))


def update(delta: float, num_examples: int) -> ClientUpdate:
    """One client's update of one scale."""
    return ClientUpdate(np.array([delta], np.float32), num_examples)


def test_the_mean_delta_is_weighted_by_examples():
    """[1, 3] with weights 1, 3 is 2.5 on average, so 1 becomes 3.5 one round later."""
    fold = FedAvg(SCHEMA)
    fold.add(update(1, 1))
    fold.add(update(3, 3))
    state = fold.apply(START)
    assert state.adapter.vector.tolist() == [3.5]
    assert state.round_num == 5


def test_small_updates_are_not_lost_beside_many():
    """2**25 ones and one more: a float32 sum would stop at 2**24."""
    fold = FedAvg(SCHEMA)
    fold.add(update(1, 2**25))
    fold.add(update(1, 1))
    assert fold.apply(START).adapter.vector.tolist() == [2.0]
    assert fold.num_examples == 2**25 + 1


def test_the_state_before_stays_as_it_was():
    """Applying gives a new value and leaves the old one alone."""
    fold = FedAvg(SCHEMA)
    fold.add(update(1, 1))
    fold.apply(START)
    assert START.round_num == 4
    assert START.adapter.vector.tolist() == [1.0]


def test_without_updates_there_is_no_next_state():
    """An empty cohort gives an error instead of a division by zero."""
    with pytest.raises(QuorumNotMet, match="got none"):
        FedAvg(SCHEMA).apply(START)
