"""The operator's commands, against the real service."""

import json
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedia3.coordinator.operator import Operator, PartState
from fedia3.coordinator.services.admin import Supervision
from fedia3.errors import BadInput, BadToken, NotAllowed, NotFound
from fedia3.testing_service import RunningService, running_service

SUPERLINK = PartState("superlink", "running", 77, 2, "signal 9")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    """A coordinator whose supervisor wrote something down."""
    told = Supervision((SUPERLINK,), "two devices are online, three are needed")
    with running_service(
        tmp_path / "coordinator", in_memory=True, supervision=lambda: told
    ) as running:
        yield running


def operator_file(service: RunningService, folder: Path, **changes: str) -> Path:
    """What ``fedia3 coordinator init`` writes."""
    fields = {
        "address": service.address,
        "ca": service.ca.decode(),
        "token": service.operator_token,
        "signing_key": b64encode(service.operator_key.private_bytes_raw()).decode(),
    }
    path = folder / "operator.json"
    path.write_text(json.dumps(fields | changes))
    return path


@pytest.fixture
def operator(service: RunningService, tmp_path: Path) -> Iterator[Operator]:
    """By that file."""
    with Operator.open(operator_file(service, tmp_path), timeout_s=5) as opened:
        yield opened


def test_a_new_coordinator_waits(service: RunningService, operator: Operator):
    """
    No round, no device; the parts and what is waited for are as they were written down.
    """
    status = operator.status()
    assert (status.round_num, status.round_committed_ms, status.devices) == (None, None, 0)
    assert status.base_digest == service.manifest.digest
    assert status.parts == (SUPERLINK,)
    assert status.waiting_for == "two devices are online, three are needed"


def test_rounds_are_paused_and_resumed(operator: Operator):
    """
    The operator's word is what the status says next.
    """
    operator.pause()
    assert operator.status().paused
    operator.run_now()
    assert operator.status().run_requested
    operator.resume()
    assert not operator.status().paused


def test_an_invite_is_for_one_user(service: RunningService, operator: Operator):
    """
    The code opens the invite that the directory keeps.
    """
    invited = operator.invite("ann")
    assert invited.user == "ann"
    assert invited.expires_ms > service.now_ms()
    assert invited.code.count("-") >= 4


def test_devices_come_page_by_page(
    service: RunningService, operator: Operator, monkeypatch: pytest.MonkeyPatch
):
    """
    Five devices in pages of two, in the order they were enrolled.
    """
    ids = [service.enrol(user).device_id for user in ("ann", "bob", "cy", "dee", "eve")]
    monkeypatch.setattr("fedia3.coordinator.operator.PAGE", 2)
    assert [device.device_id for device in operator.devices()] == ids


def test_a_device_is_shut_out(service: RunningService, operator: Operator):
    """
    Revoked, it stays in the list with its time, and Flower is told.
    """
    device = service.enrol("ann")
    operator.revoke(device.device_id)
    (listed,) = operator.devices()
    assert listed.revoked_ms is not None
    assert service.registrar.nodes == {}
    with pytest.raises(NotFound):
        operator.revoke("ab" * 16)


def test_a_services_token_is_issued(operator: Operator):
    """
    Its days are checked by the coordinator.
    """
    assert operator.issue_service_token("web", 30).token.startswith("fedia3_service_")
    with pytest.raises(BadInput):
        operator.issue_service_token("web", 1000)


def test_another_token_commands_nothing(service: RunningService, tmp_path: Path):
    """
    A service's token does not reach these methods, and an unknown one reaches none.
    """
    for token, refusal in ((service.service_token(), NotAllowed), ("unknown", BadToken)):
        path = operator_file(service, tmp_path, token=token)
        with Operator.open(path) as operator, pytest.raises(refusal):
            operator.status()


def test_a_file_that_is_none_is_named(tmp_path: Path):
    """
    Missing or of another kind, the message says what to do.
    """
    with pytest.raises(NotFound, match="coordinator init"):
        Operator.open(tmp_path / "operator.json")
    (tmp_path / "operator.json").write_text("{}")
    with pytest.raises(BadInput, match="no operator's file"):
        Operator.open(tmp_path / "operator.json")
