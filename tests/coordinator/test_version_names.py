"""How people name a version, and which one they get."""

import numpy as np
import pytest

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator.records import AdapterRecord, AliasMove, Owner
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.version_names import VersionName, find_version, parse_version_name
from fedia3.errors import BadInput, BadSetting, NotFound

SCHEMA = Schema("b" * 64, (Target("layers.0.k", "k", 2),))
EVERYONE, BOB = Owner.everyone(), Owner.user("bob")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("everyone", VersionName(EVERYONE)),
        ("everyone@latest", VersionName(EVERYONE)),
        ("bob", VersionName(BOB)),
        ("bob@3", VersionName(BOB, version=3)),
        ("bob@9999999", VersionName(BOB, version=9_999_999)),
        ("bob@12345678", VersionName(BOB, digest="12345678")),
        ("bob@5f0c21aa", VersionName(BOB, digest="5f0c21aa")),
        ("bob@" + "a" * 64, VersionName(BOB, digest="a" * 64)),
        ("bob@stable", VersionName(BOB, alias="stable")),
        ("bob@f0c21a", VersionName(BOB, alias="f0c21a")),
        ("bob@example.org@latest", VersionName(Owner.user("bob@example.org"))),
        ("bob@example.org@2", VersionName(Owner.user("bob@example.org"), version=2)),
        ("-x y@1", VersionName(Owner.user("-x y"), version=1)),
    ],
)
def test_a_name_says_whose_and_which(text: str, name: VersionName):
    """Split at the last @; written out it reads the same."""
    assert parse_version_name(text) == name
    assert parse_version_name(str(name)) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1 to 128 characters"),
        ("@3", "1 to 128 characters"),
        ("bob@", "cannot read ''"),
        ("bob@0", "cannot read '0'"),
        ("bob@-1", "cannot read '-1'"),
        ("bob@5f0c21a", "8 or more hex digits"),
        ("bob@5F0C21AA", "8 or more hex digits"),
        ("bob@3rd", "cannot read '3rd'"),
        ("bob@ex ample", "is written bob@ex ample@latest"),
        ("b\x00b", "control characters"),
    ],
)
def test_what_names_no_version_is_refused(text: str, message: str):
    """With what may stand behind the @."""
    with pytest.raises(BadInput, match=message):
        parse_version_name(text)


@pytest.fixture
def published() -> tuple[Registry, list[AdapterRecord]]:
    """Everyone's four versions, of which the last has the first one's bytes."""
    registry = Registry.in_memory()
    return registry, [
        registry.publish_global(Adapter(SCHEMA, np.array([1, last], dtype=np.float32)))
        for last in (1, 2, 3, 1)
    ]


def test_a_version_is_found_by_number_and_by_digest(
    published: tuple[Registry, list[AdapterRecord]],
):
    """No number is the latest; of equal bytes the newest is meant."""
    registry, (first, second, _, last) = published
    base = SCHEMA.base_digest

    def found(text: str) -> AdapterRecord:
        return find_version(registry, parse_version_name(text), base)

    assert found("everyone") == last
    assert found("everyone@1") == first
    assert found(f"everyone@{second.digest[:8]}") == second
    assert found(f"everyone@{first.digest}") == last


def test_a_version_is_found_by_alias(published: tuple[Registry, list[AdapterRecord]]):
    """Where there is none, it may have been a name with an @ in it."""
    registry, (_, second, *_) = published
    base = SCHEMA.base_digest
    registry.promote(AliasMove(owner=EVERYONE, base=base, name="stable", version=2))
    assert find_version(registry, parse_version_name("everyone@stable"), base) == second
    with pytest.raises(NotFound, match=r"is written bob@example\.org@latest"):
        find_version(registry, parse_version_name("bob@example.org"), base)


def test_a_version_that_is_not_there_is_said(published: tuple[Registry, list[AdapterRecord]]):
    """Neither the fifth, nor anybody's of these bytes, nor a user's."""
    registry, records = published
    unknown = next(d for d in ("0" * 8, "f" * 8) if not any(r.digest[:8] == d for r in records))
    for text in ("everyone@5", f"everyone@{unknown}", "bob", f"bob@{records[0].digest[:8]}"):
        with pytest.raises(NotFound):
            find_version(registry, parse_version_name(text), SCHEMA.base_digest)


def test_a_digests_beginning_that_fits_several_is_not_guessed(
    published: tuple[Registry, list[AdapterRecord]],
):
    """As if all began alike: more digits are asked for."""
    registry, _ = published
    with pytest.raises(BadSetting, match="3 digests of everyone begin so"):
        find_version(registry, VersionName(EVERYONE, digest=""), SCHEMA.base_digest)
