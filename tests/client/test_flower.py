import logging

import numpy as np
import pytest
from flwr.app import (
    ConfigRecord,
    Context,
    Message,
    MessageType,
    Metadata,
    RecordDict,
)

from fedia3.adapters.update import ClientUpdate, TrainingPlan, TrainRequest
from fedia3.client.flower import client_app, deployed, read_request
from fedia3.client.trainer_socket import SOCKET_VARIABLE
from fedia3.errors import BadAdapter, BadInput, BadSetting, TrainerFailed

CONFIG = {"round": 3, "seed": 7, "schema": "5c", "plan.learning_rate": 0.02, "plan.max_steps": 4}


def message(vector: object = (1.0, 2.0), **config: object) -> Message:
    """A train message as the coordinator sends it; a field of None is left out."""
    data = vector if isinstance(vector, bytes | None) else np.array(vector, "<f4").tobytes()
    fields = {**CONFIG, "vector": data, **config}
    asked = ConfigRecord({k: v for k, v in fields.items() if v is not None})  # type: ignore[arg-type]  # any field
    return _from_the_wire(RecordDict({"request": asked}))


def _from_the_wire(content: RecordDict) -> Message:
    metadata = Metadata(
        run_id=1, message_id="7", src_node_id=1, dst_node_id=2, reply_to_message_id="",
        group_id="3", created_at=0.0, ttl=60.0, message_type=MessageType.TRAIN,
    )  # fmt: skip
    return Message(content, metadata=metadata)  # type: ignore[call-overload]  # Flower's own way


def node(**config: str) -> Context:
    """The context of a node that was started with ``config``."""
    return Context(1, 2, dict(config), RecordDict(), {})


class Doubler:
    """Answers with a delta that doubles what it was sent."""

    def train(self, request: TrainRequest) -> ClientUpdate:
        return ClientUpdate(request.vector, 5, {"loss_mean": 0.5, "of": float(request.round_seed)})


class Blabber:
    """Fails with a person's words in the exception's text and in its cause."""

    def train(self, request: TrainRequest) -> ClientUpdate:
        try:
            raise FileNotFoundError("/home/alice/diary.txt")
        except FileNotFoundError as error:
            raise RuntimeError("Dear diary, nobody must know") from error


def test_a_request_is_read_as_it_was_sent():
    """Vector, round, seed, schema and plan; what the plan leaves out has its default."""
    request = read_request(message(), "alice")
    assert request.vector.tolist() == [1.0, 2.0]
    assert (request.client, request.round_num, request.round_seed) == ("alice", 3, 7)
    assert request.schema_digest == "5c"
    assert request.plan == TrainingPlan(learning_rate=0.02, max_steps=4)


def test_the_reply_is_one_record_with_delta_metrics_and_what_it_is_for():
    """The delta goes back beside the number of examples, the round and the schema."""
    reply = client_app(Doubler())(message(), node(client="alice"))
    assert list(reply.content) == ["reply"]
    assert dict(reply.content["reply"]) == {
        "round": 3,
        "schema": "5c",
        "delta": np.array([1, 2], "<f4").tobytes(),
        "num_examples": 5,
        "metrics.loss_mean": 0.5,
        "metrics.of": 7.0,
    }
    assert reply.metadata.reply_to_message_id == "7"


def test_nothing_an_exception_says_leaves_the_device(caplog):
    """The reply names the failure's class; words and paths go to the device's own log alone."""
    with caplog.at_level(logging.ERROR):
        reply = client_app(Blabber())(message(), node(client="alice"))
    assert reply.error.reason == "RuntimeError"
    sent = repr(reply)
    assert not any(word in sent for word in ("diary", "nobody", "alice", "Traceback"))
    assert "Dear diary" in caplog.text


def test_a_node_without_a_client_answers_with_an_error():
    """A node that nobody named trains for nobody."""
    reply = client_app(Doubler())(message(), node())
    assert reply.error.reason == "BadSetting"


@pytest.mark.parametrize(
    ("sent", "error", "says"),
    [
        (_from_the_wire(RecordDict()), BadInput, "with a request"),
        (message(vector=None), BadInput, "vector as bytes, got NoneType"),
        (message(vector=b"junk!"), BadAdapter, "whole float32 numbers, got 5 bytes"),
        (message(vector=[1.0, np.nan]), BadAdapter, "1 of 2 are not finite"),
        (message(round="3"), BadInput, "round as int, got str"),
        (message(round=True), BadInput, "round as int, got bool"),
        (message(seed=None), BadInput, "seed as int, got NoneType"),
        (message(schema=b"5c"), BadInput, "schema as str, got bytes"),
        (message(**{"plan.learning_rate": 7.0}), BadSetting, "learning_rate"),
        (message(**{"plan.epochs": "many"}), BadSetting, "cannot follow the training plan"),
        (message(**{"plan.dropout": 0.1}), BadSetting, "dropout"),
    ],
)
def test_a_malformed_request_is_refused(sent, error, says):
    """Every part of a message is checked before the trainer sees it."""
    with pytest.raises(error, match=says):
        read_request(sent, "alice")


def test_the_deployed_app_answers_with_the_class_of_the_trainers_failure(monkeypatch, tmp_path):
    """Without a trainer there is nobody to ask; a trainer's own failure keeps its class."""
    monkeypatch.setenv(SOCKET_VARIABLE, str(tmp_path / "trainer.sock"))
    reply = deployed(message(), node(client="alice"))
    assert reply.error.reason == "Unreachable"

    class Failing:
        def train(self, request: TrainRequest) -> ClientUpdate:
            raise TrainerFailed("the trainer failed with OSError", "OSError")

    assert client_app(Failing())(message(), node(client="alice")).error.reason == "OSError"
