"""Flower in one process: the same ServerApp and ClientApp, on one machine and one base model.

No Ray and no processes: a client-round costs a message copy each way, and every client shares the
base model that the trainer holds.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from itertools import count, islice
from typing import NoReturn

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedia3.adapters.update import TrainRequest
from fedia3.client.flower import CLIENT_APP_RAISED, read_request
from fedia3.errors import BadSetting

SERVER_NODE = 1  # as Flower's SuperLink
RUN = 1

BeforeChunk = Callable[[Sequence[TrainRequest]], None]


class LocalGrid(Grid):
    """Flower's ``Grid`` with the nodes in this process; ``nodes`` are the clients' ids.

    Messages wait until they are pulled; a pull trains the next ``chunk`` of them and returns their
    replies, so that the server folds them as they come and no more than a chunk is in memory.
    ``before_chunk`` gets the chunk's requests first: a trainer can work on them in one batched
    pass and hand out the results when the ClientApp asks for each client's.
    """

    def __init__(
        self,
        client_app: ClientApp,
        nodes: Sequence[str],
        *,
        chunk: int = 1,
        before_chunk: BeforeChunk | None = None,
    ) -> None:
        if chunk < 1:
            raise BadSetting(f"a chunk has at least 1 client, got {chunk}")
        self._client_app = client_app
        self._clients = dict(enumerate(nodes, start=SERVER_NODE + 1))
        self._chunk = chunk
        self._before_chunk = before_chunk
        self._queue: dict[str, Message] = {}
        self._numbers = count(1)
        self._run = Run.create_empty(RUN)
        _take_the_server_identity()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Every node, always online."""
        return [NodeInfo(node_id=i, name=client) for i, client in self._clients.items()]

    def get_node_ids(self) -> Iterable[int]:
        """Every node's id."""
        return list(self._clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue the messages; their ids in the same order."""
        return [self._queued(message) for message in messages]

    def _queued(self, message: Message) -> str:
        message_id = str(next(self._numbers))
        # Flower's own grids set the id just so: Metadata has no setter for it
        message.metadata.__dict__["_message_id"] = message_id
        self._queue[message_id] = message
        return message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Train the next chunk of these messages; their replies. Nothing left gives nothing."""
        chunk = self._take(set(message_ids))
        if self._before_chunk is not None and chunk:
            self._before_chunk([read_request(m, self._client_of(m)) for m in chunk])
        return [self._deliver(message) for message in chunk]

    def _take(self, wanted: set[str]) -> list[Message]:
        ids = list(islice((i for i in self._queue if i in wanted), self._chunk))
        return [self._queue.pop(i) for i in ids]

    def _deliver(self, message: Message) -> Message:
        """The ClientApp's reply; both sides get copies, as over a wire."""
        context = Context(
            run_id=RUN,
            node_id=message.metadata.dst_node_id,
            node_config={"client": self._client_of(message)},
            state=RecordDict(),  # new each time: a device's state lives in its own store
            run_config={},
        )
        try:
            return deepcopy(self._client_app(deepcopy(message), context))
        except Exception as error:  # Flower answers for a ClientApp that raises; we without text
            return Message(Error(CLIENT_APP_RAISED, type(error).__name__), reply_to=message)

    def _client_of(self, message: Message) -> str:
        return self._clients[message.metadata.dst_node_id]

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,  # noqa: ARG002  # Flower's signature
    ) -> Iterable[Message]:
        """Push the messages and train until all have replied; ``timeout`` has no meaning here."""
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while len(replies) < len(waiting):
            replies.extend(self.pull_messages(waiting))
        return replies

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As Flower's own grids; new code calls ``Message`` itself."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @property
    def run(self) -> Run:
        """The one run of this process."""
        return self._run

    def set_run(self, run: Run) -> NoReturn:  # noqa: ARG002  # Flower's signature
        """A local grid is born with its run.

        Raises:
            BadSetting: always.
        """
        raise BadSetting("a LocalGrid has one run, which cannot be set")


def run_server_app(app: ServerApp, grid: LocalGrid) -> None:
    """Run a ServerApp on ``grid`` to its end; its errors come through as they are."""
    app(grid, Context(RUN, SERVER_NODE, {}, RecordDict(), {}))


def _take_the_server_identity() -> None:
    """Messages can only be made inside a Flower task: say that this process is one."""
    TaskIdentity.run_id = RUN
    TaskIdentity.node_id = SERVER_NODE
    TaskIdentity.task_id = RUN
