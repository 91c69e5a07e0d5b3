"""How fast the registry keeps and finds adapters, beside what somebody would write by hand.

Publishing: W writers publish personal adapters of 200 KB, each acknowledged when it would survive a
power cut. Rival: a file and a row for each, as one would write it: written aside, fsync, renamed,
its folder fsynced, then one committed INSERT (SQLite, write-ahead log, synchronous = FULL), without
any of the registry's checks. Both take turns in one run on one disk.

Finding: N versions are loaded, ten for each user; then users' latest, versions by number and
aliases are looked up at random.

    python benchmarks/registry.py --writers 1 16 --repeats 5 --versions 1000000
"""

import argparse
import hashlib
import os
import secrets
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path

import numpy as np

from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.encoding import digest, encode, encode_personal
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator.records import AliasMove, Owner
from fedia3.coordinator.registry import Registry

SCALES = 50_000  # float32: 200 KB
SCHEMA = Schema("b" * 64, (Target("layers.0.k", "k", SCALES),))
VERSIONS_OF_A_USER = 10
LOOKUPS = 20_000

Publish = Callable[[int], None]  # by the writer's number


class ByHand:
    """A file and a row for each adapter."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder / "files", folder / "by-hand.db"
        self._folder.mkdir()
        with closing(self._connected()) as database:
            database.execute(
                "CREATE TABLE version (user TEXT, number INTEGER, digest TEXT, at INTEGER, "
                "PRIMARY KEY (user, number))"
            )
        self._writers: dict[int, sqlite3.Connection] = {}
        self._number = count()

    def _connected(self) -> sqlite3.Connection:
        database = sqlite3.connect(
            self._path, timeout=30, isolation_level=None, check_same_thread=False
        )
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        return database

    def publish(self, writer: int) -> None:
        """One adapter, durable when this returns."""
        if writer not in self._writers:
            self._writers[writer] = self._connected()
        database = self._writers[writer]
        data = part(np.random.default_rng())
        name = hashlib.sha256(data).hexdigest()
        aside = self._folder / f"{name}.tmp"
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(self._folder / name)
        folder = os.open(self._folder, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        database.execute("BEGIN IMMEDIATE")
        database.execute(
            "INSERT INTO version VALUES (?, ?, ?, ?)",
            (f"user {writer}", next(self._number), name, time.time_ns()),
        )
        database.execute("COMMIT")


EVERYONE = Adapter.ones(SCHEMA)


def delta(draw: np.random.Generator) -> PersonalAdapter:
    """A part that nobody has published yet."""
    return PersonalAdapter(
        SCHEMA, draw.normal(0, 0.05, SCALES).astype(np.float32), digest(encode(EVERYONE))
    )


def part(draw: np.random.Generator) -> bytes:
    """Its file."""
    return encode_personal(delta(draw))


def rate(publish: Publish, writers: int, seconds: float) -> tuple[float, list[float]]:
    """Publishes a second, and how long each took, s."""
    ends, took = time.monotonic() + seconds, list[float]()

    def work(writer: int) -> None:
        while (began := time.monotonic()) < ends:
            publish(writer)
            took.append(time.monotonic() - began)

    began = time.monotonic()
    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(work, range(writers)))
    return len(took) / (time.monotonic() - began), took


def compare_publishing(writers: int, repeats: int, seconds: float) -> None:
    """A line for this many writers."""
    with tempfile.TemporaryDirectory() as folder, Registry.open(Path(folder) / "r") as registry:
        registry.publish_global(EVERYONE)

        def ours(writer: int) -> None:
            own = delta(np.random.default_rng())
            registry.publish_personal(
                f"user {writer}", own, num_examples=1, idem_key=secrets.token_hex(8)
            )

        by_hand = ByHand(Path(folder))
        rates: dict[str, list[float]] = {"registry": [], "by hand": []}
        latencies: dict[str, list[float]] = {"registry": [], "by hand": []}
        for _ in range(repeats):
            for name, publish in (("registry", ours), ("by hand", by_hand.publish)):
                per_s, took = rate(publish, writers, seconds)
                rates[name].append(per_s)
                latencies[name] += took
    for name, found in rates.items():
        p50, p99 = np.percentile(latencies[name], (50, 99)) * 1000
        print(
            f"{writers:>3} writers  {name:<9} {statistics.median(found):7.0f}/s of {repeats} "
            f"({min(found):.0f} to {max(found):.0f})  p50 {p50:6.1f} ms  p99 {p99:7.1f} ms",
            flush=True,
        )
    ratio = statistics.median(rates["registry"]) / statistics.median(rates["by hand"])
    print(f"             registry / by hand: {ratio:.2f}", flush=True)


def load(path: Path, users: int) -> None:
    """Ten versions of each user, straight into the tables."""
    with closing(sqlite3.connect(path)) as database, database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(adapter_version)")]
        filled = {
            "form": "personal", "schema_digest": SCHEMA.digest, "round_num": 0, "num_examples": 1,
            "metrics": "{}", "parent": None, "global_digest": digest(encode(EVERYONE)),
            "created_ms": 0, "idem_key": None,
        }  # fmt: skip
        lines = "INSERT INTO adapter (id, owner_kind, owner_name, base, next_version, revision) "
        database.executemany(
            f"{lines} VALUES (?, 'user', ?, ?, 11, 10)",
            ((user + 10, f"user {user}", SCHEMA.base_digest) for user in range(users)),
        )

        def rows() -> Iterator[tuple[object, ...]]:
            for user in range(users):
                for version in range(1, VERSIONS_OF_A_USER + 1):
                    name = hashlib.sha256(b"%d %d" % (user, version)).hexdigest()
                    row = {**filled, "adapter_id": user + 10, "version": version, "digest": name}
                    yield tuple(row.get(column) for column in columns)

        marks = ", ".join("?" * len(columns))
        database.executemany(f"INSERT INTO adapter_version VALUES ({marks})", rows())


def look_up(versions: int) -> None:
    """Lines for each kind of question."""
    users = versions // VERSIONS_OF_A_USER
    with tempfile.TemporaryDirectory() as folder:
        with Registry.open(Path(folder)) as registry:  # makes the tables
            registry.publish_global(EVERYONE)
        began = time.monotonic()
        load(Path(folder) / "registry.db", users)
        size = (Path(folder) / "registry.db").stat().st_size
        print(
            f"{versions:,} versions loaded in {time.monotonic() - began:.0f} s, {size / 1e6:.0f} MB"
        )
        draw = np.random.default_rng(0)
        with Registry.open(Path(folder)) as registry:
            owners = [Owner.user(f"user {draw.integers(users)}") for _ in range(LOOKUPS)]
            for owner in owners[:2000]:
                registry.promote(
                    AliasMove(owner=owner, base=SCHEMA.base_digest, name="stable", version=5)
                )
            for what, which, asked in (
                ("latest", "latest", owners),
                ("by number", 3, owners),
                ("by alias", "stable", owners[:2000] * 10),
            ):
                took = []
                for owner in asked:
                    began = time.perf_counter()
                    registry.find(owner, SCHEMA.base_digest, which)
                    took.append(time.perf_counter() - began)
                p50, p99, most = np.percentile(took, (50, 99, 100)) * 1000
                print(
                    f"  find {what:<10} p50 {p50:.3f} ms  p99 {p99:.3f} ms  most {most:.1f} ms",
                    flush=True,
                )


def main() -> None:
    """Publishing, then finding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--writers", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--versions", type=int, default=1_000_000)
    args = parser.parse_args()
    for writers in args.writers:
        compare_publishing(writers, args.repeats, args.seconds)
    look_up(args.versions)


if __name__ == "__main__":
    main()
