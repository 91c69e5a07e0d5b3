"""What an operator sees and does, and that nobody else does it."""

from datetime import UTC, datetime

import pytest

from fedia3.adapters.adapter import Adapter
from fedia3.coordinator.operator import PartState
from fedia3.coordinator.records import Contribution
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.services.admin import AdminService, Supervision
from fedia3.coordinator.services.calls import Caller as Asking
from fedia3.coordinator.stores.memory_directory import MemoryDirectory
from fedia3.coordinator.tokens import DAY_MS, INVITE_MS, code_sha256, token_sha256
from fedia3.errors import BadInput, BadToken, NotAllowed, NotFound
from fedia3.proto import adapters_pb2, enrolment_pb2
from fedia3.proto import admin_pb2 as pb
from fedia3.proto.contract import METHODS
from fedia3.testing_service import MemoryRegistrar, RunningService

REQUESTS = {
    method.name: (method.request(), method.response)
    for method in METHODS.values()
    if method.service == "fedia3.v1.Admin"
}


def ask(caller, method: str, /, **fields: object):
    """The answer to one of the operator's calls."""
    request, answer = REQUESTS[method]
    return caller.call(f"Admin/{method}", type(request)(**fields), answer)


@pytest.fixture
def operator(service: RunningService, calling):
    """The operator's caller."""
    return calling("operator")


@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_only_operators_operate(service: RunningService, calling, name: str) -> None:
    """
    A device, a service and a stranger are refused by every one of these methods.
    """
    with pytest.raises(NotAllowed):
        ask(calling(service.enrol("anna")), name)
    request, answer = REQUESTS[name]
    if not METHODS[f"/fedia3.v1.Admin/{name}"].is_signed:
        with pytest.raises(NotAllowed):
            calling(service.service_token()).call(f"Admin/{name}", request, answer)
        with pytest.raises(BadToken):
            calling().call(f"Admin/{name}", request, answer)


def test_a_new_coordinators_status(service: RunningService, operator) -> None:
    """
    No round, no devices, nothing paused, and which base model it trains.
    """
    status = ask(operator, "Status")
    assert status == pb.StatusResponse(
        version=status.version, base_digest=service.manifest.digest, round_num=-1
    )
    assert status.version


def test_status_tells_the_last_round(service: RunningService, operator, everyone: Adapter) -> None:
    """
    Its number, its time and its metrics.
    """
    contributions = (Contribution("a" * 32, "accepted", num_examples=3),)
    before = datetime.now(UTC).timestamp() * 1000
    service.registry.commit_round(4, b"state", everyone, contributions, {"loss": 0.25})
    status = ask(operator, "Status")
    assert (status.round_num, dict(status.round_metrics)) == (4, {"loss": 0.25})
    assert status.round_committed_ms >= int(before)


def test_status_counts_the_devices_that_were_heard_of(
    service: RunningService, operator, calling, clock
) -> None:
    """
    Of three enrolled ones two called within a minute and a half; one of those was shut out since.
    """
    anna, bob, _cyd = (service.enrol(user) for user in ("anna", "bob", "cyd"))
    service.directory.saw([anna.device_id, bob.device_id], clock())
    clock.now_ms += 90_000
    assert ask(operator, "Status").devices_online == 2
    service.directory.revoke(bob.device_id, clock())
    status = ask(operator, "Status")
    assert (status.devices, status.devices_online) == (2, 1)
    clock.now_ms += 1
    assert ask(operator, "Status").devices_online == 0


def test_status_tells_what_the_supervisor_wrote_down() -> None:
    """
    Every part, and why no round runs.
    """
    written = Supervision((PartState("proxy", "running", 7, 2, "killed by 9"),), "2 of 3 devices")
    admin = AdminService(
        Registry.in_memory(), MemoryDirectory(), MemoryRegistrar(), lambda: written, "", lambda: 0
    )
    status = admin.status(pb.StatusRequest(), Asking("127.0.0.1", None))
    assert list(status.parts) == [
        pb.PartStatus(name="proxy", state="running", pid=7, restarts=2, last_exit="killed by 9")
    ]
    assert status.waiting_for == "2 of 3 devices"


def test_rounds_are_paused_and_resumed(service: RunningService, operator) -> None:
    """
    As the directory and the status say.
    """
    ask(operator, "Pause")
    assert service.directory.round_control().paused
    assert ask(operator, "Status").paused
    ask(operator, "Resume")
    assert not ask(operator, "Status").paused


def test_a_round_is_asked_for(service: RunningService, operator, clock) -> None:
    """
    The request stands with its time until a round meets it.
    """
    ask(operator, "RunNow")
    assert service.directory.round_control().run_requested_ms == clock()
    assert ask(operator, "Status").run_requested
    service.directory.run_started(clock())
    assert not ask(operator, "Status").run_requested


def test_devices_are_listed_in_pages(service: RunningService, operator, clock) -> None:
    """
    In the order they came, with what is known of them.
    """
    devices = [service.enrol(user).device_id for user in ("cyd", "anna", "bob")]
    service.directory.saw([devices[1]], clock())
    first = ask(operator, "ListDevices", limit=2).devices
    (last,) = ask(operator, "ListDevices", after=devices[1]).devices
    assert [d.device_id for d in (*first, last)] == devices
    assert [d.online for d in (*first, last)] == [False, True, False]
    assert (first[1].user, first[1].name, first[1].last_seen_ms) == ("anna", "phone", clock())
    assert (last.last_seen_ms, last.revoked_ms, last.enrolled_ms) == (0, 0, clock())


@pytest.mark.parametrize("limit", [-1, 1001])
def test_a_page_of_devices_has_bounds(operator, limit: int) -> None:
    """
    A thousand at most.
    """
    with pytest.raises(BadInput, match="a page holds"):
        ask(operator, "ListDevices", limit=limit)


def test_a_page_begins_behind_a_known_device(operator) -> None:
    """
    Behind one that is not there, there is nothing to find.
    """
    with pytest.raises(NotFound):
        ask(operator, "ListDevices", after="f" * 32)


def test_a_revoked_device_is_out_at_once(service: RunningService, operator, calling) -> None:
    """
    Its next call is refused, Flower does not know it any more, and the list says so.
    """
    anna = service.enrol("anna")
    phone = calling(anna)
    phone.call("Enrolment/Renew", enrolment_pb2.RenewRequest(), enrolment_pb2.RenewResponse)
    ask(operator, "RevokeDevice", device_id=anna.device_id)
    with pytest.raises(BadToken):
        phone.call("Enrolment/Renew", enrolment_pb2.RenewRequest(), enrolment_pb2.RenewResponse)
    assert service.registrar.nodes == {}
    assert ask(operator, "ListDevices").devices[0].revoked_ms


def test_a_device_is_out_though_flower_is_down(
    service: RunningService, operator, calling, caplog
) -> None:
    """
    The operator's word counts; that Flower was not told is in the log.
    """
    anna = service.enrol("anna")
    service.registrar.is_down = True
    ask(operator, "RevokeDevice", device_id=anna.device_id)
    assert service.directory.enrolled() == ()
    assert "Flower still lists" in caplog.text


def test_a_device_that_is_not_there_is_not_revoked(operator) -> None:
    """
    A mistyped id is told.
    """
    with pytest.raises(NotFound):
        ask(operator, "RevokeDevice", device_id="f" * 32)


def test_an_invite_is_a_code_for_ten_minutes(service: RunningService, operator, clock) -> None:
    """
    Only its sha256 is kept, beside whose it is.
    """
    answer = ask(operator, "Invite", user="anna")
    assert answer.expires_ms == clock() + INVITE_MS
    kept = service.directory.invite(code_sha256(answer.code), clock())
    assert (kept.user, kept.device_id, len(kept.challenge)) == ("anna", None, 32)


@pytest.mark.parametrize("user", ["", " ", "a\0b", "x" * 129])
def test_an_invite_is_for_somebody(operator, user: str) -> None:
    """
    A blank name, one with a NUL and one that is too long are refused.
    """
    with pytest.raises(BadInput, match="user's name"):
        ask(operator, "Invite", user=user)


def test_a_services_token_reads(service: RunningService, operator, calling, clock, everyone):
    """
    For as many days as it was made for.
    """
    answer = ask(operator, "IssueServiceToken", name="web", days=2)
    assert answer.token_expires_ms == clock() + 2 * DAY_MS
    assert service.directory.principal(token_sha256(answer.token), clock()).kind == "service"
    request = adapters_pb2.FetchRequest(
        owner=adapters_pb2.Owner(everyone=True), base_digest=service.manifest.digest
    )
    web = calling(answer.token)
    assert web.call("Adapters/Fetch", request, adapters_pb2.FetchResponse).data
    clock.now_ms += 2 * DAY_MS
    with pytest.raises(BadToken):
        web.call("Adapters/Fetch", request, adapters_pb2.FetchResponse)


@pytest.mark.parametrize(
    "wrong", [{"name": "", "days": 1}, {"name": "web", "days": 0}, {"name": "web", "days": 367}]
)
def test_a_services_token_has_a_name_and_an_end(operator, wrong: dict[str, object]) -> None:
    """
    A year at most.
    """
    with pytest.raises(BadInput):
        ask(operator, "IssueServiceToken", **wrong)
