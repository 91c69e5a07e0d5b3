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
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from fedia3.adapters.adapter import Vector
from fedia3.adapters.update import ClientUpdate, TrainingPlan, TrainRequest
from fedia3.client.trainer_socket import SOCKET_VARIABLE, RemoteTrainer
from fedia3.errors import BadAdapter, BadInput, BadSetting, TrainerFailed

CLIENT_APP_RAISED = 2  # Flower's error code for a failing ClientApp

T = TypeVar("T", int, str)

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
        BadAdapter: the vector is no flat float32 array of finite numbers.
        BadSetting: the training plan is out of range, or has fields this version does not know.
    """
    content = message.content
    try:
        config = dict(content["config"])
        array = content["arrays"]["ia3"]
    except KeyError as error:
        raise BadInput(f"expected a train message with arrays and config, no {error}") from error
    if not isinstance(array, Array):
        raise BadInput(f"expected the adapter as an array, got {type(array).__name__}")
    return TrainRequest(
        client=client,
        round_num=_field(config, "round", int),
        seed=_field(config, "seed", int),
        vector=_checked_vector(array),
        schema_digest=_field(config, "schema", str),
        plan=_checked_plan(config),
    )


def _field(config: Mapping[str, object], name: str, kind: type[T]) -> T:
    value = config.get(name)
    if type(value) is not kind:
        raise BadInput(f"expected {name} as {kind.__name__}, got {type(value).__name__}")
    return value


def _checked_vector(array: Array) -> Vector:
    try:
        vector = array.numpy()
    except (ValueError, TypeError, EOFError, MemoryError) as error:
        raise BadAdapter(f"the adapter's bytes are no array: {error}") from error
    if vector.dtype != np.float32 or vector.ndim != 1:
        raise BadAdapter(f"expected a flat float32 vector, got {vector.dtype} {vector.shape}")
    if not np.isfinite(vector).all():
        raise BadAdapter(f"{int((~np.isfinite(vector)).sum())} of {vector.size} are not finite")
    return vector


def _checked_plan(config: Mapping[str, object]) -> TrainingPlan:
    fields = {k.removeprefix("plan."): v for k, v in config.items() if k.startswith("plan.")}
    try:
        return TrainingPlan(**fields)  # type: ignore[arg-type]  # the plan checks its ranges
    except TypeError as error:
        raise BadSetting(f"this version cannot follow the training plan: {error}") from error


def reply_message(update: ClientUpdate, request: TrainRequest, message: Message) -> Message:
    """The update on the wire: one float32 array, the example count, metrics, what it is for."""
    delta = np.asarray(update.delta, dtype=np.float32)
    metrics = {name: float(value) for name, value in update.metrics.items()}
    content = RecordDict(
        {
            "arrays": ArrayRecord({"delta": Array(delta)}),
            "metrics": MetricRecord({**metrics, "num-examples": int(update.num_examples)}),
            "config": ConfigRecord({"round": request.round_num, "schema": request.schema_digest}),
        }
    )
    return Message(content, reply_to=message)


deployed = client_app(_TrainerOfThisDevice())
"""What a device runs for each message: the thin app names it."""
