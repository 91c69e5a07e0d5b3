"""What every store promises; a new backend joins the ``store`` fixture and passes."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedia3.coordinator.records import (
    AdapterDraft,
    AdapterRecord,
    AliasMove,
    Contribution,
    Owner,
    RoundCommit,
)
from fedia3.coordinator.store import Store
from fedia3.coordinator.stores.memory import MemoryStore
from fedia3.coordinator.stores.sql import SqlStore
from fedia3.errors import (
    BadInput,
    BadSetting,
    Conflict,
    Erased,
    NotFound,
    StorageFailed,
    WrongBaseModel,
)

NOON = datetime(2030, 1, 2, 12, 0, tzinfo=UTC)
LATER = NOON + timedelta(milliseconds=1)
BASE, OTHER_BASE = "b" * 64, "c" * 64
EVERYONE, ANNA, BOB = Owner.everyone(), Owner.user("anna"), Owner.user("bob")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/registry.db"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store of each kind."""
    store: Store
    if request.param == "memory":
        store = MemoryStore()
    elif request.param == "sqlite":
        store = SqlStore.at(tmp_path / "registry.db")
    else:
        store = SqlStore(request.getfixturevalue("postgres_url"))
    yield store
    store.close()


def digest(number: int) -> str:
    """A digest that a test can tell from others."""
    return f"{number:064x}"


def draft(owner: Owner = EVERYONE, number: int = 1, **fields: object) -> AdapterDraft:
    """A sound draft with the bytes ``digest(number)``, but for the given fields."""
    personal = owner.kind == "user"
    plain = AdapterDraft(
        owner=owner,
        form="personal" if personal else "adapter",
        digest=digest(number),
        schema_digest="a" * 64,
        base=BASE,
        round_num=0,
        num_examples=7,
        metrics={"loss": 0.5},
        global_digest=digest(99) if personal else None,
    )
    return replace(plain, **fields)  # type: ignore[arg-type]  # the test names real fields


def commit(round_num: int, number: int | None = None, **fields: object) -> RoundCommit:
    """A round of three clients, but for the given fields; its bytes are its own number's."""
    number = round_num if number is None else number
    plain = RoundCommit(
        round_num=round_num,
        state=f"state {round_num}".encode(),
        draft=draft(number=number, round_num=round_num),
        contributions=(
            Contribution("zoe", "accepted", num_examples=4, norm=0.25, metrics={"loss": 1.5}),
            Contribution("adam", "rejected", reason="not finite"),
            Contribution("mia", "missing", reason="deadline"),
        ),
        metrics={"loss": 2.5},
    )
    return replace(plain, **fields)  # type: ignore[arg-type]  # the test names real fields


def erase(store: Store, owner: Owner, base: str | None = None) -> int:
    """Erase at noon, with no bytes to remove; how many versions there were."""
    return store.erase(owner, base, NOON, lambda digest: None).versions


def test_an_owners_versions_count_from_one(store: Store) -> None:
    """
    The first publish is version 1, the second version 2.
    """
    assert store.publish(draft(ANNA, 1), NOON).version == 1
    assert store.publish(draft(ANNA, 2), NOON).version == 2


def test_owners_and_bases_count_apart(store: Store) -> None:
    """
    Another owner, or the same owner on another base model, starts at version 1 again.
    """
    store.publish(draft(ANNA, 1), NOON)
    assert store.publish(draft(BOB, 2), NOON).version == 1
    assert store.publish(draft(ANNA, 3, base=OTHER_BASE), NOON).version == 1


def test_a_user_named_like_nobody_is_not_everyone(store: Store) -> None:
    """
    A user may be called "global" without getting everyone's adapter.
    """
    store.publish(draft(EVERYONE, 1), NOON)
    with pytest.raises(NotFound):
        store.find(Owner.user("global"), BASE)


def test_a_record_comes_back_as_it_was_published(store: Store) -> None:
    """
    Every field survives the store, the time to the millisecond.
    """
    at = NOON + timedelta(milliseconds=3)
    store.publish(draft(ANNA, 1), NOON)
    second = draft(ANNA, 2, parent=digest(1), metrics={"b": 0.1, "a": -3.0}, num_examples=2**63 - 1)
    published = store.publish(second, at)
    assert published == AdapterRecord(**vars(second), version=2, created_at=at)
    assert store.find(ANNA, BASE, 2) == published


def test_find_gives_the_latest_version_unless_one_is_named(store: Store) -> None:
    """
    After two publishes, find without a version gives the second, and version 1 is still there.
    """
    store.publish(draft(ANNA, 1), NOON)
    store.publish(draft(ANNA, 2), NOON)
    assert store.find(ANNA, BASE).digest == digest(2)
    assert store.find(ANNA, BASE, 1).digest == digest(1)


@pytest.mark.parametrize("version", [0, -1, 2, 2**63, 10**30])
def test_a_version_that_never_was_is_not_found(store: Store, version: int) -> None:
    """
    Zero, negative, future and absurd version numbers are all simply not there.
    """
    store.publish(draft(ANNA, 1), NOON)
    with pytest.raises(NotFound, match=f"user 'anna' has no version {version} "):
        store.find(ANNA, BASE, version)


def test_an_owner_without_versions_is_not_found(store: Store) -> None:
    """
    An owner who published for another base only has nothing for this one.
    """
    store.publish(draft(ANNA, 1, base=OTHER_BASE), NOON)
    with pytest.raises(NotFound, match="user 'anna' has no adapter"):
        store.find(ANNA, BASE)
    assert store.versions(ANNA, BASE) == ()


def test_versions_are_listed_newest_first(store: Store) -> None:
    """
    Three publishes are listed as 3, 2, 1.
    """
    for number in (1, 2, 3):
        store.publish(draft(ANNA, number), NOON)
    assert [record.version for record in store.versions(ANNA, BASE)] == [3, 2, 1]


def test_versions_are_listed_in_pages(store: Store) -> None:
    """
    Of versions 1 to 4, two below 4 are 3 and 2; below 1 there are none.
    """
    for number in range(1, 5):
        store.publish(draft(ANNA, number), NOON)
    assert [r.version for r in store.versions(ANNA, BASE, before=4, limit=2)] == [3, 2]
    assert [r.version for r in store.versions(ANNA, BASE, limit=3)] == [4, 3, 2]
    assert len(store.versions(ANNA, BASE, before=2**63)) == 4
    assert store.versions(ANNA, BASE, before=1) == ()


def test_a_digest_finds_the_newest_version_with_these_bytes(store: Store) -> None:
    """
    Bytes published as version 1 and again as version 3 are found as version 3.
    """
    for number in (1, 2, 1):
        store.publish(draft(ANNA, number), NOON)
    assert store.find_digest(ANNA, BASE, digest(1)).version == 3


def test_a_digest_of_another_owner_is_not_found(store: Store) -> None:
    """
    Nobody learns from a digest what another owner published.
    """
    store.publish(draft(ANNA, 1), NOON)
    with pytest.raises(NotFound):
        store.find_digest(BOB, BASE, digest(1))


def test_a_version_may_continue_any_earlier_version_of_its_owner(store: Store) -> None:
    """
    Version 3 may name version 1 as its parent.
    """
    store.publish(draft(ANNA, 1), NOON)
    store.publish(draft(ANNA, 2), NOON)
    assert store.publish(draft(ANNA, 3, parent=digest(1)), NOON).parent == digest(1)


@pytest.mark.parametrize("owner, base", [(BOB, BASE), (ANNA, OTHER_BASE)])
def test_a_parent_of_another_line_is_refused(store: Store, owner: Owner, base: str) -> None:
    """
    A parent that belongs to another owner or another base is refused, and costs no number.
    """
    store.publish(draft(ANNA, 1), NOON)
    with pytest.raises(NotFound):
        store.publish(draft(owner, 2, base=base, parent=digest(1)), NOON)
    assert store.publish(draft(owner, 2, base=base), NOON).version == 1


def test_a_repeated_key_publishes_once(store: Store) -> None:
    """
    The same key with the same bytes returns the version and the time of the first call.
    """
    first = store.publish(draft(ANNA, 1), NOON, idem_key="k")
    again = store.publish(draft(ANNA, 1), NOON + timedelta(hours=1), idem_key="k")
    assert again == first
    assert len(store.versions(ANNA, BASE)) == 1


def test_a_repeated_key_with_other_bytes_is_a_conflict(store: Store) -> None:
    """
    A key names the bytes it was first used for, for ever.
    """
    store.publish(draft(ANNA, 1), NOON, idem_key="k")
    with pytest.raises(Conflict, match="use a new key"):
        store.publish(draft(ANNA, 2), NOON, idem_key="k")


def test_keys_of_two_owners_do_not_meet(store: Store) -> None:
    """
    Two owners may use the same key for different bytes.
    """
    store.publish(draft(ANNA, 1), NOON, idem_key="k")
    assert store.publish(draft(BOB, 2), NOON, idem_key="k").digest == digest(2)


def test_publishing_twice_without_a_key_makes_two_versions(store: Store) -> None:
    """
    Same bytes, no key: versions 1 and 2.
    """
    assert [store.publish(draft(ANNA, 1), NOON).version for _ in range(2)] == [1, 2]


def test_owners_come_in_pages_by_name(store: Store) -> None:
    """
    Names are ordered by code point, each page begins behind the last name of the page before.
    """
    for name in ("b", "a", "B", "ä", "a_c", "a%c", "😀", "\uffff"):
        store.publish(draft(Owner.user(name), 1), NOON)
    first = store.owners("user", limit=5)
    second = store.owners("user", after=first[-1].name, limit=5)
    assert [o.name for o in first] == ["B", "a", "a%c", "a_c", "b"]
    assert [o.name for o in second] == ["ä", "\uffff", "😀"]


def test_an_owner_on_two_bases_is_listed_once(store: Store) -> None:
    """
    Users are listed, not their lines, and everyone is not a user.
    """
    store.publish(draft(ANNA, 1), NOON)
    store.publish(draft(ANNA, 1, base=OTHER_BASE), NOON)
    store.publish(draft(EVERYONE, 1), NOON)
    assert store.owners("user") == (ANNA,)
    assert store.owners("global") == (EVERYONE,)


def test_a_page_without_room_is_refused(store: Store) -> None:
    """
    A limit of zero would page for ever.
    """
    with pytest.raises(BadSetting):
        store.owners("user", limit=0)


def test_an_erased_users_numbers_are_not_given_again(store: Store) -> None:
    """
    After two erased versions the next one is version 3, and after that is erased, 4.
    """
    store.publish(draft(ANNA, 1), NOON)
    store.publish(draft(ANNA, 2), NOON)
    assert erase(store, ANNA) == 2
    assert store.versions(ANNA, BASE) == ()
    assert store.publish(draft(ANNA, 3), NOON).version == 3
    assert erase(store, ANNA) == 1
    assert store.publish(draft(ANNA, 3), NOON).version == 4


def test_an_erased_versions_key_stays_refused(store: Store) -> None:
    """
    Whoever repeats a publish after the erasure brings nothing back, with whatever bytes; the same
    key on another base, of another user, and a new one are free.
    """
    store.publish(draft(ANNA, 1), NOON, idem_key="one")
    erase(store, ANNA)
    for number in (1, 2):
        with pytest.raises(Erased, match="a new key"):
            store.publish(draft(ANNA, number), LATER, idem_key="one", began_at=LATER)
    store.publish(draft(ANNA, 1, base=OTHER_BASE), LATER, idem_key="one")
    store.publish(draft(BOB, 1), LATER, idem_key="one")
    assert store.publish(draft(ANNA, 1), LATER, idem_key="two", began_at=LATER).version == 2
    erase(store, ANNA)
    for key in ("one", "two"):
        with pytest.raises(Erased):
            store.publish(draft(ANNA, 1), LATER, idem_key=key)


def test_what_began_before_an_erasure_is_not_published_after_it(store: Store) -> None:
    """
    Begun at noon, erased at noon: refused, and no number is spent. Begun later it is taken, and so
    is bob's.
    """
    erase(store, ANNA)
    with pytest.raises(Erased, match="train it anew"):
        store.publish(draft(ANNA, 1), LATER, began_at=NOON)
    assert store.publish(draft(BOB, 1), LATER, began_at=NOON).version == 1
    assert store.publish(draft(ANNA, 1), LATER, began_at=LATER).version == 1


def test_an_erasure_on_one_base_refuses_nothing_on_another(store: Store) -> None:
    """
    What began before is taken on the other base; an erasure on all bases ends that as well.
    """
    erase(store, ANNA, BASE)
    store.publish(draft(ANNA, 1, base=OTHER_BASE), LATER, began_at=NOON)
    erase(store, ANNA)
    with pytest.raises(Erased):
        store.publish(draft(ANNA, 1, base=OTHER_BASE), LATER, began_at=NOON)


def test_each_erasure_has_a_receipt_of_its_own(store: Store) -> None:
    """
    Also one that had nothing to erase.
    """
    stones = [store.erase(ANNA, None, NOON, lambda digest: None) for _ in range(2)]
    assert len({stone.receipt for stone in stones}) == 2
    assert [(stone.erased_at, stone.versions) for stone in stones] == [(NOON, 0)] * 2


def test_an_erasure_that_cannot_delete_the_bytes_changes_nothing(store: Store) -> None:
    """
    The version is there, and may be erased again.
    """

    def refuse(digest: str) -> None:
        raise StorageFailed("full")

    store.publish(draft(ANNA, 1), NOON, idem_key="one")
    with pytest.raises(StorageFailed):
        store.erase(ANNA, None, NOON, refuse)
    assert store.publish(draft(ANNA, 1), NOON, idem_key="one", began_at=NOON).version == 1
    assert erase(store, ANNA) == 1


def test_the_global_versions_that_hold_an_update_are_told(store: Store) -> None:
    """
    Zoe's was accepted in rounds 1 and 2, adam's rejected, and nobody knows cyd.
    """
    store.commit_round(commit(1), NOON)
    store.commit_round(commit(2), NOON)
    store.commit_round(commit(3, contributions=()), NOON)
    assert store.accepted_from(["zoe", "cyd"]) == (1, 2)
    assert store.accepted_from(["adam"]) == ()


def test_only_what_no_version_has_is_removed(store: Store) -> None:
    """
    Of 1, 2 and 3, anna has 1 and everyone 2.
    """
    store.publish(draft(ANNA, 1), NOON)
    store.publish(draft(EVERYONE, 2), NOON)
    removed: list[str] = []
    store.remove_unused([digest(1), digest(2), digest(3)], removed.append)
    assert removed == [digest(3)]
    assert store.unused([digest(1), digest(3)]) == {digest(3)}


def test_erasing_leaves_others_and_other_bases(store: Store) -> None:
    """
    Anna's versions on one base go; hers on the other, bob's and everyone's stay.
    """
    for owner, base in ((ANNA, BASE), (ANNA, OTHER_BASE), (BOB, BASE), (EVERYONE, BASE)):
        store.publish(draft(owner, 1, base=base), NOON)
    assert erase(store, ANNA, BASE) == 1
    assert store.versions(ANNA, BASE) == ()
    for owner, base in ((ANNA, OTHER_BASE), (BOB, BASE), (EVERYONE, BASE)):
        assert len(store.versions(owner, base)) == 1
    assert erase(store, ANNA) == 1


def test_erasing_nothing_is_no_error(store: Store) -> None:
    """
    A user without versions, or one who was erased before, has none to erase.
    """
    assert erase(store, ANNA) == 0
    store.publish(draft(ANNA), NOON)
    erase(store, ANNA)
    assert erase(store, ANNA) == 0


def test_an_erased_user_owns_nothing(store: Store) -> None:
    """
    Whoever has no version is not listed.
    """
    store.publish(draft(ANNA), NOON)
    store.publish(draft(BOB), NOON)
    erase(store, ANNA)
    assert store.owners("user") == (BOB,)


def test_everyones_versions_are_not_erased(store: Store) -> None:
    """
    Rounds refer to them.
    """
    store.commit_round(commit(0), NOON)
    with pytest.raises(BadInput, match="name a user"):
        erase(store, EVERYONE)
    assert len(store.versions(EVERYONE, BASE)) == 1


def test_bytes_that_somebody_else_has_are_shared(store: Store) -> None:
    """
    Of anna's bytes 1, 2 and 3, bob has 2, and she has 3 on another base too: they are removed with
    the last of her versions, and 2 never.
    """
    for number in (1, 2, 3, 1):
        store.publish(draft(ANNA, number), NOON)
    store.publish(draft(BOB, 2), NOON)
    store.publish(draft(ANNA, 3, base=OTHER_BASE), NOON)
    removed: list[str] = []
    store.erase(ANNA, BASE, NOON, removed.append)
    assert removed == [digest(1)]
    store.erase(ANNA, None, NOON, removed.append)
    assert removed == [digest(1), digest(3)]


def test_a_new_store_has_no_round(store: Store) -> None:
    """
    Before the first round there is no state to go on from.
    """
    assert store.latest_round() is None
    assert store.server_state() is None
    assert store.rounds() == ()


def test_a_round_is_kept_whole(store: Store) -> None:
    """
    One commit gives the state, the global version and the contributions in their order.
    """
    first = commit(0)
    record = store.commit_round(first, NOON)
    latest = store.latest_round()
    assert latest is not None
    assert (latest.round_num, latest.base, latest.version) == (0, BASE, 1)
    assert (latest.digest, latest.metrics) == (digest(0), {"loss": 2.5})
    assert latest.contributions == first.contributions
    assert latest.committed_at == NOON
    assert store.server_state() == b"state 0"
    assert store.find(EVERYONE, BASE) == record


def test_rounds_are_listed_oldest_first(store: Store) -> None:
    """
    Rounds 1 and 2 come back in this order, each with its own contributions; the state is round 2's.
    """
    store.commit_round(commit(1), NOON)
    store.commit_round(commit(2, contributions=()), NOON)
    assert [(r.round_num, len(r.contributions)) for r in store.rounds()] == [(1, 3), (2, 0)]
    assert store.server_state() == b"state 2"


@pytest.mark.parametrize("round_num", [0, 1, 3])
def test_only_the_next_round_is_taken(store: Store, round_num: int) -> None:
    """
    After round 1 an older, a repeated and a skipping commit conflict and change nothing.
    """
    store.commit_round(commit(1), NOON)
    with pytest.raises(Conflict, match="round 2 is next"):
        store.commit_round(commit(round_num, number=50), NOON)
    assert store.server_state() == b"state 1"
    assert len(store.versions(EVERYONE, BASE)) == 1


def test_rounds_stay_with_their_base_model(store: Store) -> None:
    """
    A store whose rounds train one base takes no round of another.
    """
    store.commit_round(commit(1), NOON)
    other = draft(number=2, round_num=2, base=OTHER_BASE)
    with pytest.raises(WrongBaseModel):
        store.commit_round(commit(2, draft=other), NOON)


def test_a_round_with_a_foreign_parent_leaves_nothing(store: Store) -> None:
    """
    A commit that is refused half way leaves no version, no round and no gap in the numbers.
    """
    orphan = draft(number=2, round_num=0, parent=digest(77))
    with pytest.raises(NotFound):
        store.commit_round(commit(0, draft=orphan), NOON)
    assert store.latest_round() is None
    assert store.server_state() is None
    assert store.commit_round(commit(0), NOON).version == 1


def test_of_two_coordinators_one_commits_the_round(store: Store) -> None:
    """
    Four threads commit round 1 at once: one wins, three get a conflict.
    """
    store.commit_round(commit(0), NOON)

    def attempt(number: int) -> bool:
        try:
            store.commit_round(commit(1, number=number), NOON)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(attempt, range(10, 14))) == [False, False, False, True]


def test_concurrent_publishes_leave_no_gap(store: Store) -> None:
    """
    Four threads publish 50 times each for one owner: versions 1 to 200, each once.
    """

    def publish_fifty(thread: int) -> list[int]:
        drafts = [draft(ANNA, 1000 * thread + n) for n in range(50)]
        return [store.publish(d, NOON).version for d in drafts]

    with ThreadPoolExecutor(4) as pool:
        versions = [v for published in pool.map(publish_fifty, range(4)) for v in published]
    assert sorted(versions) == list(range(1, 201))


def test_a_reader_never_sees_half_a_round(store: Store) -> None:
    """
    While rounds are committed, each that is seen has its version, its people and its state.
    """
    done = threading.Event()

    def read() -> int:
        seen = 0
        while not done.is_set() or seen == 0:
            latest = store.latest_round()
            if latest is None:
                continue
            state = store.server_state() or b"state -1"
            assert len(latest.contributions) == 3
            assert store.find(EVERYONE, BASE, latest.version).round_num == latest.round_num
            assert int(state.split()[1]) >= latest.round_num
            seen += 1
        return seen

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        for round_num in range(30):
            store.commit_round(commit(round_num), NOON)
        done.set()
        assert reading.result() > 0


def test_of_calls_with_one_key_one_publishes(store: Store) -> None:
    """
    Four threads publish the same bytes under the same ten keys at once: ten versions, and each
    thread is told the same of them.
    """

    def publish_all(_thread: int) -> list[AdapterRecord]:
        return [store.publish(draft(ANNA, n), NOON, idem_key=str(n)) for n in range(10)]

    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(publish_all, range(4)))
    assert all(records == told[0] for records in told)
    assert len(store.versions(ANNA, BASE)) == 10


def test_rounds_and_publishes_outside_of_them_leave_no_gap(store: Store) -> None:
    """
    While ten rounds are committed, three threads publish ten global versions each: 1 to 40.
    """

    def publish_ten(thread: int) -> list[int]:
        drafts = [draft(EVERYONE, 1000 * thread + n) for n in range(10)]
        return [store.publish(d, NOON).version for d in drafts]

    with ThreadPoolExecutor(3) as pool:
        publishing = pool.map(publish_ten, (1, 2, 3))
        versions = [store.commit_round(commit(n), NOON).version for n in range(10)]
        versions += [v for published in publishing for v in published]
    assert sorted(versions) == list(range(1, 41))


def test_erasing_while_publishing_leaves_no_gap(store: Store) -> None:
    """
    Every version that was published was erased or is there, and no number was given twice.
    """

    def publish_twenty(_thread: int) -> list[int]:
        return [store.publish(draft(ANNA, n), NOON).version for n in range(20)]

    with ThreadPoolExecutor(2) as pool:
        publishing = pool.map(publish_twenty, range(2))
        erased = sum(erase(store, ANNA) for _ in range(10))
        versions = sorted(v for published in publishing for v in published)
    assert versions == list(range(1, 41))
    assert erased + len(store.versions(ANNA, BASE)) == 40


NUL = "a\0b"


def test_a_text_that_cannot_be_kept_is_not_found(store: Store) -> None:
    """
    A NUL, which some databases cannot hold, is in no name: nothing is found under one.
    """
    store.publish(draft(ANNA, 1), NOON)
    for find in (
        lambda: store.find(ANNA, NUL),
        lambda: store.find_digest(ANNA, BASE, NUL),
    ):
        with pytest.raises(NotFound):
            find()
    assert store.versions(ANNA, NUL) == ()
    assert store.revision(ANNA, NUL) == 0
    assert erase(store, ANNA, NUL) == 0


def test_a_text_that_cannot_be_kept_is_not_taken(store: Store) -> None:
    """
    A key with a NUL is refused, and in a reason, which a stranger may have written, it is replaced.
    """
    with pytest.raises(BadInput, match="control characters"):
        store.publish(draft(ANNA, 1), NOON, idem_key=NUL)
    strange = Contribution("zoe", "rejected", reason=NUL)
    store.commit_round(commit(0, contributions=(strange,)), NOON)
    assert [c.reason for c in store.rounds()[0].contributions] == ["a?b"]


def test_two_processes_may_write_to_one_database(url: str) -> None:
    """
    Two stores on one database, as two processes have them, publish 25 times each: versions 1 to 50.

    Publishing with a key reads before it writes, which is where SQLite refuses one of two.
    """

    def publish_some(number: int) -> list[int]:
        store = SqlStore(url)
        keys = [f"{number}-{n}" for n in range(25)]
        published = [store.publish(draft(ANNA, number), NOON, idem_key=key) for key in keys]
        store.close()
        return [record.version for record in published]

    with ThreadPoolExecutor(2) as pool:
        versions = [v for published in pool.map(publish_some, (1, 2)) for v in published]
    assert sorted(versions) == list(range(1, 51))


def test_bases_are_those_with_versions(store: Store) -> None:
    """
    In order, each once; what was erased leaves none.
    """
    store.publish(draft(ANNA, 1, base=OTHER_BASE), NOON)
    store.publish(draft(ANNA, 2), NOON)
    store.publish(draft(ANNA, 3), NOON)
    assert store.bases(ANNA) == (BASE, OTHER_BASE)
    assert store.bases(BOB) == ()
    erase(store, ANNA, OTHER_BASE)
    assert store.bases(ANNA) == (BASE,)


def move(version: int | None, name: str = "stable", owner: Owner = EVERYONE) -> AliasMove:
    """An alias's move, by the operator."""
    return AliasMove(owner=owner, base=BASE, name=name, version=version, reason="because")


def with_versions(store: Store, count: int = 3, owner: Owner = EVERYONE) -> Store:
    """The store with versions 1, 2, … of this owner."""
    for number in range(1, count + 1):
        store.publish(draft(owner, number), NOON)
    return store


def test_an_alias_points_where_it_was_moved_last(store: Store) -> None:
    """
    Each owner, base and name by itself.
    """
    with_versions(store), with_versions(store, owner=ANNA)
    assert store.move_alias(move(1), NOON).rev == 1
    moved = store.move_alias(move(3), NOON + timedelta(hours=1))
    store.move_alias(move(2, "canary"), NOON)
    store.move_alias(move(1, owner=ANNA), NOON)
    assert (moved.rev, moved.version, moved.actor, moved.reason) == (2, 3, "operator", "because")
    assert store.alias(EVERYONE, BASE, "stable") == moved
    assert store.alias(ANNA, BASE, "stable").version == 1
    assert [(a.name, a.version) for a in store.aliases(EVERYONE, BASE)] == [
        ("canary", 2),
        ("stable", 3),
    ]
    with pytest.raises(NotFound, match="stable"):
        store.alias(BOB, BASE, "stable")
    with pytest.raises(NotFound):
        store.alias(EVERYONE, OTHER_BASE, "stable")


def test_an_alias_says_where_it_pointed_on_any_day(store: Store) -> None:
    """
    Before its first move it was not there, and while it was dropped it was not there.
    """
    with_versions(store)
    for day, version in enumerate([1, 2, None, 3]):
        store.move_alias(move(version), NOON + timedelta(days=day))
    pointed = [store.alias(EVERYONE, BASE, "stable", NOON + timedelta(days=d)) for d in (0, 1.5, 9)]
    assert [event.version for event in pointed] == [1, 2, 3]
    for day in (-1, 2, 2.9):
        with pytest.raises(NotFound):
            store.alias(EVERYONE, BASE, "stable", NOON + timedelta(days=day))


def test_a_clock_that_was_set_back_turns_no_history_around(store: Store) -> None:
    """
    A move is never before the one it follows.
    """
    with_versions(store)
    store.move_alias(move(1), NOON)
    assert store.move_alias(move(2), NOON - timedelta(hours=1)).at == NOON
    assert store.alias(EVERYONE, BASE, "stable", NOON).version == 2


def test_an_aliass_history_comes_in_pages(store: Store) -> None:
    """
    Newest first.
    """
    with_versions(store)
    for version in (1, 2, 3):
        store.move_alias(move(version), NOON)
    events = store.alias_events(EVERYONE, BASE, "stable")
    assert [(e.rev, e.version) for e in events] == [(3, 3), (2, 2), (1, 1)]
    assert store.alias_events(EVERYONE, BASE, "stable", before=3, limit=1) == events[1:2]
    assert store.alias_events(EVERYONE, BASE, "stable", before=2**40) == events
    assert store.alias_events(EVERYONE, BASE, "canary") == ()


def test_a_dropped_alias_is_gone_and_counts_on(store: Store) -> None:
    """
    Who saw it before cannot take a new one for the old one.
    """
    with_versions(store)
    store.move_alias(move(1), NOON)
    assert store.move_alias(move(None), NOON).rev == 2
    assert store.aliases(EVERYONE, BASE) == ()
    with pytest.raises(NotFound, match="no alias"):
        store.move_alias(move(None), NOON)
    assert store.move_alias(move(1), NOON).rev == 3


def test_an_alias_moves_only_from_where_the_mover_saw_it(store: Store) -> None:
    """
    Of two who saw the same one moves it; a mover who lost the answer may ask again.
    """
    with_versions(store)
    store.move_alias(move(1), NOON, expected_rev=0)
    with pytest.raises(Conflict, match=r"at revision 1, not 0.*version 1"):
        store.move_alias(move(2), NOON, expected_rev=0)
    store.move_alias(move(2), NOON, expected_rev=1)
    assert store.move_alias(move(2), NOON, expected_rev=1).rev == 2
    assert len(store.alias_events(EVERYONE, BASE, "stable")) == 2


@pytest.mark.parametrize("version", [0, -1, 9, 2**31, 2**63])
def test_an_alias_points_at_no_version_that_is_not_there(store: Store, version: int) -> None:
    """
    Nor is one made for an owner who has nothing.
    """
    with_versions(store)
    with pytest.raises(NotFound, match="version"):
        store.move_alias(move(version), NOON)
    with pytest.raises(NotFound):
        store.move_alias(move(1, owner=BOB), NOON)
    assert store.aliases(EVERYONE, BASE) == ()


def test_a_yanked_version_is_given_to_who_names_it(store: Store) -> None:
    """
    The latest is the one below; the list says so, and it can be taken back.
    """
    with_versions(store)
    store.yank(EVERYONE, BASE, 3)
    store.yank(EVERYONE, BASE, 3)
    assert store.find(EVERYONE, BASE).version == 2
    assert store.find(EVERYONE, BASE, 3).yanked
    assert store.find_digest(EVERYONE, BASE, digest(3)).yanked
    assert [r.yanked for r in store.versions(EVERYONE, BASE)] == [True, False, False]
    store.unyank(EVERYONE, BASE, 3)
    store.unyank(EVERYONE, BASE, 3)
    assert store.find(EVERYONE, BASE) == store.find(EVERYONE, BASE, 3)
    for number in (1, 2, 3):
        store.yank(EVERYONE, BASE, number)
    with pytest.raises(NotFound):
        store.find(EVERYONE, BASE)
    with pytest.raises(NotFound):
        store.yank(EVERYONE, BASE, 4)
    with pytest.raises(NotFound):
        store.unyank(BOB, BASE, 1)


def test_aliases_and_yanks_keep_out_of_each_others_way(store: Store) -> None:
    """
    What an alias points at is not yanked, and what is yanked no alias is pointed at.
    """
    with_versions(store)
    store.move_alias(move(2), NOON)
    with pytest.raises(Conflict, match="stable"):
        store.yank(EVERYONE, BASE, 2)
    store.yank(EVERYONE, BASE, 3)
    with pytest.raises(Conflict, match="yanked"):
        store.move_alias(move(3), NOON)
    store.move_alias(move(1), NOON)
    store.yank(EVERYONE, BASE, 2)


def test_every_change_of_what_is_served_counts(store: Store) -> None:
    """
    Repeats do not, and nothing ever counts back, an erasure neither.
    """
    seen = [store.revision(ANNA, BASE)]

    def change(made: object) -> None:
        seen.append(store.revision(ANNA, BASE))

    change(store.publish(draft(ANNA, 1), NOON, "key"))
    change(store.publish(draft(ANNA, 2), NOON))
    change(store.move_alias(move(1, owner=ANNA), NOON))
    change(store.yank(ANNA, BASE, 2))
    change(store.unyank(ANNA, BASE, 2))
    change(erase(store, ANNA))
    change(store.publish(draft(ANNA, 3), NOON))
    assert seen == list(range(8))
    store.publish(draft(BOB, 1), NOON, "key"), store.publish(draft(BOB, 1), NOON, "key")
    store.move_alias(move(1, owner=BOB), NOON), store.move_alias(move(1, owner=BOB), NOON)
    store.unyank(BOB, BASE, 1)
    assert store.revision(BOB, BASE) == 2


def test_an_erased_users_aliases_are_gone(store: Store) -> None:
    """
    With their history and their yanks; others keep theirs.
    """
    with_versions(store, owner=ANNA), with_versions(store, owner=BOB)
    for owner in (ANNA, BOB):
        store.move_alias(move(1, owner=owner), NOON)
        store.yank(owner, BASE, 2)
    assert erase(store, ANNA) == 3
    assert store.aliases(ANNA, BASE) == ()
    assert store.alias_events(ANNA, BASE, "stable") == ()
    assert store.alias(BOB, BASE, "stable").version == 1
    assert store.find(BOB, BASE, 2).yanked


def test_of_concurrent_movers_one_moves(store: Store) -> None:
    """
    All saw the same; one wins, the others learn where it is now.
    """
    with_versions(store, 8)
    store.move_alias(move(8), NOON)

    def try_it(version: int) -> bool:
        try:
            store.move_alias(move(version), NOON, expected_rev=1)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(7) as movers:
        assert sum(movers.map(try_it, range(1, 8))) == 1
    assert [e.rev for e in store.alias_events(EVERYONE, BASE, "stable")] == [2, 1]


def test_every_version_comes_in_pages_by_digest(store: Store) -> None:
    """
    All owners' and bases', each once, those with the same bytes too.
    """
    for owner, number in ((ANNA, 3), (BOB, 1), (EVERYONE, 2), (BOB, 3), (ANNA, 3)):
        store.publish(draft(owner, number), NOON)
    store.publish(draft(ANNA, 1, base=OTHER_BASE), NOON)
    seen: list[AdapterRecord] = []
    while page := store.every_version(seen[-1] if seen else None, limit=2):
        seen += page
    assert [r.digest for r in seen] == [digest(n) for n in (1, 1, 2, 3, 3, 3)]
    assert len({(r.owner, r.base, r.version) for r in seen}) == 6
    assert list(store.faults()) == []
    with pytest.raises(BadSetting):
        store.every_version(limit=0)
