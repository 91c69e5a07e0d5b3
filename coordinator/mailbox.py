"""A round's replies, fetched from the SuperLink without waiting for one of them.

A device announces its reply before it uploads the objects that the reply is made of. Flower's own
``Grid.pull_messages`` waits for an announced reply, for up to three minutes, with all others behind
it; so a device that dies in between, or means harm, would hold every round.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import httpx
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.superlink.grid.http_grid import HttpGrid

logger = logging.getLogger(__name__)


class Runtime(Protocol):
    """What of the SuperLink's runtime API fetches replies. Any call may raise ``HTTPError``."""

    PullMessages: Callable[[PullAppMessagesRequest], PullAppMessagesResponse]
    PullObject: Callable[..., object]
    ConfirmMessageReceived: Callable[[ConfirmMessageReceivedRequest], object]


@dataclass
class _Announced:
    """A reply of which not all objects are here yet."""

    metadata: Metadata
    missing: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)


class Mailbox:
    """The replies to one run's requests."""

    def __init__(self, runtime: Runtime, node: Node, run_id: int) -> None:
        self._runtime, self._node, self._run_id = runtime, node, run_id
        self._fetch = make_pull_object_fn_protobuf(runtime.PullObject, node, run_id)  # type: ignore[arg-type]  # one call of the API
        self._announced: dict[str, _Announced] = {}  # by the request's id

    @classmethod
    def of(cls, grid: Grid) -> "Mailbox":
        """Of the run that a deployed ServerApp's grid speaks for."""
        assert isinstance(grid, HttpGrid)
        return cls(grid._runtime_client, grid.node, grid.run.run_id)  # type: ignore[arg-type]  # Flower offers no other way

    def pull(self, request_ids: Sequence[str]) -> list[Message]:
        """The replies to these requests that are here by now, each once.

        One that cannot be had, as its upload was given up or it is no message, comes as an error.

        Raises:
            httpx.HTTPError: the SuperLink does not answer; nothing is lost by that.
        """
        wanted = set(request_ids)
        self._announced = {i: a for i, a in self._announced.items() if i in wanted}
        # an announced reply is asked for no more: Flower would answer with an error
        if unheard := [i for i in wanted if i not in self._announced]:
            self._note(self._runtime.PullMessages(PullAppMessagesRequest(message_ids=unheard)))
        ready = list[Message]()
        for request_id, reply in list(self._announced.items()):
            try:
                message = self._completed(reply)
            except httpx.HTTPError:
                if not ready:
                    raise
                break
            except Exception as error:  # a device's bytes may break Flower's decoding in any way
                message = _unavailable(reply.metadata, error)
            if message:
                ready.append(message)
                del self._announced[request_id]
        return ready

    def _note(self, pulled: PullAppMessagesResponse) -> None:
        trees: Sequence[ObjectTree] = pulled.message_object_trees
        for told, tree in zip(pulled.messages_list, trees, strict=True):
            objects = [each.object_id for each in iterate_object_tree(tree)]
            metadata = metadata_from_proto(told.metadata)
            self._announced[metadata.reply_to_message_id] = _Announced(
                metadata, list(dict.fromkeys(objects))
            )

    def _completed(self, reply: _Announced) -> Message | None:
        while reply.missing:
            try:
                reply.contents[reply.missing[0]] = self._fetch(reply.missing[0])
            except ObjectUnavailableError:
                return None
            del reply.missing[0]
        message_id = reply.metadata.message_id
        self._runtime.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._node, run_id=self._run_id, message_object_id=message_id
            )
        )
        message = inflate_object_from_contents(message_id, reply.contents)
        if not isinstance(message, Message):
            raise TypeError(f"expected a message, got {type(message).__name__}")
        # whose reply it is stands in what was announced, which the door has checked
        if message.has_error():
            return make_message(reply.metadata, error=message.error)
        return make_message(reply.metadata, message.content)


def _unavailable(metadata: Metadata, error: Exception) -> Message:
    reason = type(error).__name__  # the text may hold what the device sent
    logger.warning("the reply of Flower's node %d cannot be had: %s", metadata.src_node_id, reason)
    return make_message(metadata, error=Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason))
