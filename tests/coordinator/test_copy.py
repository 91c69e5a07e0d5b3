"""A registry that moves to another database is the same registry there."""

from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedia3.coordinator.directory import Device, Invite, Token, open_directory
from fedia3.coordinator.records import AdapterDraft, AliasMove, Contribution, Owner, RoundCommit
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.stores.copy import copy
from fedia3.errors import Conflict, Erased

NOON = datetime(2030, 1, 2, 12, 0, tzinfo=UTC)
NOW = 1_900_000_000_000
BASE = "b" * 64
EVERYONE, ANNA = Owner.everyone(), Owner.user("anna")


def draft(owner: Owner, number: int) -> AdapterDraft:
    """A version with the bytes of its number."""
    personal = owner.kind == "user"
    return AdapterDraft(
        owner=owner,
        form="personal" if personal else "adapter",
        digest=f"{number:064x}",
        schema_digest="a" * 64,
        base=BASE,
        round_num=0,
        num_examples=7,
        metrics={"loss": 0.5},
        global_digest="c" * 64 if personal else None,
    )


def device(number: int) -> Device:
    """A device whose id and keys are its own number's."""
    return Device(
        device_id=f"{number:032x}",
        user="anna",
        name="phone",
        signing_key=number.to_bytes(32),
        node_key=f"node key {number}".encode(),
        enrolled_ms=NOW,
    )


def enrol(folder: Path, number: int, database: str | None = None) -> None:
    """Let a device in, with an invite and a token of its own."""
    invite = Invite(number.to_bytes(32), "anna", NOW + 1000, b"c" * 32)
    token = Token(number.to_bytes(32), "device", "nobody", NOW + 1000)
    with closing(open_directory(folder, database)) as directory:
        directory.add_invite(invite)
        directory.enrol(invite, device(number), token, NOW)


@pytest.fixture(params=["sqlite", "postgresql"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/target.db"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A registry with a round, three of anna's versions of which one is erased, and a device."""
    folder = tmp_path / "registry"
    with Registry.open(folder) as registry:
        people = (Contribution("zoe", "accepted", norm=0.25), Contribution("adam", "missing"))
        registry.store.commit_round(
            RoundCommit(0, b"state \0", draft(EVERYONE, 1), people, {"loss": 2.5}), NOON
        )
        registry.store.publish(draft(ANNA, 2), NOON, idem_key="erased")
        registry.erase_user(ANNA.name)
        for number in (3, 4):
            registry.store.publish(draft(ANNA, number), NOON, idem_key=f"key {number}")
        registry.promote(AliasMove(owner=ANNA, base=BASE, name="stable", version=2))
        registry.store.yank(ANNA, BASE, 3)
    enrol(folder, 1)
    return folder


def test_everything_is_the_same_in_the_other_database(folder: Path, target: str) -> None:
    """
    Two lines with three versions, an alias, a yank, a round with two people and a state, five
    seals, a device with its token and invite, an erasure's tombstone and key, and the pepper.
    """
    rows = 2 + 3 + 1 + 1 + 1 + 2 + 1 + 5 + 1 + 1 + 1 + 2 + 1
    assert copy(f"sqlite:///{folder}/registry.db", target) == rows
    with Registry.open(folder) as old, Registry.open(folder, target) as new:
        assert new.versions(ANNA, BASE) == old.versions(ANNA, BASE)
        assert [r.version for r in new.versions(ANNA, BASE)] == [3, 2]
        assert new.store.aliases(ANNA, BASE) == old.store.aliases(ANNA, BASE)
        assert new.store.revision(ANNA, BASE) == old.store.revision(ANNA, BASE)
        assert list(new.store.faults()) == []
        assert new.rounds() == old.rounds()
        assert new.server_state() == old.server_state() == b"state \0"
    with closing(open_directory(folder, target)) as directory:
        assert directory.enrolled() == (device(1),)
        assert directory.principal((1).to_bytes(32), NOW).user == "anna"


def test_the_other_database_goes_on_where_the_first_one_ended(folder: Path, target: str) -> None:
    """
    The next version of anna's is 4, a repeated key still names what it named, round 1 follows, and
    new owners and devices get rows of their own.
    """
    copy(f"sqlite:///{folder}/registry.db", target)
    enrol(folder, 2, target)
    with Registry.open(folder, target) as registry:
        store = registry.store
        assert store.publish(draft(ANNA, 5), NOON).version == 4
        assert store.publish(draft(ANNA, 3), NOON, idem_key="key 3").version == 2
        assert store.publish(draft(Owner.user("bob"), 6), NOON).version == 1
        with pytest.raises(Erased):
            store.publish(draft(ANNA, 2), NOON, idem_key="erased")
        with pytest.raises(Conflict, match="round 1 is next"):
            store.commit_round(RoundCommit(0, b"", draft(EVERYONE, 7)), NOON)
    with closing(open_directory(folder, target)) as directory:
        assert directory.enrolled() == (device(1), device(2))


def test_a_database_that_holds_something_is_not_copied_into(folder: Path, target: str) -> None:
    """
    A second copy is refused, and so is one into a database with a device alone.
    """
    source = f"sqlite:///{folder}/registry.db"
    enrol(folder, 9, target)
    with pytest.raises(Conflict, match="table device has rows; name one that is empty"):
        copy(source, target)
    with Registry.open(folder, target) as registry:
        assert registry.rounds() == ()
