import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedia3.adapters.update import TrainingPlan, TrainRequest
from fedia3.client.flower import read_request
from fedia3.coordinator import flower
from fedia3.coordinator.directory import Device
from fedia3.coordinator.flower import (
    FlowerFleet,
    enrolled,
    nodes_by_client,
    request_message,
)
from fedia3.coordinator.gate import Reply
from fedia3.errors import BadSetting
from fedia3.simulations.grid import LocalGrid


def request(client: str = "alice") -> TrainRequest:
    """A request of two scales."""
    plan = TrainingPlan(learning_rate=0.5, max_steps=3)
    return TrainRequest(client, 3, 2**63 - 1, np.array([1, 2], np.float32), "5c", plan)


class LossyGrid(LocalGrid):
    """Loses what is sent to some clients: refuses it, or never answers, or answers twice."""

    def __init__(self, *nodes: str) -> None:
        super().__init__(answering(content()), nodes)

    def push_messages(self, messages):
        ids = list(super().push_messages(messages))
        return [
            None if self._client_of(message) == "refused" else i
            for i, message in zip(ids, messages, strict=True)
        ]

    def pull_messages(self, message_ids):
        names = {i: self._client_of(m) for i, m in self._queue.items()}
        replies = list(super().pull_messages(i for i in message_ids if names.get(i) != "silent"))
        twice = [r for r in replies if names[r.metadata.reply_to_message_id] == "twice"]
        return [*replies, *twice]


SOUND = {
    "round": 3,
    "schema": "5c",
    "delta": np.array([3, 4], "<f4").tobytes(),
    "num_examples": 5,
    "metrics.loss_mean": 0.5,
}


def content(**fields: object) -> RecordDict:
    """A sound reply to :func:`request`, with some fields replaced; None leaves one out."""
    told = {k: v for k, v in {**SOUND, **fields}.items() if v is not None}
    return RecordDict({"reply": ConfigRecord(told)})  # type: ignore[arg-type]  # any field


def answering(answer: RecordDict | Error) -> ClientApp:
    """A ClientApp that always gives one answer."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        return Message(answer, reply_to=message)

    return app


def replied(answer: RecordDict | Error) -> Reply:
    """What the coordinator reads when a device answers so."""
    fleet = FlowerFleet(LocalGrid(answering(answer), ["alice"]))
    fleet.population()
    (reply,) = fleet.ask([request()], None)
    return reply


def test_a_request_survives_the_wire():
    """The device reads what the coordinator asked, fields that are not set included."""
    LocalGrid(ClientApp(), [])  # messages can only be made in a Flower task
    sent = request()
    got = read_request(request_message(sent, node_id=2, ttl_s=9.0), "alice")
    assert got.vector.tolist() == [1.0, 2.0]
    assert (got.client, got.round_num, got.round_seed) == ("alice", 3, 2**63 - 1)
    assert (got.schema_digest, got.plan) == ("5c", sent.plan)


def test_a_request_is_few_objects_that_live_until_the_deadline():
    """Flower's cost is per object, and a stale round must not be trained."""
    LocalGrid(ClientApp(), [])
    message = request_message(request(), node_id=2, ttl_s=9.0)
    assert len(get_all_nested_objects(message)) == 3
    assert message.metadata.ttl == 9.0
    assert message.metadata.message_type == MessageType.TRAIN


def test_the_whole_cohort_is_sent_the_same_content():
    """Flower stores each object once, and the door fetches it once: devices draw their seeds."""
    LocalGrid(ClientApp(), [])
    ann, bob = (request_message(request(name), node_id=2, ttl_s=9.0) for name in ("ann", "bob"))
    assert ann.content.object_id == bob.content.object_id
    assert request("ann").seed != request("bob").seed


def test_a_sound_reply_is_read_whole():
    """Delta, examples, round, schema and metrics arrive as the device sent them."""
    reply = replied(content())
    assert isinstance(reply.delta, np.ndarray)
    assert reply.delta.tolist() == [3.0, 4.0]
    assert (reply.client, reply.round_num, reply.schema_digest) == ("alice", 3, "5c")
    assert (reply.num_examples, reply.metrics) == (5, {"loss_mean": 0.5})
    assert reply.failure is None


@pytest.mark.parametrize(
    "answer",
    [
        content(delta=None),
        content(delta=b"junk!"),
        content(delta=7),
        content(delta="text"),
        content(num_examples=None),
        content(round=None),
        content(schema=None),
        RecordDict({"reply": ArrayRecord({"delta": Array(np.ones(2, np.float32))})}),
        RecordDict({"other": ConfigRecord(SOUND)}),
        RecordDict(),
    ],
)
def test_a_reply_that_cannot_be_read_is_a_failure_of_its_client(answer):
    """Whatever is missing or broken, the reading does not raise."""
    assert (replied(answer).failure or "").startswith("the reply cannot be read (")


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("OutOfMemoryError", "the device reported a failure (code 2): OutOfMemoryError"),
        ("No such file: /home/alice/diary.txt", "the device reported a failure (code 2)"),
        ("x" * 1000, "the device reported a failure (code 2)"),
        (None, "the device reported a failure (code 2)"),
    ],
)
def test_of_a_devices_error_only_the_class_is_kept(reason, kept):
    """An older or foreign ClientApp may send a whole traceback; it is not stored."""
    assert replied(Error(2, reason)).failure == kept


def test_lost_messages_leave_their_clients_out_and_the_others_in():
    """Refused at sending is told; silence ends with the deadline; a second reply is passed on."""
    fleet = FlowerFleet(LossyGrid("refused", "silent", "twice", "fine"), poll_s=0.01)
    requests = [request(client) for client in fleet.population()]
    replies = list(fleet.ask(requests, deadline_s=0.2))
    assert [r.client for r in replies] == ["refused", "twice", "twice", "fine"]
    assert replies[0].failure == "the coordinator could not send the request"
    assert [r.failure for r in replies[1:]] == [None, None, None]


def test_a_client_that_left_after_the_count_is_told_apart():
    """A request for a client that is no longer online fails alone."""
    fleet = FlowerFleet(LocalGrid(answering(content()), ["alice"]))
    fleet.population()
    replies = list(fleet.ask([request("bob"), request("alice")], None))
    assert [(r.client, r.failure) for r in replies] == [
        ("bob", "the coordinator could not send the request"),
        ("alice", None),
    ]


def test_a_nodes_name_is_its_clients_id():
    """A node that nobody registered by name goes by its number."""
    nodes = [NodeInfo(node_id=5, name="alice"), NodeInfo(node_id=6)]
    assert nodes_by_client(nodes) == {"alice": 5, "6": 6}


def test_two_nodes_of_one_name_are_an_error():
    """Nobody can tell whose update it would be."""
    nodes = [NodeInfo(node_id=5, name="alice"), NodeInfo(node_id=6, name="alice")]
    with pytest.raises(BadSetting, match=r"'alice' \(nodes 5 and 6\)"):
        nodes_by_client(nodes)


def test_a_reply_is_its_requests_whoever_sends_it():
    """Flower answers for a lost node as node 1; the request says whose reply it is."""
    grid = LocalGrid(answering(Error(5)), ["alice", "bob"])
    fleet = FlowerFleet(grid)
    fleet.population()
    replies = fleet.ask([request("bob"), request("alice")], None)
    assert [r.client for r in replies] == ["bob", "alice"]


class AwayGrid(LocalGrid):
    """Its SuperLink is away for the first two polls."""

    away = 2

    def pull_messages(self, message_ids):
        if self.away:
            self.away -= 1
            raise httpx.ConnectError("refused")
        return super().pull_messages(message_ids)


def test_a_superlink_that_is_away_for_a_while_costs_no_reply(monkeypatch):
    """
    Lost polls are asked again until the deadline.
    """
    monkeypatch.setattr(flower, "WORKS_AGAIN_S", 0.0)
    fleet = FlowerFleet(AwayGrid(answering(content()), ["alice"]))
    fleet.population()
    (reply,) = fleet.ask([request()], deadline_s=60)
    assert reply.num_examples == 5


def test_a_superlink_that_stays_away_costs_the_round_no_more_than_its_deadline(monkeypatch):
    """
    Nobody's reply came, and the round is over.
    """
    monkeypatch.setattr(flower, "WORKS_AGAIN_S", 0.0)
    grid = AwayGrid(answering(content()), ["alice"])
    grid.away = 10**9
    fleet = FlowerFleet(grid)
    fleet.population()
    assert list(fleet.ask([request()], deadline_s=0.05)) == []


def test_the_round_is_opened_once_its_requests_are_sent():
    """
    Not before, when a device would find nothing, and not after its reply.
    """
    seen = []

    class Told(LocalGrid):
        def push_messages(self, messages):
            seen.append("pushed")
            return super().push_messages(messages)

        def pull_messages(self, message_ids):
            seen.append("pulled")
            return super().pull_messages(message_ids)

    grid = Told(answering(content()), ["alice"])
    fleet = FlowerFleet(grid, sent=lambda: seen.append("sent"))
    fleet.population()
    assert len(list(fleet.ask([request()], None))) == 1
    assert seen == ["pushed", "sent", "pulled"]


def device(name: str, key: bytes) -> Device:
    """An enrolled device."""
    return Device(name, "ann", "laptop", key.ljust(32, b"."), key, enrolled_ms=0)


def test_only_enrolled_devices_with_their_own_keys_take_part():
    """
    A node that has a device's name and another key is nobody, and so is an unknown one.
    """
    nodes = [
        NodeInfo(node_id=7, name="ann", public_key=b"ann's"),
        NodeInfo(node_id=8, name="bob", public_key=b"mallory's"),
        NodeInfo(node_id=9, name="eve", public_key=b"eve's"),
    ]
    devices = [device("ann", b"ann's"), device("bob", b"bob's")]
    assert enrolled(nodes, devices) == {"ann": 7}
