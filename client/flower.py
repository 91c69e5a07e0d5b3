"""The device's end of a round over Flower: check the message, let the trainer work, answer.

fedia3.coordinator.flower is the other end and says what a message holds. What goes back is the
delta, an example count, metrics and, where something fails, the class of the failure: no text of
an exception, which may quote a path or a person's words.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from flwr.app import ConfigRecord, ConfigRecordValues, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedia3.adapters.adapter import Vector, vector_bytes, vector_of
from fedia3.adapters.update import ClientUpdate, TrainingPlan, TrainRequest
from fedia3.client.trainer_socket import SOCKET_VARIABLE, RemoteTrainer
from fedia3.errors import BadAdapter, BadInput, BadSetting, TrainerFailed

CLIENT_APP_RAISED = 2  # Flower's error code for a failing ClientApp

T = TypeVar("T", int, str, bytes)

logger = logging.getLogger(__name__)


class Trainer(Protocol):
    """Whoever holds the model and the user's data."""

    def train(self, request: TrainRequest) -> ClientUpdate:
        """Train ``request.vector`` on the data of ``request.client``."""


def client_app(trainer: Trainer) -> ClientApp:
    """A Flower ClientApp for the client that the node's config names: ``client="alice"``.

    Whatever goes wrong is logged here and answered with a Flower error that names the failure's
    class and nothing else.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            request = read_request(message, client_of(context))
            return reply_message(trainer.train(request), request, message)
        except Exception as error:
            logger.exception("this device takes no part in the round")
            return Message(Error(CLIENT_APP_RAISED, _class_of(error)), reply_to=message)

    return app


def _class_of(error: Exception) -> str:
    return error.kind if isinstance(error, TrainerFailed) else type(error).__name__


class _TrainerOfThisDevice:
    """The resident trainer, whose socket the environment of this process names."""

    def train(self, request: TrainRequest) -> ClientUpdate:
        return RemoteTrainer(Path(os.environ[SOCKET_VARIABLE])).train(request)


def client_of(context: Context) -> str:
    """The client that this node trains for.

    Raises:
        BadSetting: the node was started without one.
    """
    client = context.node_config.get("client")
    if isinstance(client, str) and client:
        return client
    raise BadSetting(f"start the node with --node-config 'client=\"NAME\"', got {client!r}")


def read_request(message: Message, client: str) -> TrainRequest:
    """The request in a message, checked as a stranger's.

    Raises:
        BadInput: a part is missing or of the wrong type.
        BadAdapter: the vector is no float32 numbers, or not all are finite.
        BadSetting: the training plan is out of range, or has fields this version does not know.
    """
    try:
        asked = dict(message.content.config_records["request"])
    except KeyError as error:
        raise BadInput("expected a train message with a request, got none") from error
    return TrainRequest(
        client=client,
        round_num=_field(asked, "round", int),
        round_seed=_field(asked, "seed", int),
        vector=_checked_vector(_field(asked, "vector", bytes)),
        schema_digest=_field(asked, "schema", str),
        plan=_checked_plan(asked),
    )


def _field(asked: Mapping[str, object], name: str, kind: type[T]) -> T:
    value = asked.get(name)
    if type(value) is not kind:
        raise BadInput(f"expected {name} as {kind.__name__}, got {type(value).__name__}")
    return value


def _checked_vector(data: bytes) -> Vector:
    vector = vector_of(data)
    if not np.isfinite(vector).all():
        raise BadAdapter(f"{int((~np.isfinite(vector)).sum())} of {vector.size} are not finite")
    return vector


def _checked_plan(asked: Mapping[str, object]) -> TrainingPlan:
    fields = {k.removeprefix("plan."): v for k, v in asked.items() if k.startswith("plan.")}
    try:
        return TrainingPlan(**fields)  # type: ignore[arg-type]  # the plan checks its ranges
    except TypeError as error:
        raise BadSetting(f"this version cannot follow the training plan: {error}") from error


def reply_message(update: ClientUpdate, request: TrainRequest, message: Message) -> Message:
    """The update on the wire: one record with delta, example count, metrics, what it is for."""
    told: dict[str, ConfigRecordValues] = {
        "round": request.round_num,
        "schema": request.schema_digest,
        "delta": vector_bytes(update.delta),
        "num_examples": int(update.num_examples),
    }
    told |= {f"metrics.{name}": float(value) for name, value in update.metrics.items()}
    content = RecordDict({"reply": ConfigRecord(told)})
    return Message(content, reply_to=message)


deployed = client_app(_TrainerOfThisDevice())
"""What a device runs for each message: the thin app names it."""
