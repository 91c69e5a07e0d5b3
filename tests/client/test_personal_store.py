"""The owner's own parts on the device: kept whole, judged, forgotten."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.encoding import digest, encode, encode_personal
from fedia3.adapters.schema import Schema, Target
from fedia3.client.personal_store import (
    Judged,
    PersonalStore,
    Shared,
    delete_below,
    ones_digest,
)
from fedia3.errors import BadAdapter

SCHEMA = Schema("b" * 64, (Target("k", "k", 4),))
JUDGED = Judged("personal", 2.0, 1.5, 9, "d" * 64, 1000, {"base": 2.1})


def part(value: float, schema: Schema = SCHEMA) -> PersonalAdapter:
    """A part whose entries are all ``value``, on the ones."""
    delta = np.full(schema.n_params, value, dtype=np.float32)
    return PersonalAdapter(schema, delta, ones_digest(schema))


@pytest.fixture
def store(tmp_path: Path) -> PersonalStore:
    """An empty store."""
    return PersonalStore(tmp_path / "personal")


def test_a_part_comes_back_with_its_decision(store: PersonalStore):
    """
    What is kept is what is found, by another process too.
    """
    kept = store.keep(part(0.5), JUDGED)
    found = store.current(SCHEMA)
    assert found is not None
    assert found[0] == kept
    assert found[0].judged == JUDGED
    assert found[1].delta.tolist() == [0.5] * 4
    assert digest(encode_personal(found[1])) == kept.digest


def test_there_is_none_before_the_first(store: PersonalStore):
    """
    An empty store is no error.
    """
    assert store.current(SCHEMA) is None
    assert store.forget().deleted == 0


@pytest.mark.parametrize("damage", ["cut file", "no file", "cut record"])
def test_a_damaged_part_leaves_the_last_good_one(store: PersonalStore, tmp_path: Path, damage: str):
    """
    Whatever a crash or a disk did to the newest, the one before it is served.
    """
    store.keep(part(0.5), JUDGED)
    newest = store.keep(part(0.7), JUDGED)
    folder = tmp_path / "personal" / SCHEMA.base_digest
    file = folder / f"{newest.digest}.safetensors"
    if damage == "cut file":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "no file":
        file.unlink()
    else:
        (folder / "current.json").write_bytes(b'{"digest": "')
    found = store.current(SCHEMA)
    assert found is not None
    assert found[1].delta.tolist() == [0.5] * 4


def test_only_two_parts_are_kept(store: PersonalStore, tmp_path: Path):
    """
    The newest and the one before it.
    """
    for value in (0.1, 0.2, 0.3):
        store.keep(part(value), JUDGED)
    assert len(list((tmp_path / "personal").rglob("*.safetensors"))) == 2


def test_parts_of_another_base_stay_apart(store: PersonalStore):
    """
    A device that changes its base and back finds its own part again.
    """
    other = Schema("c" * 64, SCHEMA.targets)
    store.keep(part(0.5), JUDGED)
    assert store.current(other) is None
    store.keep(part(0.7, other), JUDGED)
    found = store.current(SCHEMA)
    assert found is not None
    assert found[1].delta.tolist() == [0.5] * 4


def test_a_served_part_is_to_be_shared_once(store: PersonalStore):
    """
    Then it is not new any more; a newer one is.
    """
    assert store.to_share(SCHEMA) is None
    store.keep(part(0.5), JUDGED)
    first = store.to_share(SCHEMA)
    assert first is not None
    store.note_shared(first, 3)
    assert store.to_share(SCHEMA) is None
    assert store.shared(SCHEMA.base_digest) == Shared(digest(encode_personal(first)), 3)
    store.keep(part(0.6), JUDGED)
    assert store.to_share(SCHEMA) is not None


def test_where_the_global_is_served_again_zeros_are_shared(store: PersonalStore):
    """
    Who was given a part must not go on serving it; who was given none gets nothing.
    """
    as_global = replace(JUDGED, choice="global")
    store.keep(part(0.5), as_global)
    assert store.to_share(SCHEMA) is None
    store.note_shared(part(0.5), 3)
    zeros = store.to_share(SCHEMA)
    assert zeros is not None
    assert zeros.delta.tolist() == [0.0] * 4
    store.note_shared(zeros, 4)
    assert store.to_share(SCHEMA) is None


def test_forgetting_leaves_no_file(store: PersonalStore, tmp_path: Path):
    """
    Both parts and both records.
    """
    store.keep(part(0.5), JUDGED)
    store.keep(part(0.7), JUDGED)
    assert store.forget().deleted == 4
    assert not (tmp_path / "personal").exists()
    assert store.current(SCHEMA) is None


def test_forgetting_follows_no_link(tmp_path: Path):
    """
    A link in the folder goes; what it points to stays.
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "letter").write_text("stays")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    assert delete_below(inside).deleted == 1
    assert (outside / "letter").read_text() == "stays"


def test_what_nobody_could_read_back_is_not_kept(store: PersonalStore):
    """
    A delta beyond what training gives is refused, and the current part is as it was.
    """
    store.keep(part(0.5), JUDGED)
    with pytest.raises(BadAdapter):
        store.keep(part(1e6), JUDGED)
    found = store.current(SCHEMA)
    assert found is not None
    assert found[1].delta.tolist() == [0.5] * 4


def test_parts_before_any_round_are_relative_to_round_zero():
    """
    The coordinator's round 0 is the ones' file, whose digest a device can work out by itself.
    """
    assert ones_digest(SCHEMA) == digest(encode(Adapter.ones(SCHEMA)))
