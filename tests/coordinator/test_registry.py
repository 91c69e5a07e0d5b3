"""The registry's rules, on every store; at the end it is killed again and again."""

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator.blobs import MemoryBlobs
from fedia3.coordinator.records import (
    AdapterDraft,
    AdapterRecord,
    AliasEvent,
    AliasMove,
    Contribution,
    Owner,
    RoundCommit,
)
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.stores.memory import MemoryStore
from fedia3.errors import BadAdapter, BadInput, BadSetting, Conflict, Corrupt, NotFound

BASE = "b" * 64
SCHEMA = Schema(BASE, (Target("layers.0.k", "k", 2),))
EVERYONE = Owner.everyone()


@pytest.fixture(params=["memory", "folder"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    """An empty registry on each kind of store."""
    in_memory = request.param == "memory"
    with Registry.in_memory() if in_memory else Registry.open(tmp_path) as registry:
        yield registry


def adapter(*scales: float) -> Adapter:
    """An adapter with these two scales."""
    return Adapter(SCHEMA, np.array(scales, dtype=np.float32))


def personal(*delta: float, on: Adapter, schema: Schema = SCHEMA) -> PersonalAdapter:
    """A part with this delta, trained on the global adapter ``on``."""
    digest = encoding.digest(encoding.encode(on))
    return PersonalAdapter(schema, np.array(delta, dtype=np.float32), digest)


def test_a_published_adapter_is_fetched_as_the_same_bytes(registry: Registry) -> None:
    """
    What everyone fetches decodes to the adapter that was published.
    """
    published = registry.publish_global(adapter(1, 2))
    record, data = registry.fetch(EVERYONE, BASE)
    assert record == published
    assert encoding.decode(data, SCHEMA) == adapter(1, 2)


def test_erasing_a_user_deletes_their_bytes(registry: Registry) -> None:
    """
    Anna's own bytes are gone; those that bob has as well stay his, and she may publish again.
    """
    registry.publish_global(adapter(1, 2))
    mine = registry.publish_personal("anna", personal(1, 1, on=adapter(1, 2)), num_examples=1)
    same = personal(0, 0, on=adapter(1, 2))
    both = registry.publish_personal("anna", same, num_examples=1)
    registry.publish_personal("bob", same, num_examples=1)
    assert registry.erase_user("anna").tombstone.versions == 2
    assert not registry.blobs.has(mine.digest)
    assert registry.blobs.has(both.digest)
    assert registry.resolve("anna", SCHEMA).personal is None
    assert registry.resolve("bob", SCHEMA).personal is not None
    assert registry.publish_personal("anna", same, num_examples=1).version == 3


def test_an_erasure_that_was_cut_short_is_finished_by_asking_again(registry: Registry) -> None:
    """
    With the bytes gone and the version still there, erasing again ends without any of it.
    """
    registry.publish_global(adapter(1, 2))
    mine = registry.publish_personal("anna", personal(1, 1, on=adapter(1, 2)), num_examples=1)
    registry.blobs.delete(mine.digest)
    assert registry.erase_user("anna").tombstone.versions == 1
    assert registry.versions(Owner.user("anna"), BASE) == ()


def test_an_erased_users_row_leaves_no_trace_in_the_file(tmp_path: Path) -> None:
    """
    The database's file does not hold the deleted version's digest any more.
    """
    with Registry.open(tmp_path) as registry:
        registry.publish_global(adapter(1, 2))
        mine = registry.publish_personal("anna", personal(1, 1, on=adapter(1, 2)), num_examples=1)
        registry.erase_user("anna")
    assert mine.digest.encode() not in (tmp_path / "registry.db").read_bytes()


def test_an_older_version_is_fetched_by_its_number(registry: Registry) -> None:
    """
    Version 1 is served after version 2 was published.
    """
    registry.publish_global(adapter(1, 1))
    registry.publish_global(adapter(2, 2))
    _record, data = registry.fetch(EVERYONE, BASE, 1)
    assert encoding.decode(data, SCHEMA) == adapter(1, 1)


def test_each_version_names_the_one_before_as_its_parent(registry: Registry) -> None:
    """
    The first version has no parent, the second the first.
    """
    first = registry.publish_global(adapter(1, 1))
    second = registry.publish_global(adapter(2, 2))
    assert (first.parent, second.parent) == (None, first.digest)


def test_a_user_is_served_their_own_part_on_the_global(registry: Registry) -> None:
    """
    Global (1, 2) with Anna's part (0.5, -0.5) gives Anna (1.5, 1.5).
    """
    registry.publish_global(adapter(1, 2))
    mine = registry.publish_personal("anna", personal(0.5, -0.5, on=adapter(1, 2)), num_examples=3)
    served = registry.resolve("anna", SCHEMA)
    assert served.adapter == adapter(1.5, 1.5)
    assert served.record == mine


def test_half_of_a_users_part_may_be_asked_for(registry: Registry) -> None:
    """
    With alpha 0.5, a part of (0.5, -0.5) moves the global (1, 2) to (1.25, 1.75).
    """
    registry.publish_global(adapter(1, 2))
    registry.publish_personal("anna", personal(0.5, -0.5, on=adapter(1, 2)), num_examples=3)
    assert registry.resolve("anna", SCHEMA, alpha=0.5).adapter == adapter(1.25, 1.75)


def test_a_users_part_outlives_the_global_it_was_trained_on(registry: Registry) -> None:
    """
    A part of (0.5, 0) trained on (1, 1) is served on the newest global (3, 3) as (3.5, 3).
    """
    registry.publish_global(adapter(1, 1))
    registry.publish_personal("anna", personal(0.5, 0, on=adapter(1, 1)), num_examples=3)
    newest = registry.publish_global(adapter(3, 3))
    served = registry.resolve("anna", SCHEMA)
    assert served.adapter == adapter(3.5, 3)
    assert served.everyone == newest


def test_a_user_without_a_part_is_served_the_global(registry: Registry) -> None:
    """
    Bob never published: he gets everyone's adapter, not Anna's.
    """
    everyone = registry.publish_global(adapter(1, 2))
    registry.publish_personal("anna", personal(0.5, 0.5, on=adapter(1, 2)), num_examples=3)
    served = registry.resolve("bob", SCHEMA)
    assert served.adapter == adapter(1, 2)
    assert (served.personal, served.record) == (None, everyone)


def test_nobody_is_served_before_there_is_a_global(registry: Registry) -> None:
    """
    An empty registry has nothing to serve, and says so.
    """
    with pytest.raises(NotFound, match="everyone has no adapter"):
        registry.resolve("anna", SCHEMA)


def test_a_personal_adapter_names_a_global_that_was_published(registry: Registry) -> None:
    """
    A part trained on bytes that the registry never saw is refused.
    """
    registry.publish_global(adapter(1, 1))
    with pytest.raises(NotFound, match="no version of everyone"):
        registry.publish_personal("anna", personal(0, 0, on=adapter(2, 2)), num_examples=3)
    assert registry.owners("user") == ()


def test_another_users_adapter_is_no_global(registry: Registry) -> None:
    """
    The digest of a user's version does not pass for a global version's.
    """
    registry.publish_global(adapter(1, 1))
    mine = registry.publish_personal("anna", personal(0, 0, on=adapter(1, 1)), num_examples=3)
    with pytest.raises(NotFound):
        registry.publish_personal(
            "bob", PersonalAdapter(SCHEMA, np.zeros(2, np.float32), mine.digest), num_examples=3
        )


def test_a_global_of_another_base_is_no_anchor(registry: Registry) -> None:
    """
    A part for one base model cannot be relative to another base model's global.
    """
    other = Schema("c" * 64, SCHEMA.targets)
    registry.publish_global(adapter(1, 1))
    with pytest.raises(NotFound):
        registry.publish_personal(
            "anna", personal(0, 0, on=adapter(1, 1), schema=other), num_examples=3
        )


def test_a_part_for_other_targets_than_its_global_is_refused(registry: Registry) -> None:
    """
    Same base model, other module: the part could never be added to its global.
    """
    values = Schema(BASE, (Target("layers.0.v", "v", 2),))
    registry.publish_global(adapter(1, 1))
    with pytest.raises(BadAdapter, match="other targets"):
        registry.publish_personal(
            "anna", personal(0, 0, on=adapter(1, 1), schema=values), num_examples=3
        )


def test_a_personal_version_remembers_where_it_comes_from(registry: Registry) -> None:
    """
    A part trained on round 4's global carries this round, that digest, and its own parent.
    """
    on = registry.commit_round(4, b"state", adapter(1, 1))
    first = registry.publish_personal("anna", personal(1, 0, on=adapter(1, 1)), num_examples=3)
    second = registry.publish_personal("anna", personal(2, 0, on=adapter(1, 1)), num_examples=3)
    assert (second.round_num, second.global_digest) == (4, on.digest)
    assert second.parent == first.digest


def test_a_lost_answer_may_be_asked_for_again(registry: Registry) -> None:
    """
    The same publish with the same key gives the same version; other bytes conflict.
    """
    registry.publish_global(adapter(1, 1))
    part, other = personal(1, 0, on=adapter(1, 1)), personal(2, 0, on=adapter(1, 1))
    first = registry.publish_personal("anna", part, num_examples=3, idem_key="k")
    assert registry.publish_personal("anna", part, num_examples=3, idem_key="k") == first
    with pytest.raises(Conflict):
        registry.publish_personal("anna", other, num_examples=3, idem_key="k")


def promoted(registry: Registry, *versions: int | None) -> AliasEvent:
    """``stable`` of everyone's, moved from version to version."""
    for version in versions:
        move = AliasMove(owner=EVERYONE, base=BASE, name="stable", version=version)
        moved = registry.promote(move)
    return moved


def published(registry: Registry, count: int) -> Registry:
    """The registry with everyone's versions 1, 2, …, of which number n has scales of n."""
    for number in range(1, count + 1):
        registry.publish_global(adapter(number, number))
    return registry


def test_a_version_is_found_by_number_digest_and_alias(registry: Registry) -> None:
    """
    ``latest`` moves by itself, other aliases by hand.
    """
    published(registry, 3)
    promoted(registry, 2)
    second = registry.find(EVERYONE, BASE, 2)
    assert registry.find(EVERYONE, BASE, "stable") == second
    assert registry.find(EVERYONE, BASE, second.digest) == second
    assert registry.find(EVERYONE, BASE, "latest").version == 3
    assert registry.fetch(EVERYONE, BASE, "stable")[0] == second
    with pytest.raises(NotFound, match="canary"):
        registry.find(EVERYONE, BASE, "canary")
    with pytest.raises(NotFound, match="digest"):
        registry.find(EVERYONE, BASE, "f" * 64)


def test_a_user_is_served_on_a_global_that_was_promoted(registry: Registry) -> None:
    """
    A part of (0.5, 0) on (1, 1), which is stable, while (2, 2) is the newest.
    """
    published(registry, 2)
    promoted(registry, 1)
    registry.publish_personal("anna", personal(0.5, 0, on=adapter(1, 1)), num_examples=3)
    served = registry.resolve("anna", SCHEMA, which="stable")
    assert (served.adapter, served.everyone.version) == (adapter(1.5, 1), 1)


@pytest.mark.parametrize(
    "name",
    ["latest", "", "3", "0x", "a b", "a/b", "../a", "ä", "-a", ".a", "a" * 129, "a\n", "f" * 64],
)
def test_names_that_are_no_alias_are_refused(registry: Registry, name: str) -> None:
    """
    They would be taken for versions or digests, or could not be typed.
    """
    published(registry, 1)
    with pytest.raises(BadInput, match="alias"):
        AliasMove(owner=EVERYONE, base=BASE, name=name, version=1)
    if name not in ("latest", "f" * 64):
        with pytest.raises(BadInput, match="alias"):
            registry.find(EVERYONE, BASE, name)


def test_rolling_back_is_a_new_move_to_the_version_before(registry: Registry) -> None:
    """
    So a second one goes forward again; where an alias was dropped in between does not count.
    """
    published(registry, 3)
    promoted(registry, 1, None, 3)
    moved = registry.roll_back(EVERYONE, BASE, "stable", reason="worse for many")
    assert (moved.version, moved.rev, moved.reason) == (1, 4, "worse for many")
    assert registry.roll_back(EVERYONE, BASE, "stable").version == 3


def test_a_rollback_whose_answer_was_lost_may_be_asked_for_again(registry: Registry) -> None:
    """
    With the revision that was seen it happens once.
    """
    published(registry, 3)
    seen = promoted(registry, 1, 2)
    first = registry.roll_back(EVERYONE, BASE, "stable", expected_rev=seen.rev)
    assert registry.roll_back(EVERYONE, BASE, "stable", expected_rev=seen.rev) == first
    with pytest.raises(Conflict, match="revision 4"):
        promoted(registry, 3)
        registry.roll_back(EVERYONE, BASE, "stable", expected_rev=seen.rev)


def test_there_is_nothing_to_roll_back_to(registry: Registry) -> None:
    """
    No alias, one that never moved, a dropped one, a version that was yanked since.
    """
    published(registry, 3)
    with pytest.raises(NotFound, match="stable"):
        registry.roll_back(EVERYONE, BASE, "stable")
    promoted(registry, 1)
    with pytest.raises(Conflict, match="no other version before"):
        registry.roll_back(EVERYONE, BASE, "stable")
    promoted(registry, 2)
    registry.store.yank(EVERYONE, BASE, 1)
    with pytest.raises(Conflict, match="yanked"):
        registry.roll_back(EVERYONE, BASE, "stable")
    promoted(registry, None)
    with pytest.raises(NotFound, match="stable"):
        registry.roll_back(EVERYONE, BASE, "stable")


def test_a_yanked_version_is_still_the_one_before(registry: Registry) -> None:
    """
    What was trained on it says so.
    """
    published(registry, 1)
    first = registry.find(EVERYONE, BASE)
    registry.store.yank(EVERYONE, BASE, 1)
    assert registry.publish_global(adapter(5, 5)).parent == first.digest


def test_a_round_is_remembered_with_who_took_part(registry: Registry) -> None:
    """
    Accepted examples 4 + 2 are counted, the rejected client's 100 are not.
    """
    contributions = (
        Contribution("anna", "accepted", num_examples=4, norm=0.5),
        Contribution("bob", "accepted", num_examples=2, norm=0.5),
        Contribution("mallory", "rejected", reason="norm 900 above 10", num_examples=100),
    )
    record = registry.commit_round(1, b"state", adapter(1, 2), contributions, {"loss": 2.0})
    assert (record.num_examples, record.round_num) == (6, 1)
    latest = registry.latest_round()
    assert latest is not None
    assert (latest.digest, latest.contributions) == (record.digest, contributions)
    assert registry.server_state() == b"state"
    assert registry.rounds() == (latest,)


def test_a_client_contributes_once_a_round(registry: Registry) -> None:
    """
    A round that lists a client twice is refused and leaves nothing.
    """
    twice = [Contribution("anna", "accepted"), Contribution("anna", "missing")]
    with pytest.raises(BadInput, match="twice"):
        registry.commit_round(1, b"state", adapter(1, 2), twice)
    assert registry.latest_round() is None


def test_damaged_bytes_are_not_served(tmp_path: Path) -> None:
    """
    One flipped bit at rest, and fetch says corrupt instead of handing out the adapter.
    """
    with Registry.open(tmp_path) as registry:
        name = registry.publish_global(adapter(1, 2)).digest
        path = tmp_path / "blobs" / name[:2] / name[2:4] / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(Corrupt):
            registry.fetch(EVERYONE, BASE)


def test_a_version_without_its_bytes_is_corrupt(tmp_path: Path) -> None:
    """
    A blob that somebody removed is damage, not "no such version".
    """
    with Registry.open(tmp_path) as registry:
        name = registry.publish_global(adapter(1, 2)).digest
        (tmp_path / "blobs" / name[:2] / name[2:4] / name).unlink()
        with pytest.raises(Corrupt, match=r"version 1 of everyone are gone.*backup"):
            registry.fetch(EVERYONE, BASE)


def test_the_bytes_are_kept_before_the_version_is_known() -> None:
    """
    When the database refuses, the blob is there and no version refers to it.
    """

    class Refusing(MemoryStore):
        def publish(
            self,
            draft: AdapterDraft,
            at: datetime,
            idem_key: str | None = None,
            began_at: datetime | None = None,
        ) -> AdapterRecord:
            raise Conflict("busy")

    registry = Registry(Refusing(), MemoryBlobs())
    with pytest.raises(Conflict):
        registry.publish_global(adapter(1, 2))
    assert len(list(registry.blobs.digests())) == 1
    assert registry.versions(EVERYONE, BASE) == ()


def test_a_folder_is_opened_again_where_it_was_left(tmp_path: Path) -> None:
    """
    A second opening finds the version and the round of the first.
    """
    folder = tmp_path / "new" / "run?x=1 50%"
    with Registry.open(folder) as registry:
        record = registry.commit_round(1, b"state", adapter(1, 2))
    with Registry.open(folder) as registry:
        assert registry.fetch(EVERYONE, BASE)[0] == record
        assert registry.server_state() == b"state"
    assert sorted(path.name for path in folder.iterdir()) == ["blobs", "registry.db"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """
    A file where the folder should be is an unusable setting.
    """
    (tmp_path / "file").write_text("")
    with pytest.raises(BadSetting, match="choose a folder"):
        Registry.open(tmp_path / "file")


def test_times_are_kept_to_the_millisecond() -> None:
    """
    A clock's microseconds are cut, so that a record is the same before and after it was stored.
    """
    clock = datetime(2030, 1, 2, 3, 4, 5, 678_999, tzinfo=UTC)
    registry = Registry.in_memory(lambda: clock)
    assert registry.publish_global(adapter(1, 2)).created_at.microsecond == 678_000


@pytest.mark.parametrize(
    "name",
    [
        "Alls well that ends well/COUNTESS",
        "scenario:email",
        "bob2",
        "_[nick]|away^",
        "../../etc/passwd",
        "'; DROP TABLE adapter; --",
        "Zoë 😀",
        "x" * 128,
    ],
)
def test_real_names_are_taken_as_they_are(registry: Registry, name: str) -> None:
    """
    A name is a key and never a path, so slashes, colons, brackets and quotes are all fine.
    """
    registry.publish_global(adapter(1, 1))
    registry.publish_personal(name, personal(1, 1, on=adapter(1, 1)), num_examples=1)
    assert registry.resolve(name, SCHEMA).adapter == adapter(2, 2)
    assert registry.owners("user") == (Owner.user(name),)


@pytest.mark.parametrize("name", ["", "   ", "x" * 129, "a\x00b", "a\nb", "\x1b[31m", "\ud800"])
def test_names_that_cannot_be_kept_or_shown_are_refused(name: str) -> None:
    """
    Empty, too long, with control characters or half a character: no owner.
    """
    with pytest.raises(BadInput, match="a user's name"):
        Owner.user(name)


def test_two_spellings_of_one_name_are_one_owner() -> None:
    """
    "é" as one character and as "e" with an accent name the same user.
    """
    assert Owner.user("Rene\u0301") == Owner.user("Ren\u00e9")


def test_everyone_has_no_name() -> None:
    """
    There is one global owner; a named one is a mistake.
    """
    with pytest.raises(BadInput):
        Owner("global", "anna")


def draft(**fields: object) -> AdapterDraft:
    """A sound draft of everyone's, but for the given fields."""
    sound: dict[str, object] = {
        "owner": EVERYONE,
        "form": "adapter",
        "digest": "0" * 64,
        "schema_digest": "0" * 64,
        "base": BASE,
        "round_num": 0,
        "num_examples": 0,
    }
    return AdapterDraft(**(sound | fields))  # type: ignore[arg-type]  # some are wrong on purpose


@pytest.mark.parametrize(
    "field, value",
    [
        ("digest", "0" * 63),
        ("digest", "G" * 64),
        ("base", "../base"),
        ("schema_digest", ""),
        ("parent", "x"),
        ("round_num", -1),
        ("num_examples", -80),
        ("num_examples", 2**63),
        ("metrics", {"loss": float("nan")}),
        ("metrics", {"loss": float("inf")}),
        ("metrics", {"loss": "1.0"}),
        ("metrics", {"x" * 4100: 1.0}),
        ("form", "personal"),
        ("global_digest", "0" * 64),
    ],
)
def test_an_unsound_draft_cannot_be_built(field: str, value: object) -> None:
    """
    With all fields sound it can, with one of them wrong it is refused.
    """
    assert draft().digest == "0" * 64
    with pytest.raises(BadInput):
        draft(**{field: value})


def test_a_user_publishes_parts_of_a_global() -> None:
    """
    A user's draft has to be personal and to name its global version.
    """
    anna = Owner.user("anna")
    with pytest.raises(BadInput, match="personal"):
        draft(owner=anna)
    with pytest.raises(BadInput, match="global version"):
        draft(owner=anna, form="personal")


def test_numpy_numbers_are_metrics_too() -> None:
    """
    A float32 out of training is kept as a plain float.
    """
    kept = draft(metrics={"loss": np.float32(0.5)}).metrics
    assert kept == {"loss": 0.5}
    assert type(kept["loss"]) is float


@pytest.mark.parametrize(
    "fields",
    [
        {"client": ""},
        {"verdict": "maybe"},
        {"num_examples": -80},
        {"num_examples": 10**30},
        {"norm": float("nan")},
        {"metrics": {"loss": float("nan")}},
    ],
)
def test_an_unsound_contribution_cannot_be_built(fields: dict[str, object]) -> None:
    """
    What a store could not keep is refused before a round is at stake.
    """
    with pytest.raises(BadInput):
        Contribution(**({"client": "anna", "verdict": "accepted"} | fields))  # type: ignore[arg-type]  # wrong on purpose


def test_a_reason_that_quotes_a_stranger_can_be_kept() -> None:
    """
    Half a character becomes "?", and the 600 characters around it are cut to 500.
    """
    reason = Contribution("anna", "rejected", reason="\ud800" + "x" * 599).reason
    assert reason == "?" + "x" * 499


def test_a_round_commit_is_everyones_adapter_of_that_round() -> None:
    """
    Round 2 takes no adapter of round 1, and no user's.
    """
    mine = draft(owner=Owner.user("anna"), form="personal", global_digest="0" * 64)
    with pytest.raises(BadInput, match="round 1"):
        RoundCommit(2, b"", draft(round_num=1))
    with pytest.raises(BadInput, match="everyone's"):
        RoundCommit(0, b"", mine)


COMMIT_FOR_EVER = f"""
import sys
from pathlib import Path
import numpy as np
from fedia3.adapters.adapter import Adapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator.records import Contribution
from fedia3.coordinator.registry import Registry

schema = Schema({BASE!r}, (Target("layers.0.k", "k", 2),))
registry = Registry.open(Path(sys.argv[1]))
latest = registry.latest_round()
round_num = 0 if latest is None else latest.round_num + 1
while True:
    adapter = Adapter(schema, np.array([1, 1 + round_num / 1000], dtype=np.float32))
    people = [Contribution(str(n), "accepted", num_examples=1) for n in range(3)]
    registry.commit_round(round_num, str(round_num).encode(), adapter, people)
    print(round_num, flush=True)
    round_num += 1
"""


def last_acknowledged_before_kill(folder: Path, after_s: float) -> int:
    """Commit rounds in another process, kill it some time after its first acknowledgement."""
    with subprocess.Popen(
        [sys.executable, "-c", COMMIT_FOR_EVER, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(after_s)
        process.send_signal(signal.SIGKILL)
        acknowledged = [first, *process.stdout]
    return int([line for line in acknowledged if line.endswith("\n")][-1])


def assert_nothing_is_torn(folder: Path) -> None:
    """The file is sound, every version has its bytes, every round its people."""
    with closing(sqlite3.connect(folder / "registry.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    with Registry.open(folder) as registry:
        rounds, versions = registry.rounds(), registry.versions(EVERYONE, BASE)
        assert [r.round_num for r in rounds] == list(range(len(rounds)))
        assert [v.version for v in reversed(versions)] == [r.version for r in rounds]
        assert all(len(r.contributions) == 3 for r in rounds)
        assert all(registry.fetch(EVERYONE, BASE, v.version)[1] for v in versions)
        assert registry.server_state() == str(rounds[-1].round_num).encode()


@pytest.mark.slow
def test_no_acknowledged_round_is_lost_to_a_kill(tmp_path: Path) -> None:
    """
    Killed 15 times at random moments, each process goes on behind the last round acknowledged.

    The round under way may be there or not; it is never there in part.
    """
    pauses = random.Random(0)
    for _ in range(15):
        acknowledged = last_acknowledged_before_kill(tmp_path, pauses.uniform(0, 0.1))
        with Registry.open(tmp_path) as registry:
            latest = registry.latest_round()
        assert latest is not None
        assert latest.round_num in (acknowledged, acknowledged + 1)
        assert_nothing_is_torn(tmp_path)
