"""Everyone's adapters and each user's own: who sees what, and what is kept."""

from dataclasses import dataclass

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator.records import Owner
from fedia3.coordinator.services.adapters import MAX_ADAPTER
from fedia3.errors import (
    BadAdapter,
    BadInput,
    Conflict,
    Corrupt,
    Erased,
    Fedia3Error,
    NotAllowed,
    NotFound,
    WrongBaseModel,
)
from fedia3.proto import adapters_pb2 as pb
from fedia3.proto.caller import Caller
from fedia3.proto.signing import signed_bytes
from fedia3.testing_service import RunningService

EVERYONE = pb.Owner(everyone=True)
ANNA, BOB, NOBODY = (pb.Owner(user=name) for name in ("anna", "bob", "nobody"))


@dataclass(frozen=True)
class Phone:
    """A caller, with the base model that its calls are about."""

    caller: Caller
    base: str

    def resolve(self, owner: pb.Owner, **which: object) -> pb.AdapterRecord:
        return record(self.signed(owner, **which))

    def signed(self, owner: pb.Owner, **which: object) -> pb.SignedRecord:
        request = pb.ResolveRequest(owner=owner, base_digest=self.base, **which)
        return self.caller.call("Adapters/Resolve", request, pb.SignedRecord)

    def fetch(self, owner: pb.Owner, **more: object) -> pb.FetchResponse:
        request = pb.FetchRequest(owner=owner, base_digest=self.base, **more)
        return self.caller.call("Adapters/Fetch", request, pb.FetchResponse)

    def compare(self, left: pb.Owner, right: pb.Owner, **more: int) -> pb.CompareResponse:
        request = pb.CompareRequest(
            left_owner=left, right_owner=right, base_digest=self.base, **more
        )
        return self.caller.call("Adapters/Compare", request, pb.CompareResponse)

    def aliases(self, owner: pb.Owner) -> dict[str, int]:
        request = pb.ListAliasesRequest(owner=owner, base_digest=self.base)
        answer = self.caller.call("Adapters/ListAliases", request, pb.ListAliasesResponse)
        return {alias.name: alias.version for alias in answer.aliases}

    def history(self, owner: pb.Owner, name: str = "stable", **more: int) -> list[pb.AliasMove]:
        request = pb.AliasHistoryRequest(owner=owner, base_digest=self.base, name=name, **more)
        answer = self.caller.call("Adapters/AliasHistory", request, pb.AliasHistoryResponse)
        return list(answer.moves)

    def promote(self, owner: pb.Owner, version: int, rev: int = 0, **more: str) -> pb.AliasMove:
        fields = {"name": "stable", "version": version, "expected_rev": rev, **more}
        request = pb.PromoteRequest(owner=owner, base_digest=self.base, **fields)
        return self.caller.call("Adapters/Promote", request, pb.AliasMove)

    def roll_back(self, owner: pb.Owner, rev: int = 1) -> pb.AliasMove:
        request = pb.RollBackRequest(
            owner=owner, base_digest=self.base, name="stable", expected_rev=rev
        )
        return self.caller.call("Adapters/RollBack", request, pb.AliasMove)

    def yank(self, owner: pb.Owner, version: int, *, undo: bool = False) -> pb.AdapterRecord:
        request = pb.YankRequest(owner=owner, base_digest=self.base, version=version, undo=undo)
        return record(self.caller.call("Adapters/Yank", request, pb.SignedRecord))

    def publish(self, part: PersonalAdapter | bytes, **changed: object) -> pb.AdapterRecord:
        data = part if isinstance(part, bytes) else encoding.encode_personal(part)
        fields = {
            "base_digest": self.base,
            "data": data,
            "digest": encoding.digest(data),
            "num_examples": 7,
            "metrics": {"loss": 0.5},
            "idem_key": encoding.digest(data),
        }
        request = pb.PublishRequest(**{**fields, **changed})
        return record(self.caller.call("Adapters/Publish", request, pb.SignedRecord))

    def list(self, owner: pb.Owner, **more: int) -> list[int]:
        request = pb.ListRequest(owner=owner, base_digest=self.base, **more)
        answer = self.caller.call("Adapters/List", request, pb.ListResponse)
        return [record(one).version for one in answer.records]

    def erase(self, base: str = "") -> int:
        request = pb.EraseRequest(base_digest=base)
        return self.caller.call("Adapters/Erase", request, pb.EraseResponse).versions


def record(signed: pb.SignedRecord) -> pb.AdapterRecord:
    """What was signed."""
    return pb.AdapterRecord.FromString(signed.record)


def unnamed(found: pb.AdapterRecord) -> pb.AdapterRecord:
    """The record without the alias that it was found by."""
    found.ClearField("alias")
    return found


@pytest.fixture
def anna(service: RunningService, calling) -> Phone:
    """Anna's phone."""
    return Phone(calling(service.enrol("anna")), service.manifest.digest)


@pytest.fixture
def bob(service: RunningService, calling) -> Phone:
    """Bob's phone."""
    return Phone(calling(service.enrol("bob")), service.manifest.digest)


@pytest.fixture
def web(service: RunningService, calling) -> Phone:
    """A service that reads everybody's."""
    return Phone(calling(service.service_token()), service.manifest.digest)


def test_a_device_publishes_its_users_part(anna: Phone, everyone: Adapter, make_part) -> None:
    """
    The record says whose it is, what it is and what it is relative to.
    """
    part = make_part(everyone, 1, 0, 0, 0, 0.5)
    data = encoding.encode_personal(part)
    published = anna.publish(part)
    assert published == unnamed(anna.resolve(ANNA))
    assert (published.owner.user, published.version, published.num_examples) == ("anna", 1, 7)
    assert (published.digest, published.size) == (encoding.digest(data), len(data))
    assert published.global_digest == part.global_digest
    assert dict(published.metrics) == {"loss": 0.5}
    assert anna.fetch(ANNA).data == data


def test_a_record_is_signed(anna: Phone, service: RunningService, everyone: Adapter) -> None:
    """
    By the coordinator's key, over the very bytes that are sent.
    """
    signed = anna.signed(EVERYONE)
    assert signed.key == service.coordinator_key
    key = Ed25519PublicKey.from_public_bytes(signed.key)
    key.verify(signed.signature, signed_bytes("record", signed.record))
    assert record(signed).owner == EVERYONE


def test_publishing_again_publishes_once(anna: Phone, everyone: Adapter, make_part) -> None:
    """
    The same key with the same bytes is the same version; with other bytes it is a conflict.
    """
    first = anna.publish(make_part(everyone, 1, 0, 0, 0, 0), idem_key="one")
    assert anna.publish(make_part(everyone, 1, 0, 0, 0, 0), idem_key="one") == first
    with pytest.raises(Conflict):
        anna.publish(make_part(everyone, 2, 0, 0, 0, 0), idem_key="one")
    assert anna.publish(make_part(everyone, 2, 0, 0, 0, 0), idem_key="two").version == 2


def test_two_devices_of_one_user_share_a_line(
    anna: Phone, service: RunningService, calling, everyone: Adapter, make_part
) -> None:
    """
    What her phone publishes her tablet fetches, and continues.
    """
    tablet = Phone(calling(service.enrol("anna", "tablet")), anna.base)
    first = anna.publish(make_part(everyone, 1, 0, 0, 0, 0))
    assert unnamed(tablet.resolve(ANNA)) == first
    second = tablet.publish(make_part(everyone, 2, 0, 0, 0, 0))
    assert (second.version, second.parent_digest) == (2, first.digest)


def test_a_user_is_the_same_in_both_spellings(
    service: RunningService, calling, everyone: Adapter, make_part
) -> None:
    """
    José composed and decomposed is one user.
    """
    jose = Phone(calling(service.enrol("Jos\u00e9")), service.manifest.digest)
    published = jose.publish(make_part(everyone, 1, 0, 0, 0, 0))
    assert unnamed(jose.resolve(pb.Owner(user="Jose\u0301"))) == published


def refusal(call) -> tuple[type, str, int | None, bytes]:
    """Everything that a refused caller sees: class, words, status code, details."""
    with pytest.raises(Fedia3Error) as refused:
        call()
    cause = refused.value.__cause__
    trailing = dict(cause.trailing_metadata())
    trailing.pop("fedia3-time", None)
    details = trailing["grpc-status-details-bin"]
    return type(refused.value), cause.details(), cause.code(), details


@pytest.mark.parametrize("version", [0, 1, 7])
@pytest.mark.parametrize(
    "name",
    [
        "resolve", "fetch", "list", "compare left", "compare right",
        "aliases", "history", "promote", "rollback", "yank",
    ],
)  # fmt: skip
def test_what_belongs_to_somebody_else_is_told_as_if_there_were_none(
    anna: Phone, bob: Phone, everyone: Adapter, make_part, name: str, version: int
) -> None:
    """
    Class, words, status and details are the same for bob's, who has published, and for those of
    somebody of whom nobody has heard, but for the name that was asked for.
    """
    bob.publish(make_part(everyone, 1, 0, 0, 0, 0))
    which = {"version": version} if version else {"alias": "stable"}

    def asked(owner: pb.Owner):
        return {
            "resolve": lambda: anna.resolve(owner, **which),
            "fetch": lambda: anna.fetch(owner, **which),
            "aliases": lambda: anna.aliases(owner),
            "history": lambda: anna.history(owner),
            "promote": lambda: anna.promote(owner, version),
            "rollback": lambda: anna.roll_back(owner),
            "yank": lambda: anna.yank(owner, version),
            "list": lambda: anna.list(owner, before_version=version),
            "compare left": lambda: anna.compare(owner, EVERYONE, left_version=version),
            "compare right": lambda: anna.compare(EVERYONE, owner, right_version=version),
        }[name]

    bobs = refusal(asked(BOB))
    nobodys = refusal(asked(pb.Owner(user="eve")))
    assert bobs[0] is NotFound
    assert bobs[0] == nobodys[0]
    assert bobs[1].replace("bob", "eve") == nobodys[1]
    assert bobs[2] == nobodys[2]
    assert bobs[3].replace(b"bob", b"eve") == nobodys[3]


@pytest.mark.parametrize("which", [{"version": 3}, {"alias": "stable"}, {"digest": "f" * 64}, {}])
def test_a_foreign_adapter_is_told_as_a_service_is_told_of_a_missing_one(
    anna: Phone, web: Phone, everyone: Adapter, which: dict[str, object]
) -> None:
    """
    The words for what may not be seen are those for what is not there.
    """
    foreign = refusal(lambda: anna.fetch(NOBODY, **which))
    missing = refusal(lambda: web.fetch(NOBODY, **which))
    assert foreign == missing


def test_a_foreign_digest_is_no_way_to_ask(
    anna: Phone, bob: Phone, everyone: Adapter, make_part
) -> None:
    """
    Whoever guesses bob's bytes does not learn that they are his.
    """
    bobs = bob.publish(make_part(everyone, 1, 0, 0, 0, 0))
    with pytest.raises(NotFound):
        anna.fetch(BOB, if_none_match=bobs.digest)


def test_a_service_reads_everybodys(
    web: Phone, anna: Phone, bob: Phone, everyone: Adapter, make_part
) -> None:
    """
    And publishes nobody's.
    """
    part = make_part(everyone, 1, 0, 0, 0, 0)
    published = [anna.publish(part), bob.publish(part)]
    assert [unnamed(web.resolve(ANNA)), unnamed(web.resolve(BOB))] == published
    assert web.fetch(EVERYONE).data == encoding.encode(everyone)
    with pytest.raises(NotAllowed):
        web.publish(part)


def test_an_operator_reads_everybodys(
    service: RunningService, calling, anna: Phone, everyone: Adapter, make_part
) -> None:
    """
    To compare versions, say.
    """
    operator = Phone(calling("operator"), anna.base)
    assert anna.publish(make_part(everyone, 1, 0, 0, 0, 0)) == unnamed(operator.resolve(ANNA))


def test_unchanged_bytes_are_not_sent_again(anna: Phone, everyone: Adapter) -> None:
    """
    Only that word travels; with another digest, everything does.
    """
    digest = anna.resolve(EVERYONE).digest
    unchanged = anna.fetch(EVERYONE, if_none_match=digest)
    assert unchanged == pb.FetchResponse(unchanged=True)
    assert len(unchanged.SerializeToString()) == 2
    changed = anna.fetch(EVERYONE, if_none_match="0" * 64)
    assert encoding.digest(changed.data) == digest


def test_an_old_version_is_fetched_by_its_number(
    anna: Phone, service: RunningService, shape: Schema, everyone: Adapter
) -> None:
    """
    After a second version the first is still there.
    """
    twos = Adapter(shape, np.full(5, 2, dtype=np.float32))
    service.registry.publish_global(twos)
    assert anna.fetch(EVERYONE).data == encoding.encode(twos)
    assert anna.fetch(EVERYONE, version=1).data == encoding.encode(everyone)


@pytest.mark.parametrize("version", [3, 2**62])
def test_a_version_that_is_not_there_is_not_found(
    anna: Phone, everyone: Adapter, version: int
) -> None:
    """
    Whatever the number.
    """
    with pytest.raises(NotFound):
        anna.fetch(EVERYONE, version=version)


@pytest.mark.parametrize(
    "which",
    [{"version": 0}, {"version": -1}, {"alias": ""}, {"alias": "a b"}, {"digest": "beef"}],
)
def test_what_names_no_version_is_refused(
    anna: Phone, everyone: Adapter, which: dict[str, object]
) -> None:
    """
    It is said what does.
    """
    for ask in (anna.fetch, anna.resolve):
        with pytest.raises(BadInput, match="got"):
            ask(EVERYONE, **which)


def test_a_user_moves_their_own_aliases(
    anna: Phone, bob: Phone, web: Phone, everyone: Adapter, make_part
) -> None:
    """
    From their device, with everything that was moved in the history; a service may look.
    """
    parts = [make_part(everyone, number, 0, 0, 0, 0) for number in (1, 2)]
    first, second = [anna.publish(part) for part in parts]
    moved = anna.promote(ANNA, 1, reason="good")
    assert (moved.rev, moved.version, moved.reason, moved.owner) == (1, 1, "good", ANNA)
    assert anna.promote(ANNA, 1) == moved
    with pytest.raises(Conflict, match="revision 1"):
        anna.promote(ANNA, 2)
    anna.promote(ANNA, 2, rev=1)
    assert anna.roll_back(ANNA, rev=2) == anna.roll_back(ANNA, rev=2)
    assert [move.version for move in anna.history(ANNA)] == [1, 2, 1]
    assert [move.version for move in anna.history(ANNA, limit=1, before_rev=3)] == [2]
    assert anna.aliases(ANNA) == web.aliases(ANNA) == {"stable": 1}
    found = anna.resolve(ANNA, alias="stable")
    assert (found.digest, found.alias) == (first.digest, "stable")
    assert anna.fetch(ANNA, alias="stable").data == encoding.encode_personal(parts[0])
    assert anna.resolve(ANNA, digest=second.digest).version == 2
    with pytest.raises(NotAllowed):
        web.promote(ANNA, 1)


def test_only_the_operator_moves_everyones(
    service: RunningService, calling, anna: Phone, web: Phone, everyone: Adapter
) -> None:
    """
    And what a device is served by that name is what it points at.
    """
    operator = Phone(calling("operator"), anna.base)
    for caller in (anna, web):
        for change in (
            lambda phone=caller: phone.promote(EVERYONE, 1),
            lambda phone=caller: phone.roll_back(EVERYONE),
            lambda phone=caller: phone.yank(EVERYONE, 1),
        ):
            with pytest.raises(NotAllowed):
                change()
    operator.promote(EVERYONE, 1)
    assert anna.fetch(EVERYONE, alias="stable").data == encoding.encode(everyone)
    assert anna.history(EVERYONE)[0].actor == "operator"


def test_a_yanked_version_is_not_the_newest(
    service: RunningService, calling, anna: Phone, shape: Schema, everyone: Adapter
) -> None:
    """
    Who names it is given it and told; every change shows in the revision.
    """
    operator = Phone(calling("operator"), anna.base)
    service.registry.publish_global(Adapter(shape, np.full(5, 2, dtype=np.float32)))
    seen = [anna.resolve(EVERYONE)]
    assert operator.yank(EVERYONE, 2).yanked
    seen.append(anna.resolve(EVERYONE))
    assert not operator.yank(EVERYONE, 2, undo=True).yanked
    seen.append(anna.resolve(EVERYONE))
    assert [(r.version, r.revision, r.alias) for r in seen] == [
        (2, 2, "latest"),
        (1, 3, "latest"),
        (2, 4, "latest"),
    ]
    operator.promote(EVERYONE, 2)
    with pytest.raises(Conflict, match="stable"):
        operator.yank(EVERYONE, 2)
    with pytest.raises(NotFound):
        operator.yank(EVERYONE, 9)


def test_versions_are_listed_in_pages(anna: Phone, everyone: Adapter, make_part) -> None:
    """
    Newest first, each page below the last version of the page before.
    """
    for number in range(1, 6):
        anna.publish(make_part(everyone, number, 0, 0, 0, 0))
    assert anna.list(ANNA) == [5, 4, 3, 2, 1]
    assert anna.list(ANNA, limit=2) == [5, 4]
    assert anna.list(ANNA, limit=2, before_version=4) == [3, 2]
    assert anna.list(ANNA, before_version=1) == []


def test_a_user_without_versions_has_an_empty_list(anna: Phone) -> None:
    """
    Of one's own one may know that there is nothing.
    """
    assert anna.list(ANNA) == []


@pytest.mark.parametrize("page", [{"limit": -1}, {"limit": 101}, {"before_version": -1}])
def test_a_page_has_bounds(anna: Phone, page: dict[str, int]) -> None:
    """
    A hundred at most, below a positive version.
    """
    with pytest.raises(BadInput, match="a page holds"):
        anna.list(ANNA, **page)


@pytest.mark.parametrize(
    "owner", [pb.Owner(), pb.Owner(everyone=False), pb.Owner(user=""), pb.Owner(user="a\0b")]
)
def test_an_owner_is_named(anna: Phone, owner: pb.Owner) -> None:
    """
    Nobody, not everyone, a blank name and one with a NUL are refused.
    """
    with pytest.raises(BadInput):
        anna.resolve(owner)


@pytest.mark.parametrize("base", ["", "tiny", "../bases", "A" * 64])
def test_a_base_is_named_by_its_digest(anna: Phone, base: str) -> None:
    """
    Anything else is refused.
    """
    with pytest.raises(BadInput, match="64 hex digits"):
        Phone(anna.caller, base).resolve(EVERYONE)


def test_what_is_published_is_what_was_announced(anna: Phone, everyone: Adapter, make_part) -> None:
    """
    Other bytes than the digest's, or none, are refused.
    """
    part = make_part(everyone, 1, 0, 0, 0, 0)
    for wrong in ("0" * 64, ""):
        with pytest.raises(BadAdapter, match="announced"):
            anna.publish(part, digest=wrong)
    assert anna.list(ANNA) == []


def spoiled(part: PersonalAdapter, value: float) -> bytes:
    """The part's file with one value replaced."""
    data = bytearray(encoding.encode_personal(part))
    data[-4:] = np.float32(value).tobytes()
    return bytes(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 101.0])
def test_values_that_no_training_gives_are_refused(
    anna: Phone, everyone: Adapter, make_part, value: float
) -> None:
    """
    Not finite, or too large.
    """
    with pytest.raises(BadAdapter):
        anna.publish(spoiled(make_part(everyone, 1, 0, 0, 0, 1), value))


def test_bytes_that_are_no_adapter_are_refused(anna: Phone, everyone: Adapter, make_part) -> None:
    """
    Empty, garbage, a pickle, cut, longer, everyone's instead of one's own.
    """
    good = encoding.encode_personal(make_part(everyone, 1, 0, 0, 0, 0))
    for data in (
        b"", b"garbage", b"\x80\x04K\x01.", good[:-1], good + b"\0", encoding.encode(everyone),
    ):  # fmt: skip
        with pytest.raises(BadAdapter):
            anna.publish(data)


def test_a_part_has_one_form(anna: Phone, everyone: Adapter, make_part) -> None:
    """
    Minus zero equals zero, and the file that holds it is not the form's own.
    """
    with pytest.raises(BadAdapter, match="one order"):
        anna.publish(spoiled(make_part(everyone, 1, 0, 0, 0, 1), -0.0))


def test_a_part_is_not_too_large(anna: Phone) -> None:
    """
    Its message has to hold what is said of it as well.
    """
    with pytest.raises(BadAdapter, match="at most"):
        anna.publish(b"x" * (MAX_ADAPTER + 1))


def test_a_part_of_another_base_is_refused(anna: Phone, everyone: Adapter, make_part) -> None:
    """
    Whether the request or the bytes name it.
    """
    part = make_part(everyone, 1, 0, 0, 0, 0)
    with pytest.raises(WrongBaseModel):
        anna.publish(part, base_digest="0" * 64)
    elsewhere = Schema("0" * 64, part.schema.targets)
    with pytest.raises(WrongBaseModel):
        anna.publish(PersonalAdapter(elsewhere, part.delta, part.global_digest))


def test_a_part_of_another_shape_is_refused(anna: Phone, everyone: Adapter) -> None:
    """
    It scales what the base model has, no more and no less.
    """
    other = Schema(everyone.schema.base_digest, (Target("elsewhere", "k", 5),))
    part = PersonalAdapter(other, np.ones(5, dtype=np.float32), "0" * 64)
    with pytest.raises(BadAdapter):
        anna.publish(part)


def test_a_part_is_relative_to_a_published_version(anna: Phone, everyone: Adapter) -> None:
    """
    What it was trained on has to be known.
    """
    part = PersonalAdapter(everyone.schema, np.ones(5, dtype=np.float32), "0" * 64)
    with pytest.raises(NotFound, match="everyone"):
        anna.publish(part)


@pytest.mark.parametrize(
    "wrong",
    [
        {"idem_key": ""},
        {"idem_key": "x" * 129},
        {"num_examples": -1},
        {"metrics": {"loss": float("nan")}},
        {"metrics": {f"metric {n}": 1.0 for n in range(1000)}},
    ],
)
def test_what_is_said_of_a_part_is_sound(
    anna: Phone, everyone: Adapter, make_part, wrong: dict[str, object]
) -> None:
    """
    A key of 1 to 128 characters, a count, a few finite metrics.
    """
    with pytest.raises(BadInput):
        anna.publish(make_part(everyone, 1, 0, 0, 0, 0), **wrong)
    assert anna.list(ANNA) == []


def test_versions_are_compared_by_their_effective_scales(
    anna: Phone, everyone: Adapter, make_part
) -> None:
    """
    Everyone's ones against anna's (1+3, 1+4, 1, 1, 1): keys are 5 apart, the feed-forward 0.
    """
    anna.publish(make_part(everyone, 3, 4, 0, 0, 0))
    answer = anna.compare(EVERYONE, ANNA)
    found = [(t.key, t.distance, t.largest) for t in answer.targets]
    assert found == [("layers.0.k_proj.k", 5, 4), ("layers.0.down_proj.ff", 0, 0)]
    assert answer.distance == 5


def test_two_versions_of_one_owner_are_compared(anna: Phone, everyone: Adapter, make_part) -> None:
    """
    By their numbers; a version compared with itself has distance 0.
    """
    for number in (1, 4):
        anna.publish(make_part(everyone, 0, 0, 0, 0, number))
    assert anna.compare(ANNA, ANNA, left_version=1, right_version=2).distance == 3
    assert anna.compare(ANNA, ANNA).distance == 0


def test_a_part_counts_with_the_version_it_was_trained_on(
    anna: Phone, service: RunningService, shape: Schema, everyone: Adapter, make_part
) -> None:
    """
    A newer global version changes nothing about two old versions' distance.
    """
    anna.publish(make_part(everyone, 1, 0, 0, 0, 0))
    service.registry.publish_global(Adapter(shape, np.full(5, 9, dtype=np.float32)))
    assert anna.compare(EVERYONE, ANNA, left_version=1).distance == 1


def test_a_user_erases_their_own(
    anna: Phone, bob: Phone, service: RunningService, everyone: Adapter, make_part
) -> None:
    """
    Anna's versions and bytes are gone, bob's and everyone's are there, and numbers go on.
    """
    first = anna.publish(make_part(everyone, 1, 0, 0, 0, 0))
    kept = bob.publish(make_part(everyone, 2, 0, 0, 0, 0))
    assert anna.erase() == 1
    assert anna.erase() == 0
    with pytest.raises(NotFound):
        anna.fetch(ANNA)
    assert not service.registry.blobs.has(first.digest)
    assert unnamed(bob.resolve(BOB)) == kept
    assert anna.fetch(EVERYONE).data == encoding.encode(everyone)
    with pytest.raises(Erased, match="a new key"):
        anna.publish(make_part(everyone, 1, 0, 0, 0, 0))
    assert anna.publish(make_part(everyone, 1, 0, 0, 0, 0), idem_key="anew").version == 2


def test_a_part_begun_before_the_erasure_is_refused(
    anna: Phone, service: RunningService, everyone: Adapter, make_part
) -> None:
    """
    One that has trained for an hour is not taken after an erasure of this moment, nor after a
    million years; its bytes are not kept. One begun since is, and no age is negative.
    """
    part = make_part(everyone, 1, 0, 0, 0, 0)
    anna.erase()
    for age_ms in (3_600_000, 2**62):
        with pytest.raises(Erased, match="train it anew"):
            anna.publish(part, age_ms=age_ms)
    assert not service.registry.blobs.has(encoding.digest(encoding.encode_personal(part)))
    with pytest.raises(BadInput, match="age_ms"):
        anna.publish(part, age_ms=-1)
    assert anna.publish(part).version == 1


def test_a_user_erases_on_one_base(anna: Phone, everyone: Adapter, make_part) -> None:
    """
    On another one nothing was there; a digest that is none is refused.
    """
    anna.publish(make_part(everyone, 1, 0, 0, 0, 0))
    assert anna.erase("0" * 64) == 0
    assert anna.erase(anna.base) == 1
    with pytest.raises(BadInput, match="64 hex digits"):
        anna.erase("all")


def test_damaged_bytes_are_not_served(
    anna: Phone, service: RunningService, everyone: Adapter
) -> None:
    """
    Neither sent nor signed for, once they are gone.
    """
    digest = anna.resolve(EVERYONE).digest
    service.registry.blobs.delete(digest)
    with pytest.raises(Corrupt):
        anna.fetch(EVERYONE)
    with pytest.raises(Corrupt):
        anna.resolve(EVERYONE)
    assert service.registry.versions(Owner.everyone(), anna.base)
