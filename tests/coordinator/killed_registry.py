"""Four writers and four readers on one registry, killed with SIGKILL again and again.

    python killed_registry.py FOLDER URL KILLS SEED     (URL "" is SQLite in FOLDER)

Each life is a fork, so that it begins in milliseconds. What was acknowledged is written to a ledger
that outlives it; after each death the registry is opened anew, and the ledger is looked up in it.
Prints what happened as JSON; ends with 1 and the first fault where one was found.
"""

import json
import os
import random
import secrets
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator.records import AliasMove, Owner
from fedia3.coordinator.registry import Registry
from fedia3.errors import Conflict, Fedia3Error, NotFound

SCHEMA = Schema("b" * 64, (Target("layers.0.k", "k", 500),))
BASE = SCHEMA.base_digest
WRITERS, READERS = 4, 4
LIFE_S = (0.05, 0.5)


class Ledger:
    """Lines that are there as soon as they are written, whoever is killed behind that."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, **fact: object) -> None:
        os.write(self._file, json.dumps(fact).encode() + b"\n")


def owner_of(name: str) -> Owner:
    """A user, everyone by no name."""
    return Owner.user(name) if name else Owner.everyone()


def write_for_ever(registry: Registry, ledger: Ledger, number: int) -> None:
    """One writer: a user's parts, or everyone's adapters, some of them twice, and an alias."""
    name = f"user {number}" if number else ""
    owner, key = owner_of(name), ""
    while True:
        if random.random() < 0.2:
            move(registry, ledger, owner, name)
            continue
        if not key or random.random() < 0.8:  # else the answer was lost, and it asks again
            values = np.random.default_rng().normal(1, 0.1, SCHEMA.n_params).astype(np.float32)
            key = secrets.token_hex(8)
        if number:
            on = registry.find(Owner.everyone(), BASE, 1).digest
            part = PersonalAdapter(SCHEMA, values - 1, on)
            record = registry.publish_personal(name, part, num_examples=1, idem_key=key)
        else:
            record = registry.publish_global(Adapter(SCHEMA, values), idem_key=key)
        ledger.note(
            did="publish", owner=name, key=key, version=record.version, digest=record.digest
        )


def move(registry: Registry, ledger: Ledger, owner: Owner, name: str) -> None:
    """Point the owner's alias somewhere, or back."""
    try:
        if random.random() < 0.3:
            moved = registry.roll_back(owner, BASE, "stable")
        else:
            newest = registry.find(owner, BASE).version
            version = random.randint(1, newest)
            moved = registry.promote(
                AliasMove(owner=owner, base=BASE, name="stable", version=version)
            )
    except (NotFound, Conflict):
        return  # nothing to point at yet, or nowhere it pointed before
    ledger.note(did="move", owner=name, rev=moved.rev, version=moved.version)


def read_for_ever(registry: Registry, ledger: Ledger) -> None:
    """One reader: whatever it is given is whole."""
    while True:
        name = random.choice(["", *(f"user {number}" for number in range(1, WRITERS))])
        try:
            record, data = registry.fetch(
                owner_of(name), BASE, random.choice(["latest", "stable", 1])
            )
        except NotFound:
            continue
        if encoding.digest(data) != record.digest:
            ledger.note(did="fault", what=f"{record} was served with other bytes")


def live(folder: Path, url: str, ledger: Ledger, seed: int) -> None:
    """All of them until death; an error that is no kill's is a fault."""
    random.seed(seed)
    registry = Registry.open(folder, url or None)

    def kept_going(work: object, *args: object) -> None:
        try:
            work(registry, ledger, *args)  # type: ignore[operator]  # one of the two above
        except Fedia3Error as error:
            ledger.note(did="fault", what=f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=kept_going, args=(read_for_ever,)) for _ in range(READERS)]
    threads += [
        threading.Thread(target=kept_going, args=(write_for_ever, n)) for n in range(WRITERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Books:
    """What was acknowledged, and how far it has been looked up."""

    def __init__(self, folder: Path, url: str, ledger: Path) -> None:
        self._folder, self._url, self._ledger = folder, url, ledger
        self._read = 0  # bytes of the ledger
        self._seen: Counter[str] = Counter()  # versions by owner, looked up
        self._keys: dict[tuple[str, str], int] = {}
        self.did: Counter[str] = Counter()
        self.ready_s: list[float] = []

    def check(self) -> None:
        """Everything that was acknowledged since the last look is there, and nothing is torn."""
        began = time.monotonic()
        with Registry.open(self._folder, self._url or None) as registry:
            self.ready_s.append(time.monotonic() - began)
            for line in self._new_lines():
                fact = json.loads(line)
                self.did[fact["did"]] += 1
                getattr(self, f"_{fact['did']}")(registry, fact)
            for number in range(WRITERS):
                self._look_at_rows(registry, f"user {number}" if number else "")

    def _new_lines(self) -> list[bytes]:
        with self._ledger.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        return new.splitlines()

    def _fault(self, _registry: Registry, fact: dict[str, str]) -> None:
        raise AssertionError(fact["what"])

    def _publish(self, registry: Registry, fact: dict[str, object]) -> None:
        owner, version = owner_of(str(fact["owner"])), int(str(fact["version"]))
        kept = registry.find(owner, BASE, version)
        assert kept.digest == fact["digest"], f"{kept} was acknowledged with other bytes"
        named = self._keys.setdefault((str(fact["owner"]), str(fact["key"])), version)
        assert named == version, f"one key made versions {named} and {version} of {owner}"

    def _move(self, registry: Registry, fact: dict[str, object]) -> None:
        owner, rev = owner_of(str(fact["owner"])), int(str(fact["rev"]))
        (kept,) = registry.store.alias_events(owner, BASE, "stable", rev + 1, 1)
        assert (kept.rev, kept.version) == (rev, fact["version"]), f"a move of {owner} is lost"

    def _look_at_rows(self, registry: Registry, name: str) -> None:
        """Numbers have no gap, every row has its bytes, the alias points at a row."""
        owner = owner_of(name)
        rows = registry.versions(owner, BASE)
        assert [r.version for r in rows] == list(range(len(rows), 0, -1)), f"a gap in {owner}'s"
        for record in rows[: len(rows) - self._seen[name]]:
            registry.read(record)
        self._seen[name] = len(rows)
        for alias in registry.store.aliases(owner, BASE):
            registry.find(owner, BASE, alias.version or 0)


def main() -> None:
    """Lives and deaths, then the sums."""
    folder, url, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    draw, path = random.Random(seed), folder / "ledger"
    with Registry.open(folder, url or None) as registry:
        registry.publish_global(Adapter.ones(SCHEMA))
    books = Books(folder, url, path)
    for life in range(kills):
        pid = os.fork()
        if pid == 0:
            live(folder, url, Ledger(path), seed * 1_000_003 + life)
            os._exit(1)  # every thread has ended: the ledger says why
        time.sleep(draw.uniform(*LIFE_S))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if path.exists():
            books.check()
    with Registry.open(folder, url or None) as registry:
        versions = sum(len(registry.versions(owner_of(n), BASE)) for n in books._seen)
        named = sum(1 for _ in registry.blobs.digests())
    print(
        json.dumps({
            "kills": kills,
            "acknowledged": dict(books.did),
            "versions": versions,
            "orphan_blobs": named - versions,
            "ready_s_most": round(max(books.ready_s), 3),
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
