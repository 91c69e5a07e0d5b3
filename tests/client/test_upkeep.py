"""What a device does with its coordinator between rounds, against the real service."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.manifest import schema
from fedia3.adapters.schema import Schema
from fedia3.client.device import DeviceFolder
from fedia3.client.device_status import Control
from fedia3.client.enrolment import enroll
from fedia3.client.forgetting import forget, forget_everywhere
from fedia3.client.personal_store import Judged, KeptPart, PersonalStore, ones_digest
from fedia3.client.upkeep import Upkeep, everyones
from fedia3.errors import NotFound
from fedia3.testing_service import RunningService, running_service

JUDGED = Judged("personal", 2.0, 1.0, 9, "d" * 64, 1)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    """A coordinator with a paper base; no round yet."""
    with running_service(tmp_path / "coordinator", in_memory=True) as running:
        yield running


@pytest.fixture
def folder(service: RunningService, tmp_path: Path) -> DeviceFolder:
    """A device of ann's."""
    folder = DeviceFolder(tmp_path / "ann")
    enroll(service.address, service.invite("ann"), service.ca, folder, "phone")
    return folder


@pytest.fixture
def upkeep(folder: DeviceFolder, tmp_path: Path) -> Iterator[Upkeep]:
    """Its upkeep, with a home of its own."""
    upkeep = Upkeep(folder, BaseStore(tmp_path / "home"), now_ms=lambda: 1000)
    yield upkeep
    upkeep.close()


def shape(service: RunningService) -> Schema:
    """Of the adapters."""
    return schema(service.manifest)


def publish_global(service: RunningService, value: float, round_num: int = 0) -> str:
    """Everyone's adapter with all scales alike; its digest."""
    scales = np.full(shape(service).n_params, value, np.float32)
    adapter = Adapter(shape(service), scales)
    return service.registry.publish_global(adapter, round_num=round_num).digest


def test_a_refresh_brings_the_global_adapter_and_the_base(
    service: RunningService, folder: DeviceFolder, upkeep: Upkeep, tmp_path: Path
):
    """
    From then on both are on the device, and the coordinator counts as heard.
    """
    digest = publish_global(service, 2.0)
    upkeep.refresh()
    found = everyones(folder, shape(service))
    assert (found.digest, found.version) == (digest, 1)
    assert found.adapter.vector[0] == 2.0
    assert BaseStore(tmp_path / "home").find(service.manifest.digest).exists()
    assert (upkeep.silent_since_ms, upkeep.shut_out) == (None, None)


def test_before_any_round_everyones_adapter_is_the_base_itself(
    service: RunningService, folder: DeviceFolder, upkeep: Upkeep
):
    """
    Named as round 0 will be, so that a part grown on it can be published later.
    """
    upkeep.refresh()
    found = everyones(folder, shape(service))
    assert (found.digest, found.version) == (ones_digest(shape(service)), None)
    assert publish_global(service, 1.0) == found.digest


def test_silence_is_noted_once_and_ends(service: RunningService, folder: DeviceFolder, tmp_path):
    """
    The last good adapter stays; the time is that of the first call without an answer.
    """
    publish_global(service, 2.0)
    upkeep = Upkeep(folder, BaseStore(tmp_path / "home"), now_ms=lambda: 1000)
    upkeep.refresh()
    upkeep.close()  # every call ends as if nobody were there
    upkeep.refresh()
    assert upkeep.silent_since_ms == 1000
    assert everyones(folder, shape(service)).version == 1


def test_a_revoked_device_is_shut_out_and_told_why(
    service: RunningService, folder: DeviceFolder, upkeep: Upkeep
):
    """
    What it has stays.
    """
    publish_global(service, 2.0)
    upkeep.refresh()
    service.directory.revoke(folder.enrolment().device_id, service.now_ms())
    upkeep.refresh()
    assert upkeep.shut_out is not None
    assert everyones(folder, shape(service)).version == 1


def test_a_base_beyond_todays_bytes_waits_for_tomorrow(
    service: RunningService, folder: DeviceFolder, tmp_path: Path
):
    """
    What came counts, and the rest is fetched when there are bytes again.
    """
    counted: list[int] = []
    may_go = False
    store = BaseStore(tmp_path / "home")
    upkeep = Upkeep(folder, store, counted.append, lambda: may_go)
    upkeep.refresh()
    with pytest.raises(NotFound):
        store.find(service.manifest.digest)
    may_go = True
    upkeep.refresh()
    upkeep.close()
    assert store.find(service.manifest.digest).exists()
    assert sum(counted) >= service.manifest.size


def kept(folder: DeviceFolder, service: RunningService, value: float, **changes: object):
    """A part of the owner in the device's store, and what is known of it."""
    delta = np.full(shape(service).n_params, value, np.float32)
    part = PersonalAdapter(shape(service), delta, ones_digest(shape(service)))
    judged = replace(JUDGED, **changes)  # type: ignore[arg-type]  # any field
    return part, PersonalStore(folder.personal).keep(part, judged)


def test_what_is_shared_is_what_the_gate_decided(
    service: RunningService, folder: DeviceFolder, upkeep: Upkeep
):
    """
    First the part; once its owner is served the global again, a part that changes nothing.
    """
    publish_global(service, 1.0)
    store = PersonalStore(folder.personal)
    for value, choice, shared in ((0.5, "personal", 0.5), (0.7, "global", 0.0)):
        _, known = kept(folder, service, value, choice=choice)
        part = store.to_share(shape(service))
        assert part is not None
        assert part.delta[0] == np.float32(shared)
        store.note_shared(part, upkeep.share(part, known))
        assert store.to_share(shape(service)) is None
    newest = service.registry.resolve("ann", shape(service))
    assert newest.adapter.vector.tolist() == [1.0] * shape(service).n_params


def test_forgetting_everywhere_leaves_nothing_here_or_there(
    service: RunningService, folder: DeviceFolder, upkeep: Upkeep
):
    """
    Parts, shared versions, what was cached of them and logs; the device is paused, and still
    enrolled.
    """
    publish_global(service, 1.0)
    part, known = kept(folder, service, 0.5)
    upkeep.share(part, known)
    folder.logs.mkdir()
    (folder.logs / "trainer.log").write_text("Dear diary")
    assert forget_everywhere(folder) == 1
    assert forget(folder, now_ms=5).left == ()
    assert not folder.personal.exists()
    assert (folder.logs / "trainer.log").read_text() == ""
    assert Control.read(folder.control_file) == Control(paused=True, forgotten_ms=5)
    assert service.registry.resolve("ann", shape(service)).personal is None
    assert folder.is_enrolled


def test_the_shared_part_says_what_it_rests_on(
    service: RunningService, folder: DeviceFolder, upkeep: Upkeep
):
    """
    Examples and validation losses; nothing of the text.
    """
    publish_global(service, 1.0)
    part, known = kept(folder, service, 0.5)
    assert isinstance(known, KeptPart)
    upkeep.share(part, known)
    record = service.registry.resolve("ann", shape(service)).personal
    assert record is not None
    assert (record.num_examples, dict(record.metrics)) == (
        9,
        {"validation_global": 2.0, "validation_personal": 1.0},
    )
