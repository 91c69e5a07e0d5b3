"""A coordinator from Python, against the real service."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.dial import Dial
from fedia3.adapters.manifest import schema
from fedia3.adapters.peft_folder import read_peft_folder
from fedia3.client.coordinator import Coordinator
from fedia3.client.device import DeviceFolder, Enrolment
from fedia3.client.enrolment import enroll
from fedia3.client.personal_store import Judged, PersonalStore
from fedia3.coordinator.records import AliasMove, Owner
from fedia3.errors import (
    BadInput,
    BadSignature,
    BadToken,
    Conflict,
    Erased,
    NotAllowed,
    NotFound,
    Unreachable,
)
from fedia3.testing import CuttingProxy
from fedia3.testing_service import RunningService, running_service

DAY_MS = 24 * 3600 * 1000


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    """A coordinator with an authority, an operator and a paper base; nothing published."""
    with running_service(tmp_path / "coordinator", in_memory=True) as running:
        yield running


def device_of(service: RunningService, user: str, folder: Path) -> DeviceFolder:
    """A device that enrolled over the wire."""
    state = DeviceFolder(folder)
    enroll(service.address, service.invite(user), service.ca, state, f"{user}'s phone")
    return state


def opened(state: DeviceFolder, tmp_path: Path, timeout_s: float = 5.0) -> Coordinator:
    """That device's coordinator; base models lie in the test's own home."""
    return Coordinator.from_state(state, store=BaseStore(tmp_path / "home"), timeout_s=timeout_s)


@pytest.fixture
def ann(service: RunningService, tmp_path: Path) -> Iterator[Coordinator]:
    """The coordinator as ann's device sees it."""
    with opened(device_of(service, "ann", tmp_path / "ann"), tmp_path) as home:
        yield home


def publish_global(service: RunningService, value: float, round_num: int = 0) -> str:
    """Everyone's adapter with all scales alike; its digest."""
    shape = schema(service.manifest)
    adapter = Adapter(shape, np.full(shape.n_params, value, np.float32))
    return service.registry.publish_global(adapter, round_num=round_num).digest


def part_on(service: RunningService, global_digest: str, value: float) -> PersonalAdapter:
    """An own part with all deltas alike."""
    shape = schema(service.manifest)
    return PersonalAdapter(shape, np.full(shape.n_params, value, np.float32), global_digest)


def test_the_newest_global_adapter_is_fetched(service: RunningService, ann: Coordinator):
    """
    Of two versions the second comes, with its bytes.
    """
    publish_global(service, 1.5)
    digest = publish_global(service, 2.0)
    fetched = ann.fetch()
    assert (fetched.version.version, fetched.version.digest) == (2, digest)
    assert encoding.digest(fetched.data) == digest
    assert fetched.fallback is None


def test_an_older_version_is_had_by_its_number(service: RunningService, ann: Coordinator):
    """
    Version 1 is there behind version 2, and version 9 is not.
    """
    digest = publish_global(service, 1.5)
    publish_global(service, 2.0)
    ann.fetch()
    assert ann.fetch(which=1).version.digest == digest
    assert ann.resolve(which=1).digest == digest
    with pytest.raises(NotFound):
        ann.fetch(which=9)


def operator_of(service: RunningService, tmp_path: Path) -> Coordinator:
    """The operator's SDK."""
    return Coordinator(
        service.address,
        ca=service.ca,
        token=service.operator_token,
        signing_key=service.operator_key,
        cache=tmp_path / "operator",
    )


def test_what_the_operator_promotes_is_served_by_its_name(
    service: RunningService, ann: Coordinator, tmp_path: Path
):
    """
    Stable stays behind while rounds go on, is rolled back, and its history is told.
    """
    first, second = publish_global(service, 1.5), publish_global(service, 2.0)
    with operator_of(service, tmp_path) as operator:
        operator.promote("stable", 1, expected_rev=0)
        assert ann.served(which="stable").everyone.digest == first
        operator.promote("stable", 2, expected_rev=1, reason="better")
        assert ann.fetch(which="stable").version.digest == second
        assert operator.roll_back("stable", expected_rev=2).version == 1
        with pytest.raises(Conflict):
            operator.promote("stable", 2, expected_rev=1)
    assert ann.fetch(which="stable").version.digest == first
    assert ann.resolve(which=second).version == 2
    assert [(a.name, a.version, a.rev) for a in ann.aliases()] == [("stable", 1, 3)]
    told = list(ann.alias_history("stable"))
    assert [(move.version, move.reason) for move in told] == [(1, ""), (2, "better"), (1, "")]
    with pytest.raises(NotAllowed):
        ann.promote("stable", 2, expected_rev=3)


def test_a_long_history_comes_whole(service: RunningService, ann: Coordinator):
    """
    Page by page.
    """
    publish_global(service, 1.5), publish_global(service, 2.0)
    owner, base = Owner.everyone(), service.manifest.digest
    for number in range(205):
        service.registry.promote(
            AliasMove(owner=owner, base=base, name="stable", version=1 + number % 2)
        )
    assert [move.rev for move in ann.alias_history("stable")] == list(range(205, 0, -1))


def test_a_yank_is_taken_for_no_replay(service: RunningService, ann: Coordinator, tmp_path: Path):
    """
    The version before is served again, though a later one was here; an old answer would not be.
    """
    first, second = publish_global(service, 1.5), publish_global(service, 2.0)
    assert ann.fetch().version.digest == second
    with operator_of(service, tmp_path) as operator:
        operator.yank(2)
        fetched = ann.fetch()
        assert (fetched.version.digest, fetched.fallback) == (first, None)
        assert ann.resolve().digest == first
        assert ann.fetch(which=2).version.yanked
        operator.yank(2, undo=True)
    assert ann.fetch().version.digest == second


def test_an_alias_is_kept_for_when_nobody_answers(service: RunningService, tmp_path: Path):
    """
    Beside the newest, not in its place; once it is dropped it is not served again.
    """
    first, second = publish_global(service, 1.5), publish_global(service, 2.0)
    state = device_of(service, "ann", tmp_path / "ann")
    with operator_of(service, tmp_path) as operator, opened(state, tmp_path) as home:
        operator.promote("stable", 1, expected_rev=0)
        home.fetch(), home.fetch(which="stable")
        known = state.enrolment()
        state.keep(replace(known, address="localhost:1"))
        with opened(state, tmp_path, timeout_s=0.3) as alone:
            kept = [alone.fetch(which=which) for which in ("latest", "stable")]
            with pytest.raises(Unreachable):
                alone.fetch(which="canary")
        assert [k.version.digest for k in kept] == [second, first]
        assert all(k.fallback for k in kept)
        state.keep(known)
        operator.promote("stable", None, expected_rev=1)
        with pytest.raises(NotFound):
            home.fetch(which="stable")
    state.keep(replace(known, address="localhost:1"))
    with opened(state, tmp_path, timeout_s=0.3) as alone, pytest.raises(Unreachable):
        alone.fetch(which="stable")


def test_nothing_new_costs_about_a_hundred_bytes(service: RunningService, tmp_path: Path):
    """
    On an open connection, the answer to a fetch of what is here already has some 100 bytes, with
    TLS, HTTP/2 and all.
    """
    publish_global(service, 1.5)
    state = device_of(service, "ann", tmp_path / "ann")
    with CuttingProxy(service.address) as proxy:
        host = proxy.address.replace("127.0.0.1", "localhost")
        state.keep(replace(state.enrolment(), address=host))
        with opened(state, tmp_path) as home:
            home.fetch()
            for _ in range(2):  # the headers' table is warm behind the first
                time.sleep(0.2)
                before = proxy.to_client.count
                assert home.fetch().fallback is None
                time.sleep(0.2)
            assert proxy.to_client.count - before <= 200


def test_an_own_part_is_served_on_the_newest_global(service: RunningService, ann: Coordinator):
    """
    2.0 plus 0.5 of ann's own is 2.5; half of it is 2.25; alpha 0 is the global.
    """
    trained_on = publish_global(service, 1.5)
    ann.publish(part_on(service, trained_on, 0.5), num_examples=7)
    publish_global(service, 2.0)
    served = ann.served()
    assert served.choice == "personal"
    assert served.personal is not None
    assert served.personal.num_examples == 7
    assert np.array_equal(served.adapter.vector, np.full(5, 2.5, np.float32))
    assert np.array_equal(ann.served(alpha=0.5).adapter.vector, np.full(5, 2.25, np.float32))
    assert np.array_equal(ann.served(alpha=0).adapter.vector, np.full(5, 2.0, np.float32))
    keys = ann.served(alpha=Dial((("k", 1.0), ("ff", 0.0))))
    assert keys.adapter.vector.tolist() == [2.5, 2.5, 2.0, 2.0, 2.0]


def test_who_has_no_own_part_is_served_the_global(service: RunningService, ann: Coordinator):
    """
    Without a part of ann's, everyone's answers.
    """
    publish_global(service, 2.0)
    served = ann.served()
    assert (served.choice, served.personal) == ("global", None)
    assert np.array_equal(served.adapter.vector, np.full(5, 2.0, np.float32))


def test_before_the_first_round_there_is_nothing(ann: Coordinator):
    """
    Neither a global adapter nor a part: the message says when there will be.
    """
    with pytest.raises(NotFound, match="first round"):
        ann.served()


def test_another_users_adapter_is_not_found(
    service: RunningService, ann: Coordinator, tmp_path: Path
):
    """
    Bob's part exists, and to ann's device there is none: by no call, in no version.
    """
    trained_on = publish_global(service, 1.5)
    with opened(device_of(service, "bob", tmp_path / "bob"), tmp_path) as bob:
        bob.publish(part_on(service, trained_on, 0.5), num_examples=7)
        assert bob.fetch("bob").version.version == 1
    for ask in (
        lambda: ann.fetch("bob"),
        lambda: ann.fetch("bob", which=1),
        lambda: ann.resolve("bob"),
        lambda: list(ann.versions("bob")),
        lambda: ann.compare((None, 1), ("bob", 1)),
        lambda: ann.served("bob"),
    ):
        with pytest.raises(NotFound):
            ask()


def test_a_service_reads_everybodys_and_writes_nobodys(service: RunningService, tmp_path: Path):
    """
    With a service's token ann's part is served; publishing takes a device.
    """
    trained_on = publish_global(service, 1.5)
    with opened(device_of(service, "ann", tmp_path / "ann"), tmp_path) as ann:
        ann.publish(part_on(service, trained_on, 0.5), num_examples=7)
    with Coordinator(
        service.address,
        ca=service.ca,
        token=service.service_token(),
        cache=tmp_path / "web",
        store=BaseStore(tmp_path / "home"),
    ) as web:
        assert web.served("ann").choice == "personal"
        assert web.served("nobody").choice == "global"
        with pytest.raises(BadInput, match="whose"):
            web.served()
        with pytest.raises(NotAllowed):
            web.publish(part_on(service, trained_on, 0.5), num_examples=7)


def test_publishing_again_publishes_once(service: RunningService, ann: Coordinator):
    """
    The same part twice is one version; another part is the next.
    """
    trained_on = publish_global(service, 1.5)
    first = ann.publish(part_on(service, trained_on, 0.5), num_examples=7)
    again = ann.publish(part_on(service, trained_on, 0.5), num_examples=7)
    other = ann.publish(part_on(service, trained_on, 0.25), num_examples=7)
    assert (first.version, again.version, other.version) == (1, 1, 2)
    assert [found.version for found in ann.versions("ann")] == [2, 1]


def test_versions_come_page_by_page(
    service: RunningService, ann: Coordinator, monkeypatch: pytest.MonkeyPatch
):
    """
    Five versions in pages of two are five versions, newest first.
    """
    for value in (1.1, 1.2, 1.3, 1.4, 1.5):
        publish_global(service, value)
    monkeypatch.setattr("fedia3.client.coordinator.PAGE", 2)
    assert [found.version for found in ann.versions()] == [5, 4, 3, 2, 1]


def test_versions_are_compared(service: RunningService, ann: Coordinator):
    """
    Five scales that differ by 0.5 each are √1.25 apart.
    """
    publish_global(service, 1.5)
    publish_global(service, 2.0)
    compared = ann.compare((None, 1), (None, 2))
    assert compared.distance == pytest.approx(1.25**0.5)
    assert {target.largest for target in compared.targets} == {0.5}


def test_erasing_deletes_here_and_there(service: RunningService, ann: Coordinator):
    """
    Two versions are erased, the kept bytes too; numbers go on behind them.
    """
    trained_on = publish_global(service, 1.5)
    for value in (0.5, 0.25):
        ann.publish(part_on(service, trained_on, value), num_examples=7)
    assert ann.served().choice == "personal"
    assert ann.erase() == 2
    with pytest.raises(NotFound):
        ann.fetch("ann")
    assert ann.served().choice == "global"
    with pytest.raises(Erased, match="a new key"):
        ann.publish(part_on(service, trained_on, 0.5), num_examples=7)
    again = ann.publish(part_on(service, trained_on, 0.5), num_examples=7, idem_key="anew")
    assert again.version == 3


def test_what_the_user_erased_elsewhere_is_not_served(
    service: RunningService, ann: Coordinator, tmp_path: Path
):
    """
    Ann erases on her other device; this one had the part kept, and lets go of it.
    """
    trained_on = publish_global(service, 1.5)
    ann.publish(part_on(service, trained_on, 0.5), num_examples=7)
    assert ann.served().choice == "personal"
    with opened(device_of(service, "ann", tmp_path / "tablet"), tmp_path) as tablet:
        tablet.erase()
    assert ann.served().choice == "global"
    kept = list((tmp_path / "ann" / "adapters").rglob("current"))
    assert len(kept) == 1  # everyone's


def test_the_last_good_adapter_answers_without_a_coordinator(tmp_path: Path):
    """
    With the coordinator gone, what was fetched is served, and says that it is the last good one.
    """
    with running_service(tmp_path / "coordinator", in_memory=True) as service:
        trained_on = publish_global(service, 2.0)
        state = device_of(service, "ann", tmp_path / "ann")
        with opened(state, tmp_path) as home:
            home.publish(part_on(service, trained_on, 0.5), num_examples=7)
            home.served()
    with opened(state, tmp_path, timeout_s=0.5) as home:
        served = home.served()
    assert np.array_equal(served.adapter.vector, np.full(5, 2.5, np.float32))
    assert served.fallback is not None
    assert "nobody listens" in served.fallback


def test_nothing_kept_and_no_coordinator_is_an_error(service: RunningService, tmp_path: Path):
    """
    A device that never fetched has nothing to fall back on.
    """
    state = device_of(service, "ann", tmp_path / "ann")
    state.keep(replace(state.enrolment(), address="localhost:1"))
    with opened(state, tmp_path, timeout_s=0.3) as home, pytest.raises(Unreachable):
        home.fetch()


def test_a_coordinator_set_back_does_not_set_devices_back(tmp_path: Path):
    """
    Version 2 is here when the coordinator comes back with version 1 only: 2 stays in use.
    """
    folder = tmp_path / "coordinator"
    with running_service(folder, in_memory=True) as service:
        publish_global(service, 1.5)
        newest = publish_global(service, 2.0)
        state = device_of(service, "ann", tmp_path / "ann")
        with opened(state, tmp_path) as home:
            assert home.fetch().version.version == 2
    with running_service(folder, in_memory=True) as service:
        publish_global(service, 1.25)
        device = service.enrol("ann")
        known = replace(state.enrolment(), address=service.address, token=device.token)
        state.keep(known)
        with opened(state, tmp_path) as home:
            fetched = home.fetch()
    assert fetched.version.digest == newest
    assert fetched.fallback is not None
    assert "revision 2 was here before" in fetched.fallback


def test_another_signing_key_is_not_believed(service: RunningService, tmp_path: Path):
    """
    What the device did not pin signs nothing for it: neither an adapter nor a manifest.
    """
    publish_global(service, 2.0)
    state = device_of(service, "ann", tmp_path / "ann")
    stranger = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    state.keep(replace(state.enrolment(), coordinator_keys=(stranger,)))
    with opened(state, tmp_path) as home:
        with pytest.raises(BadSignature, match="not the coordinator's"):
            home.fetch()
        with pytest.raises(BadSignature, match="not the coordinator's"):
            home.manifest()


def test_a_damaged_file_is_fetched_again(service: RunningService, ann: Coordinator, tmp_path: Path):
    """
    Rot on the disk costs one fetch, not the adapter.
    """
    publish_global(service, 2.0)
    ann.fetch()
    (kept,) = (tmp_path / "ann" / "adapters").rglob("current")
    kept.write_bytes(kept.read_bytes()[:-1])
    fetched = ann.fetch()
    assert (fetched.version.version, fetched.fallback) == (1, None)


def test_a_revoked_device_is_told(service: RunningService, ann: Coordinator):
    """
    Shut out, a device is not served its last good adapter in silence.
    """
    publish_global(service, 2.0)
    ann.fetch()
    (device,) = service.directory.enrolled()
    service.directory.revoke(device.device_id, service.now_ms())
    with pytest.raises(BadToken):
        ann.fetch()


def test_the_token_is_renewed_at_half_its_life(service: RunningService, tmp_path: Path):
    """
    Sixteen of thirty days on, a call brings a new token, which is written down and works.
    """
    publish_global(service, 2.0)
    state = device_of(service, "ann", tmp_path / "ann")
    old = state.enrolment()
    later = time.time_ns() // 10**6 + 16 * DAY_MS
    with Coordinator.from_state(
        state, store=BaseStore(tmp_path / "home"), now_ms=lambda: later
    ) as home:
        home.fetch()
        renewed: Enrolment = state.enrolment()
        assert renewed.token != old.token
        home.fetch()
    assert replace(renewed, token="t", token_issued_ms=0, token_expires_ms=0) == replace(
        old, token="t", token_issued_ms=0, token_expires_ms=0
    )


def test_a_part_only_on_this_device_counts(
    service: RunningService, ann: Coordinator, tmp_path: Path
):
    """
    Newer than the shared one, the device's part is served; where its gate said global, the global.
    """
    trained_on = publish_global(service, 2.0)
    ann.publish(part_on(service, trained_on, 0.5), num_examples=7)
    later_ms = time.time_ns() // 10**6 + DAY_MS
    judged = Judged("personal", 2.0, 1.0, 7, "ef" * 32, later_ms)
    store = PersonalStore(tmp_path / "ann" / "personal")
    store.keep(part_on(service, trained_on, 0.25), judged)
    served = ann.served()
    assert (served.choice, served.personal) == ("personal", None)
    assert served.unshared is not None
    assert np.array_equal(served.adapter.vector, np.full(5, 2.25, np.float32))
    store.keep(part_on(service, trained_on, 0.125), replace(judged, choice="global"))
    assert ann.served().choice == "global"


def test_a_part_that_was_shared_is_no_secret(
    service: RunningService, ann: Coordinator, tmp_path: Path
):
    """
    The device's newest part, once the registry has it, is served as the version that it is there.
    """
    part = part_on(service, publish_global(service, 2.0), 0.25)
    store = PersonalStore(tmp_path / "ann" / "personal")
    store.keep(part, Judged("personal", 2.0, 1.0, 7, "ef" * 32, made_ms=1000))
    store.note_shared(part, ann.publish(part, num_examples=7).version)
    served = ann.served()
    assert served.unshared is None
    assert served.personal is not None
    assert served.personal.version == 1


def test_a_shared_part_that_is_newer_counts(
    service: RunningService, ann: Coordinator, tmp_path: Path
):
    """
    What ann's other device shared after this one's part was made is served.
    """
    trained_on = publish_global(service, 2.0)
    judged = Judged("personal", 2.0, 1.0, 7, "ef" * 32, made_ms=1000)
    PersonalStore(tmp_path / "ann" / "personal").keep(part_on(service, trained_on, 0.25), judged)
    ann.publish(part_on(service, trained_on, 0.5), num_examples=7)
    served = ann.served()
    assert served.personal is not None
    assert np.array_equal(served.adapter.vector, np.full(5, 2.5, np.float32))


def test_the_manifest_comes_signed_and_is_kept(service: RunningService, ann: Coordinator):
    """
    By default it is that of the base that rounds train; by name it is the same.
    """
    assert ann.manifest() == service.manifest
    assert ann.manifest(service.manifest.name) == service.manifest
    with pytest.raises(NotFound):
        ann.manifest("nosuch")


def test_a_base_is_downloaded_once(service: RunningService, ann: Coordinator, tmp_path: Path):
    """
    The second time it is found on the machine, by whichever client.
    """
    first = ann.download_base()
    assert first.digest == service.manifest.digest
    assert BaseStore(tmp_path / "home").find(first.digest) == first.path
    seen: list[int] = []
    assert ann.download_base(progress=lambda done, _: seen.append(done)) == first
    assert seen == []


def test_what_is_served_is_saved_for_peft(
    service: RunningService, ann: Coordinator, tmp_path: Path
):
    """
    The folder reads back as the served adapter, without the base on this machine.
    """
    publish_global(service, 2.0)
    served = ann.save(tmp_path / "peft")
    assert read_peft_folder(tmp_path / "peft", schema(service.manifest)) == served.adapter
