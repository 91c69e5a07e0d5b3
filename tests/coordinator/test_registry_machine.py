"""Whatever is done to a registry in whatever order: it answers as a few dictionaries would.

The dictionaries are written from the contract's words (``coordinator/store.py``), and every store
has to agree with them. ``FEDIA3_MACHINE=500`` runs as many examples of 50 steps each.
"""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator.records import AliasMove, Owner
from fedia3.coordinator.registry import Registry
from fedia3.errors import Conflict, Erased, NotFound

EXAMPLES = int(os.environ.get("FEDIA3_MACHINE", "0"))
BASES = ("a" * 64, "b" * 64)
USERS = ("anna", "bob")
EVERYONE = Owner.everyone()
NAMES = ("stable", "canary")

some_owner = st.sampled_from([EVERYONE, *map(Owner.user, USERS)])
some_base = st.sampled_from(BASES)
some_version = st.integers(1, 4)
some_value = st.sampled_from([0.5, 1.5])  # few, so that two users have the same bytes
some_key = st.sampled_from([None, "k1", "k2"])


def schema(base: str) -> Schema:
    """Two scales."""
    return Schema(base, (Target("layers.0.k", "k", 2),))


@dataclass
class Line:
    """What an owner has on a base."""

    digests: dict[int, str] = field(default_factory=dict)  # by version
    keys: dict[str, int] = field(default_factory=dict)
    yanked: set[int] = field(default_factory=set)
    moves: dict[str, list[int | None]] = field(default_factory=dict)  # where each led, oldest first
    following: int = 1
    revision: int = 0
    erased_keys: set[str] = field(default_factory=set)
    exists: bool = False  # since its first publish, until it is erased

    def points(self, name: str) -> int | None:
        """Where an alias points now."""
        return (self.moves.get(name) or [None])[-1]

    @property
    def latest(self) -> int | None:
        """The newest that is not yanked."""
        return max(set(self.digests) - self.yanked, default=None)


class RegistryMachine(RuleBasedStateMachine):
    """One registry, and what should be in it."""

    url: str | None = None  # of PostgreSQL
    in_memory = False

    @initialize()
    def begin(self) -> None:
        """Nothing is there."""
        self.folder = tempfile.TemporaryDirectory()
        self.registry = Registry.in_memory() if self.in_memory else self.opened()
        self.lines = {(o, b): Line() for o in self.owners() for b in BASES}

    def opened(self) -> Registry:
        return Registry.open(Path(self.folder.name), self.url)

    def owners(self) -> list[Owner]:
        return [EVERYONE, *map(Owner.user, USERS)]

    def teardown(self) -> None:
        """Nothing stays."""
        if hasattr(self, "registry"):
            if self.url:
                with self.registry.store._database.writing() as connection:  # type: ignore[attr-defined]  # an SQL store
                    _empty(connection)
            self.registry.close()
            self.folder.cleanup()

    @precondition(lambda self: not self.in_memory)
    @rule()
    def reopen(self) -> None:
        """As after a restart."""
        self.registry.close()
        self.registry = self.opened()

    @rule(base=some_base, value=some_value, key=some_key)
    def publish_everyones(self, base: str, value: float, key: str | None) -> None:
        """A global adapter."""
        adapter = Adapter(schema(base), np.array([1, value], np.float32))
        digest = encoding.digest(encoding.encode(adapter))
        self.publish(
            EVERYONE, base, digest, key,
            lambda: self.registry.publish_global(adapter, idem_key=key),
        )  # fmt: skip

    @rule(user=st.sampled_from(USERS), base=some_base, value=some_value, key=some_key)
    def publish_own(self, user: str, base: str, value: float, key: str | None) -> None:
        """A part on everyone's first version."""
        on = self.lines[EVERYONE, base].digests.get(1, "0" * 64)
        part = PersonalAdapter(schema(base), np.array([0, value], np.float32), on)
        digest = encoding.digest(encoding.encode_personal(part))

        def publish() -> object:
            return self.registry.publish_personal(user, part, num_examples=1, idem_key=key)

        if on == "0" * 64:
            with pytest.raises(NotFound):
                publish()
            return
        self.publish(Owner.user(user), base, digest, key, publish)

    def publish(self, owner: Owner, base: str, digest: str, key: str | None, publish) -> None:
        """By the contract of keys and erasures."""
        line = self.lines[owner, base]
        if key in line.keys:
            version = line.keys[key]
            if line.digests[version] == digest:
                assert publish().version == version
            else:
                with pytest.raises(Conflict):
                    publish()
        elif key in line.erased_keys:
            with pytest.raises(Erased):
                publish()
        else:
            record = publish()
            assert (record.version, record.digest) == (line.following, digest)
            line.digests[record.version] = digest
            line.following, line.revision, line.exists = line.following + 1, line.revision + 1, True
            if key is not None:
                line.keys[key] = record.version

    @rule(
        owner=some_owner,
        base=some_base,
        name=st.sampled_from(NAMES),
        version=some_version | st.none(),
        expected=st.integers(0, 3) | st.none(),
    )
    def promote(
        self, owner: Owner, base: str, name: str, version: int | None, expected: int | None
    ) -> None:
        """Compare and set; what holds already is no move."""
        line = self.lines[owner, base]
        moves = line.moves.get(name, [])
        move = AliasMove(owner=owner, base=base, name=name, version=version)
        if not line.exists or (version is not None and version not in line.digests):
            error: type[Exception] | None = NotFound
        elif version is not None and line.points(name) == version:
            assert self.registry.promote(move, expected).rev == len(moves)
            return
        elif expected is not None and expected != len(moves):
            error = Conflict
        elif version is None and line.points(name) is None:
            error = NotFound
        else:
            error = Conflict if version in line.yanked else None
        if error is not None:
            with pytest.raises(error):
                self.registry.promote(move, expected)
            return
        assert self.registry.promote(move, expected).rev == len(moves) + 1
        line.moves[name] = [*moves, version]
        line.revision += 1

    @rule(owner=some_owner, base=some_base, name=st.sampled_from(NAMES))
    def roll_back(self, owner: Owner, base: str, name: str) -> None:
        """To the last other version that it pointed at."""
        line = self.lines[owner, base]
        current, moves = line.points(name), line.moves.get(name, [])
        others = [version for version in moves if version not in (None, current)]
        if current is None:
            error: type[Exception] | None = NotFound
        else:
            error = Conflict if not others or others[-1] in line.yanked else None
        if error is not None:
            with pytest.raises(error):
                self.registry.roll_back(owner, base, name)
            return
        assert self.registry.roll_back(owner, base, name).version == others[-1]
        line.moves[name] = [*moves, others[-1]]
        line.revision += 1

    @rule(owner=some_owner, base=some_base, version=some_version)
    def yank(self, owner: Owner, base: str, version: int) -> None:
        """Not what an alias points at."""
        line = self.lines[owner, base]
        if version not in line.digests:
            with pytest.raises(NotFound):
                self.registry.store.yank(owner, base, version)
        elif version not in line.yanked and any(line.points(n) == version for n in NAMES):
            with pytest.raises(Conflict):
                self.registry.store.yank(owner, base, version)
        else:
            self.registry.store.yank(owner, base, version)
            line.revision += version not in line.yanked
            line.yanked.add(version)

    @rule(owner=some_owner, base=some_base, version=some_version)
    def unyank(self, owner: Owner, base: str, version: int) -> None:
        """Where there is no yank, nothing happens."""
        line = self.lines[owner, base]
        if version not in line.digests:
            with pytest.raises(NotFound):
                self.registry.store.unyank(owner, base, version)
            return
        self.registry.store.unyank(owner, base, version)
        line.revision += version in line.yanked
        line.yanked.discard(version)

    @rule(user=st.sampled_from(USERS), base=some_base | st.none())
    def erase(self, user: str, base: str | None) -> None:
        """Numbers and counts go on; keys are refused."""
        owner, versions = Owner.user(user), 0
        for on in BASES:
            line = self.lines[owner, on]
            if base in (None, on):
                versions += len(line.digests)
                self.lines[owner, on] = Line(
                    following=line.following,
                    revision=line.revision + line.exists,
                    erased_keys=line.erased_keys | set(line.keys),
                )
        assert self.registry.erase_user(user, base).tombstone.versions == versions

    @invariant()
    def agrees(self) -> None:
        """Every question has the dictionaries' answer, and every version its bytes."""
        if not hasattr(self, "registry"):
            return
        for (owner, base), line in self.lines.items():
            found = self.registry.versions(owner, base)
            assert {r.version: r.digest for r in found} == line.digests
            assert {r.version for r in found if r.yanked} == line.yanked
            assert [r.version for r in found] == sorted(line.digests, reverse=True)
            assert self.registry.store.revision(owner, base) == line.revision
            aliases = {a.name: a.version for a in self.registry.store.aliases(owner, base)}
            assert aliases == {n: line.points(n) for n in NAMES if line.points(n) is not None}
            for name in NAMES:
                events = self.registry.store.alias_events(owner, base, name)
                assert [e.version for e in reversed(events)] == line.moves.get(name, [])
            for record in found:
                assert encoding.digest(self.registry.read(record)) == record.digest
            if line.latest is None:
                with pytest.raises(NotFound):
                    self.registry.find(owner, base)
            else:
                assert self.registry.find(owner, base).version == line.latest
        used = {digest for line in self.lines.values() for digest in line.digests.values()}
        assert used <= set(self.registry.blobs.digests())


def _empty(connection) -> None:
    """Every table but the pepper."""
    connection.exec_driver_sql(
        "TRUNCATE alias_event, yank, seal, tombstone, erased_line, erased_key, server_state, "
        "contribution, round, adapter_version, adapter RESTART IDENTITY"
    )


@pytest.mark.parametrize("backend", ["memory", "sqlite", "postgresql"])
def test_a_registry_answers_as_dictionaries_would(
    backend: str, request: pytest.FixtureRequest
) -> None:
    """
    In any order of publishes, moves, yanks, erasures and restarts.
    """

    class Machine(RegistryMachine):
        url = request.getfixturevalue("postgres_url") if backend == "postgresql" else None
        in_memory = backend == "memory"

    quick = {"memory": 200, "sqlite": 15, "postgresql": 10}[backend]
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES or quick,
            stateful_step_count=50 if EXAMPLES else 30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
