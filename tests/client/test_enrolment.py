"""How a device comes to belong to a user, against the real service."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedia3.client.device import DeviceFolder
from fedia3.client.enrolment import enroll
from fedia3.coordinator.certificates import make_authority
from fedia3.errors import BadInput, BadInvite, Conflict, Unreachable
from fedia3.proto.caller import Caller
from fedia3.proto.enrolment_pb2 import CompleteResponse
from fedia3.testing_service import RunningService, running_service


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    """A coordinator that knows nobody."""
    with running_service(tmp_path / "coordinator", in_memory=True) as running:
        yield running


@pytest.fixture
def state(tmp_path: Path) -> DeviceFolder:
    """A new device."""
    return DeviceFolder(tmp_path / "state")


def test_a_device_enrols_with_a_code(service: RunningService, state: DeviceFolder):
    """
    Both sides know the same device, by the same keys; Flower is told of it.
    """
    enrolled = enroll(service.address, service.invite("ann"), service.ca, state, "Ann's phone")
    (device,) = service.directory.enrolled()
    keys = state.keys()
    assert (device.device_id, device.user, device.name) == (
        enrolled.device_id, "ann", "Ann's phone",
    )  # fmt: skip
    assert (device.signing_key, device.node_key) == (keys.signing_public, keys.node_public)
    assert service.registrar.nodes == {enrolled.device_id: keys.node_public}
    assert state.enrolment() == enrolled
    assert enrolled.base_digest == service.manifest.digest
    assert state.ca() == service.ca


def test_dashes_and_case_do_not_matter(service: RunningService, state: DeviceFolder):
    """
    A code typed in small letters without its dashes is the same code.
    """
    typed = service.invite("ann").replace("-", "").lower()
    assert enroll(service.address, typed, service.ca, state, "phone").user == "ann"


def test_a_code_enrols_one_device(service: RunningService, state: DeviceFolder, tmp_path: Path):
    """
    The second device with the same code is refused and stays unenrolled.
    """
    code, second = service.invite("ann"), DeviceFolder(tmp_path / "second")
    enroll(service.address, code, service.ca, state, "phone")
    with pytest.raises(BadInvite):
        enroll(service.address, code, service.ca, second, "tablet")
    assert not second.is_enrolled


def test_a_folder_enrols_once(service: RunningService, state: DeviceFolder):
    """
    An enrolled folder is not enrolled over, and nobody is asked.
    """
    enroll(service.address, service.invite("ann"), service.ca, state, "phone")
    with pytest.raises(Conflict, match="a device of 'ann'"):
        enroll("localhost:1", "CODE", service.ca, state, "phone")


def test_a_lost_answer_is_asked_for_again(
    service: RunningService, state: DeviceFolder, monkeypatch: pytest.MonkeyPatch
):
    """
    The coordinator enrolled the device, but its answer never came: the same code and keys give the
    same device.
    """
    code, call = service.invite("ann"), Caller.call

    def losing(self: Caller, name: str, request: Any, answer: Any, **options: Any) -> Any:
        answered = call(self, name, request, answer, **options)
        if answer is CompleteResponse:
            raise Unreachable("the answer was lost")
        return answered

    with monkeypatch.context() as patch:
        patch.setattr(Caller, "call", losing)
        with pytest.raises(Unreachable):
            enroll(service.address, code, service.ca, state, "phone")
    (device,) = service.directory.enrolled()
    assert not state.is_enrolled
    enrolled = enroll(service.address, code, service.ca, state, "phone")
    assert [enrolled.device_id] == [device.device_id]
    assert len(service.directory.enrolled()) == 1


def test_a_new_code_finds_the_same_device(service: RunningService, state: DeviceFolder):
    """
    The first code is over and its answer lost for good: with the keys it is the same device.
    """
    first = enroll(service.address, service.invite("ann"), service.ca, state, "phone")
    (state.path / "device.json").unlink()
    second = enroll(service.address, service.invite("ann"), service.ca, state, "phone")
    assert second.device_id == first.device_id
    assert len(service.directory.enrolled()) == 1


@pytest.mark.parametrize(("next_user", "is_revoked"), [("bob", False), ("ann", True)])
def test_keys_of_another_device_are_replaced(
    service: RunningService, state: DeviceFolder, next_user: str, is_revoked: bool
):
    """
    Keys that are another user's, or of a device that was shut out, give way to new ones.
    """
    first = enroll(service.address, service.invite("ann"), service.ca, state, "phone")
    if is_revoked:
        service.directory.revoke(first.device_id, service.now_ms())
    (state.path / "device.json").unlink()
    second = enroll(service.address, service.invite(next_user), service.ca, state, "phone")
    assert (second.user, second.device_id != first.device_id) == (next_user, True)


def test_without_flower_the_code_stays_good(service: RunningService, state: DeviceFolder):
    """
    While the SuperLink is down nobody enrols; the code works once it is back.
    """
    code = service.invite("ann")
    service.registrar.is_down = True
    with pytest.raises(Unreachable):
        enroll(service.address, code, service.ca, state, "phone", timeout_s=0.5)
    service.registrar.is_down = False
    assert enroll(service.address, code, service.ca, state, "phone").user == "ann"


def test_an_impostor_gets_no_code(service: RunningService, state: DeviceFolder):
    """
    A coordinator of another authority is noticed before the code is sent.
    """
    other = make_authority(datetime.now(UTC)).certificate
    with pytest.raises(Unreachable, match="did not sign"):
        enroll(service.address, service.invite("ann"), other, state, "phone")


def test_no_code_is_no_code(service: RunningService, state: DeviceFolder):
    """
    Dashes alone are noticed here.
    """
    with pytest.raises(BadInput, match="takes the code"):
        enroll(service.address, "- -", service.ca, state, "phone")


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("device_id", "../../etc"),
        ("device_id", '" evil="1'),
        ("base_digest", "../../../.config"),
        ("base_digest", ""),
        ("coordinator_keys", []),
        ("coordinator_keys", [b"short"]),
        ("fleet_address", "https://elsewhere"),
        ("token", "with\nnewline"),
        ("token", "x" * 5000),
        ("user", "\x1b[2J"),
        ("user", ""),
        ("ca", b"no certificate"),
    ],
)
def test_what_a_coordinator_answers_is_not_believed_unseen(
    service: RunningService,
    state: DeviceFolder,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    told: Any,
):
    """
    Parts of it become paths, arguments and headers; where one is no such thing, nothing is kept.
    """
    call = Caller.call

    def lying(self: Caller, name: str, request: Any, answer: Any, **options: Any) -> Any:
        answered = call(self, name, request, answer, **options)
        if answer is CompleteResponse:
            answered.ClearField(field)
            answered.MergeFrom(CompleteResponse(**{field: told}))
        return answered

    monkeypatch.setattr(Caller, "call", lying)
    with pytest.raises(BadInput):
        enroll(service.address, service.invite("ann"), service.ca, state, "phone")
    assert not state.is_enrolled
    assert not state.ca_file.exists()
