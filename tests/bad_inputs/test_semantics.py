"""33 and 44 to 58: what is well formed and does not fit what is stored, or the round."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator.gate import GateLimits, Reply
from fedia3.coordinator.records import Contribution
from fedia3.coordinator.rounds import Judging, RoundPlan, requests_for
from fedia3.coordinator.state import ServerState
from fedia3.proto import adapters_pb2 as pb

from .scene import (
    ANNA,
    BAD_INPUT,
    CONFLICT,
    FETCH,
    NOT_FOUND,
    PROMOTE,
    RESOLVE,
    ROLL_BACK,
    WRONG_BASE,
    YANK,
    Refused,
    Scene,
    require_refused,
)

ELSEWHERE = "0" * 64


def of_another_base(scene: Scene) -> bytes:
    """A part of the same shape for a base model that the request does not name."""
    schema = Schema(ELSEWHERE, scene.schema.targets)
    ones = np.ones(schema.n_params, dtype=np.float32)
    return encoding.encode_personal(PersonalAdapter(schema, ones, ELSEWHERE))


def version_beyond_int64(scene: Scene) -> bytes:
    """Version 2^63, which only a caller that writes its own bytes can ask for."""
    asked = pb.FetchRequest(owner=ANNA, base_digest=scene.base).SerializeToString()
    return scene.call(FETCH, asked + b"\x18" + b"\x80" * 9 + b"\x01", scene.anna)


STORED = [
    Refused(
        44,
        "unknown base in a publish",
        lambda scene: scene.publish(base_digest=ELSEWHERE),
        WRONG_BASE,
        "no base model 000000000000; its rounds train",
    ),
    Refused(
        44,
        "unknown base in the bytes",
        lambda scene: scene.publish(of_another_base(scene)),
        WRONG_BASE,
        "for base model '000.*expected .*; train it anew",
    ),
    Refused(
        44,
        "unknown base in a read",
        lambda scene: scene.read(RESOLVE, ANNA, base_digest=ELSEWHERE),
        NOT_FOUND,
        "no adapter for base model 000000000000; list what there is",
    ),
    Refused(
        46,
        "relative to another user's version",
        lambda scene: scene.publish(scene.part(1, 0, 0, 0, 0, on=encoding.digest(scene.bobs))),
        NOT_FOUND,
        "no version of everyone .* has digest .*publish it first",
    ),
    Refused(
        47,
        "relative to bytes that nobody has",
        lambda scene: scene.publish(scene.part(1, 0, 0, 0, 0, on=ELSEWHERE)),
        NOT_FOUND,
        "no version of everyone .* has digest 000000000000",
    ),
    Refused(
        53,
        "a key that names other bytes",
        lambda scene: scene.publish(
            scene.part(1, 0, 0, 0, 0), idem_key=encoding.digest(scene.good)
        ),
        CONFLICT,
        "already names version 1 of user 'anna' .*use a new key",
    ),
    Refused(53, "no key", lambda scene: scene.publish(idem_key=""), BAD_INPUT, "1 to 128 .*none"),
    *(
        Refused(
            56,
            f"version {version}",
            lambda scene, version=version: scene.read(FETCH, ANNA, version=version),
            NOT_FOUND,
            f"no version {version} for base model .*list what there is",
        )
        for version in (2, 2**63 - 1)
    ),
    *(
        Refused(
            56,
            f"version {version}",
            lambda scene, version=version: scene.read(FETCH, ANNA, version=version),
            BAD_INPUT,
            f"versions are 1, 2, 3, …, got {version}; name none for the newest",
        )
        for version in (0, -1, -(2**63))
    ),
    Refused(56, "version 2^63", version_beyond_int64, BAD_INPUT, "got -9223372036854775808"),
    *(
        Refused(
            54,
            f"an alias at another revision than {rev}",
            lambda _scene, someone, rev=rev: someone.ask(PROMOTE, version=2, expected_rev=rev),
            CONFLICT,
            f"at revision 1, not {rev}, and points at version 1; look at it and move it again",
            given=lambda scene: scene.someone(2, 1),
        )
        for rev in (0, 2, 2**40)
    ),
    Refused(
        54,
        "a negative revision",
        lambda scene: scene.promote(expected_rev=-1),
        BAD_INPUT,
        "the expected revision lies in 0 … 2.63-1, got -1",
    ),
    Refused(
        55,
        "an alias of a yanked version",
        lambda _scene, someone: someone.ask(PROMOTE, version=1),
        CONFLICT,
        "version 1 of user .* is yanked; take that back first",
        given=lambda scene: scene.someone(1).yanked(1),
    ),
    Refused(
        55,
        "a yank of what an alias points at",
        lambda _scene, someone: someone.ask(YANK, version=1),
        CONFLICT,
        "is stable; move that to another version first",
        given=lambda scene: scene.someone(1, 1),
    ),
    *(
        Refused(
            55,
            f"an alias of version {version}, which is not there",
            lambda scene, version=version: scene.promote(version=version),
            NOT_FOUND,
            f"no version {version} for base model",
        )
        for version in (-1, 9, 2**63 - 1)
    ),
    Refused(
        55,
        "an alias of an erased version",
        lambda _scene, someone: someone.ask(PROMOTE, version=1),
        NOT_FOUND,
        "user .* has no",
        given=lambda scene: scene.someone(1).erased(),
    ),
    Refused(
        58,
        "a rollback of an alias that never moved",
        lambda _scene, someone: someone.ask(ROLL_BACK, expected_rev=1),
        CONFLICT,
        "pointed at no other version before; promote",
        given=lambda scene: scene.someone(1, 1),
    ),
    Refused(
        58,
        "a rollback to a version that was yanked",
        lambda _scene, someone: someone.ask(ROLL_BACK, expected_rev=2),
        CONFLICT,
        "version 1 of user .* is yanked",
        given=lambda scene: scene.someone(2, 1, 2).yanked(1),
    ),
    Refused(
        58,
        "a rollback past an erasure",
        lambda _scene, someone: someone.ask(ROLL_BACK, expected_rev=2),
        NOT_FOUND,
        "no alias 'stable'",
        given=lambda scene: scene.someone(2, 1, 2).erased(),
    ),
    *(
        Refused(
            57,
            f"{count} examples in a publish",
            lambda scene, count=count: scene.publish(num_examples=count),
            BAD_INPUT,
            f"num_examples lies in 0 … 2.63-1, got {count}",
        )
        for count in (-1, -(2**63))
    ),
    Refused(
        57,
        "a metric that is not finite",
        lambda scene: scene.publish(metrics={"loss": float("nan")}),
        BAD_INPUT,
        "metric 'loss' is a finite number, got nan",
    ),
    *(
        Refused(
            57,
            f"{count} metrics",
            lambda scene, count=count: scene.publish(metrics={str(n): 1 for n in range(count)}),
            BAD_INPUT,
            f"at most 4096 bytes of JSON, got {got}",
        )
        for count, got in ((1000, "9891; keep fewer"), (100_000, "100000 of them; keep fewer"))
    ),
]


@pytest.mark.parametrize("case", STORED, ids=str)
def test_what_does_not_fit_what_is_stored_is_refused(scene: Scene, case: Refused) -> None:
    """Nothing is published, and what was there stays."""
    require_refused(scene, case)


SHAPE = Schema("b" * 64, (Target("layer", "k", 2),))
STATE = ServerState(2, Adapter.ones(SHAPE))
SOUND = Reply("anna", 3, SHAPE.digest, np.array([3, 4], np.float32), 10)


@dataclass(frozen=True)
class Rejected:
    """A device's reply in round 3 that differs from the sound one, and why it is not used."""

    number: int
    what: str
    changed: Mapping[str, object]
    why: str

    def __str__(self) -> str:
        return f"{self.number} {self.what}"


def judging() -> Judging:
    """The books of round 3, which asked anna and bob."""
    plan = RoundPlan(cohort_size=2)
    return Judging(STATE, requests_for(STATE, ("anna", "bob"), plan), GateLimits(max_norm=5))


def verdict(books: Judging, **changed: object) -> Contribution:
    """What becomes of a reply."""
    return books.take(replace(SOUND, **changed))


# Rounds' replies come over Flower's wire, and are judged here one by one.
REPLIES = [
    Rejected(
        33,
        "a delta too long",
        {"delta": np.array([6, 8], np.float32)},
        "the delta's norm 10 is above the limit 5",
    ),
    Rejected(48, "a stale round", {"round_num": 2}, "update for round 3, got one for 2"),
    Rejected(49, "a future round", {"round_num": 4}, "update for round 3, got one for 4"),
    Rejected(51, "not selected", {"client": "eve"}, "this client was not asked in this round"),
    Rejected(57, "0 examples", {"num_examples": 0}, "a positive whole number of examples, got 0"),
    Rejected(57, "-80 examples", {"num_examples": -80}, "number of examples, got -80"),
    Rejected(57, "NaN examples", {"num_examples": float("nan")}, "number of examples, got nan"),
]


@pytest.mark.parametrize("case", REPLIES, ids=str)
def test_a_reply_that_does_not_fit_the_round_is_not_used(case: Rejected) -> None:
    """It is rejected with its reason; bob's sound one makes the round as if it were alone."""
    books = judging()
    rejected = verdict(books, **case.changed)
    assert rejected.verdict == "rejected"
    assert case.why in rejected.reason
    verdict(books, client="bob")
    assert books.result().state.adapter.vector.tolist() == [4, 5]


def test_a_second_contribution_is_not_used() -> None:
    """52: the first stands, whatever the second says."""
    books = judging()
    assert verdict(books).verdict == "accepted"
    second = verdict(books, delta=np.array([0, 1], np.float32))
    assert (second.verdict, second.num_examples) == ("rejected", 0)
    assert "its first answer stands" in second.reason
    assert books.result().state.adapter.vector.tolist() == [4, 5]


def test_a_round_that_is_closed_takes_nothing() -> None:
    """50: behind the deadline a sound reply is too late; its device was written down as missing."""
    books = judging()
    verdict(books, client="bob", delta=np.array([0, 1], np.float32))
    (missing,) = books.close()
    assert (missing.client, missing.verdict) == ("anna", "missing")
    assert verdict(books).verdict == "rejected"
    assert books.result().state.adapter.vector.tolist() == [1, 2]


def test_a_claim_of_many_examples_is_cut() -> None:
    """57: 10^12 examples count as the limit, and the books say so."""
    admitted = verdict(judging(), num_examples=10**12)
    assert admitted.num_examples == GateLimits().max_examples
    assert "claims 1000000000000 examples, counted as 10000" in admitted.reason


NUMBERS = {50, 52, *(case.number for case in (*STORED, *REPLIES))}
