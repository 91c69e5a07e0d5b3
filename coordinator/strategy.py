"""How a cohort's updates become the next global adapter (McMahan et al., 2017)."""

from dataclasses import replace

import numpy as np

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.schema import Schema
from fedia3.adapters.update import ClientUpdate
from fedia3.coordinator.state import ServerState
from fedia3.errors import QuorumNotMet


class FedAvg:
    """One FedAvg step (McMahan et al., 2017, algorithm 1), folded update by update.

    The new adapter is the old one plus the mean delta, weighted by ``num_examples``. The sum is
    kept in float64 and running: a cohort's updates do not fit in memory together. Another order
    of arrival moves it by float64 rounding only.
    """

    def __init__(self, schema: Schema) -> None:
        self.num_updates = 0
        self.num_examples = 0
        self._sum = np.zeros(schema.n_params, dtype=np.float64)

    def add(self, update: ClientUpdate) -> None:
        """Take in one admitted update."""
        self._sum += np.float64(update.num_examples) * update.delta
        self.num_examples += update.num_examples
        self.num_updates += 1

    def apply(self, state: ServerState) -> ServerState:
        """The state one round later.

        Raises:
            QuorumNotMet: nothing was added; the caller keeps ``state``.
        """
        if not self.num_examples:
            raise QuorumNotMet("expected at least 1 usable update to average, got none")
        vector = state.adapter.vector + self._sum / self.num_examples
        adapter = Adapter(state.adapter.schema, vector.astype(np.float32))
        return replace(state, round_num=state.round_num + 1, adapter=adapter)
