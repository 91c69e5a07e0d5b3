"""Rounds over Flower: our own loop on the public ``Grid``, one message per client and round.

A request is ONE config record with the global adapter as bytes, and so is a reply: Flower's cost is
per object, each pushed, pulled and stored by itself, and an array record alone is three of them.
fedia3.client.flower is the other end. Flower's ``Strategy.start`` is not used: it cannot resume,
holds all replies in memory and dies of one malformed reply.
"""

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import zip_longest
from typing import cast

import httpx
from flwr.app import ConfigRecord, ConfigRecordValues, Context, Message, MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp

from fedia3.adapters.adapter import vector_bytes, vector_of
from fedia3.adapters.update import TrainingPlan, TrainRequest
from fedia3.clock import wall_ms
from fedia3.coordinator.directory import Device
from fedia3.coordinator.gate import Reply
from fedia3.coordinator.rounds import Fleet
from fedia3.errors import BadSetting

POLL_S = 0.25
WORKS_AGAIN_S = 1.0  # between tries of a SuperLink that is being started again
CLASS_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}", re.ASCII)

Nodes = Iterable[NodeInfo]

logger = logging.getLogger(__name__)


class FlowerFleet:
    """The devices behind a Flower ``Grid``; a node's registered name is its client's id.

    ``admitted`` says which of the nodes online take part, by client; ``sent`` is called when a
    round's requests lie at the SuperLink; ``pull``, by default the grid's, fetches the replies that
    are there. A SuperLink that is away for a while costs time, not the round: the requests and
    replies lie in its database.
    """

    def __init__(
        self,
        grid: Grid,
        poll_s: float = POLL_S,
        admitted: Callable[[Nodes], Mapping[str, int]] | None = None,
        sent: Callable[[], None] = lambda: None,
        pull: Callable[[Sequence[str]], Iterable[Message]] | None = None,
    ) -> None:
        self._grid = grid
        self._pull_ready = pull or grid.pull_messages
        self._poll_s = poll_s
        self._admitted = admitted or nodes_by_client
        self._sent = sent
        self._nodes: Mapping[str, int] = {}

    def population(self) -> Sequence[str]:
        """The clients online now.

        Raises:
            BadSetting: two nodes are registered under one name.
        """
        self._nodes = self._admitted(self._grid.get_nodes())
        return tuple(self._nodes)

    def ask(self, requests: Sequence[TrainRequest], deadline_s: float | None) -> Iterator[Reply]:
        """Send one message per request; yield the replies as they come, until ``deadline_s``.

        The deadline is also each message's time to live: a device that comes back later finds
        nothing to do rather than a stale round.
        """
        ends = time.monotonic() + deadline_s if deadline_s else float("inf")
        asked: dict[str, str] = {}  # message id -> client
        for client, message_id in self._push(requests, deadline_s):
            if message_id:
                asked[message_id] = client
            else:
                yield Reply(client, failure="the coordinator could not send the request")
        self._sent()
        yield from self._pull(asked, ends)

    def _push(
        self, requests: Sequence[TrainRequest], ttl_s: float | None
    ) -> Iterator[tuple[str, str | None]]:
        """Client and message id of each request; None where it could not be sent."""
        online = [r for r in requests if r.client in self._nodes]
        yield from ((r.client, None) for r in requests if r.client not in self._nodes)
        messages = [request_message(r, self._nodes[r.client], ttl_s) for r in online]
        # Flower gives None for a message it did not take, and no ids at all if all were too large
        ids: Iterable[str | None] = self._grid.push_messages(messages)
        yield from zip_longest((r.client for r in online), ids)

    def _pull(self, asked: Mapping[str, str], ends: float) -> Iterator[Reply]:
        # answered ids are asked for no more: Flower would answer them with an error
        waiting = dict(asked)
        while waiting and (left := ends - time.monotonic()) > 0:
            messages = self._pulled(list(waiting))
            for message in messages:
                # not by the sender: Flower answers for a lost node as node 1
                request_id = message.metadata.reply_to_message_id
                if request_id in asked:
                    waiting.pop(request_id, None)
                    yield reply_of(message, asked[request_id])
            if not messages:
                time.sleep(min(self._poll_s, left))

    def _pulled(self, message_ids: Sequence[str]) -> Sequence[Message]:
        try:
            return list(self._pull_ready(message_ids))
        except httpx.HTTPError as error:
            logger.warning("a poll was lost (%s); asking again", type(error).__name__)
            time.sleep(WORKS_AGAIN_S)
            return []


def server_app(campaign: Callable[[Fleet], object]) -> ServerApp:
    """A Flower ServerApp that runs ``campaign``, mostly rounds.run_rounds, on the run's devices."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001  # Flower's signature
        campaign(FlowerFleet(grid))

    return app


deployed = ServerApp()
"""The ServerApp of a deployment, which the thin app names; its settings are the coordinator's."""


@deployed.main()
def _deployed(grid: Grid, context: Context) -> None:
    # a simulation needs none of these
    from fedia3.coordinator import campaign  # noqa: PLC0415  # as above
    from fedia3.coordinator.config import config_path, read_config  # noqa: PLC0415  # as above
    from fedia3.coordinator.directory import open_directory  # noqa: PLC0415  # as above
    from fedia3.coordinator.mailbox import Mailbox  # noqa: PLC0415  # as above
    from fedia3.coordinator.registry import Registry  # noqa: PLC0415  # as above

    config = read_config(config_path())
    campaign.note_process(config, context.run_id)
    log = campaign.rounds_log(config)
    with (
        Registry.open(config.registry, config.database) as registry,
        closing(open_directory(config.registry, config.database)) as directory,
    ):
        book = campaign.Bookkeeper(directory, config.rounds.deadline_s, log, wall_ms)
        fleet = FlowerFleet(
            grid,
            admitted=lambda nodes: enrolled(nodes, directory.enrolled()),
            sent=book.requests_sent,
            pull=Mailbox.of(grid).pull,
        )
        work = campaign.Campaign(
            registry,
            directory,
            fleet,
            book,
            config.plan,
            config.rounds,
            campaign.starting_adapter(config),
            log,
            is_draining=config.drain_file.exists,
        )
        try:
            work.run(int(context.run_config["rounds"]))
        except Exception as error:
            log.error("the run ends: %s: %s", type(error).__name__, error)
            raise


def enrolled(nodes: Nodes, devices: Sequence[Device]) -> dict[str, int]:
    """Node ids by device: of those nodes that are an enrolled device with the same key."""
    keys = {device.device_id: device.node_key for device in devices}
    return {node.name: node.node_id for node in nodes if keys.get(node.name) == node.public_key}


def nodes_by_client(nodes: Iterable[NodeInfo]) -> dict[str, int]:
    """Node ids by client: the node's registered name, or its number where it has none.

    Raises:
        BadSetting: two nodes are registered under one name.
    """
    found: dict[str, int] = {}
    for node in nodes:
        client = node.name or str(node.node_id)
        if client in found:
            raise BadSetting(
                f"two devices online are registered as {client!r} (nodes {found[client]} and "
                f"{node.node_id}); unregister one of them"
            )
        found[client] = node.node_id
    return found


def request_message(request: TrainRequest, node_id: int, ttl_s: float | None) -> Message:
    """The request on the wire; the client's id stays behind, its node knows who it is.

    So the content is the same bytes for a whole cohort, which Flower stores once.
    """
    asked: dict[str, ConfigRecordValues] = {
        "round": request.round_num,
        "seed": request.round_seed,
        "schema": request.schema_digest,
        "vector": vector_bytes(request.vector),
        **_plan_fields(request.plan),
    }
    content = RecordDict({"request": ConfigRecord(asked)})
    return Message(content, node_id, MessageType.TRAIN, ttl=ttl_s, group_id=str(request.round_num))


def _plan_fields(plan: TrainingPlan) -> dict[str, int | float]:
    # a config record cannot say None: an absent field is one
    return {f"plan.{name}": value for name, value in asdict(plan).items() if value is not None}


def reply_of(message: Message, client: str) -> Reply:
    """What a message says, whatever it says: the gate judges it."""
    if message.has_error():
        return Reply(client, failure=_failure(message))
    try:
        return _read_reply(message.content, client)
    except Exception as error:  # a device's bytes may break Flower's decoding in any way
        return Reply(client, failure=f"the reply cannot be read ({type(error).__name__})")


def _failure(message: Message) -> str:
    """Flower's error code and the error's class; free text may hold what is on the device."""
    reason = message.error.reason or ""
    named = f": {reason}" if CLASS_NAME.fullmatch(reason) else ""
    return f"the device reported a failure (code {message.error.code}){named}"


def _read_reply(content: RecordDict, client: str) -> Reply:
    told = dict(content.config_records["reply"])
    return Reply(
        client,
        round_num=told["round"],
        schema_digest=told["schema"],
        delta=vector_of(cast(bytes, told["delta"])),
        num_examples=told["num_examples"],
        metrics={
            name.removeprefix("metrics."): value
            for name, value in told.items()
            if name.startswith("metrics.")
        },
    )
