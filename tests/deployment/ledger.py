"""What must hold of a coordinator's registry whatever was killed: nothing lost, nothing twice."""

from itertools import pairwise
from pathlib import Path
from threading import Event, Thread

import numpy as np
from light_trainer import contribution

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.manifest import read_manifest, schema
from fedia3.adapters.update import client_seed
from fedia3.client.coordinator import Coordinator
from fedia3.coordinator.cohort import round_seed
from fedia3.coordinator.records import Owner, RoundRecord
from fedia3.coordinator.registry import Registry
from fedia3.errors import Fedia3Error

TINY = schema(read_manifest(BaseStore().find("tiny")))
SEED = 0  # of the coordinator's settings


def check(folder: Path, acknowledged: dict[str, int], user: str) -> int:
    """Assert that the registry in ``folder`` is whole; the number of its last round.

    Every round is there, each global adapter is the one before it plus the weighted mean of what
    the light trainers of the accepted clients returned, every version has its bytes, and every
    publish that was acknowledged is kept under the number it was given.
    """
    with Registry.open(folder) as registry:
        rounds = registry.rounds()
        assert [r.round_num for r in rounds] == list(range(len(rounds)))
        for before, after in pairwise(rounds):
            _check_round(registry, before, after)
        kept = registry.versions(Owner.user(user), TINY.base_digest)
        assert [r.version for r in kept] == list(range(len(kept), 0, -1))
        for record in kept:
            registry.fetch(record.owner, record.base, record.version)  # bytes and digest
        by_digest = {r.digest: r.version for r in kept}
        assert len(by_digest) == len(kept), "one publish became two versions"
        assert {d: by_digest.get(d) for d in acknowledged} == acknowledged
    return len(rounds) - 1


def _check_round(registry: Registry, before: RoundRecord, after: RoundRecord) -> None:
    accepted = [c for c in after.contributions if c.verdict == "accepted"]
    total = np.zeros(TINY.n_params, dtype=np.float64)
    weight = 0
    for c in accepted:
        seed = client_seed(c.client, round_seed(after.round_num, SEED))
        delta, examples = contribution(seed, TINY.n_params)
        assert c.num_examples == examples
        total += examples * delta.astype(np.float64)
        weight += examples
    expected = _vector(registry, before) + total / weight
    np.testing.assert_allclose(_vector(registry, after), expected, rtol=0, atol=1e-6)


def _vector(registry: Registry, record: RoundRecord) -> np.ndarray:
    _, data = registry.fetch(Owner.everyone(), record.base, record.version)
    return encoding.decode(data, TINY).vector.astype(np.float64)


class Publisher:
    """A device's user who publishes one part after another and remembers what was acknowledged."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self.acknowledged: dict[str, int] = {}  # digest: version
        self.refused: list[str] = []
        self._over = Event()
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Publisher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)

    def _run(self) -> None:
        start = encoding.digest(encoding.encode(Adapter.ones(TINY)))  # round 0
        number = 0
        while not self._over.is_set():
            number += 1
            delta = np.full(TINY.n_params, number * 1e-6, dtype=np.float32)
            part = PersonalAdapter(TINY, delta, start)
            while not self._over.is_set() and not self._publish(part):
                self._over.wait(0.5)
            self._over.wait(0.1)

    def _publish(self, part: PersonalAdapter) -> bool:
        digest = encoding.digest(encoding.encode_personal(part))
        try:
            with Coordinator.from_state(self._state, timeout_s=5.0) as coordinator:
                version = coordinator.publish(part, num_examples=1)
        except Fedia3Error as error:
            self.refused.append(f"{type(error).__name__}: {error}")
            return False
        self.acknowledged[digest] = version.version
        return True
