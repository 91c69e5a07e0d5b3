"""The fleet's door: every call that it refuses, answers itself or lets through."""

import asyncio
from base64 import b64encode
from dataclasses import dataclass, field

import pytest
from flwr.proto.fab_pb2 import Fab, GetFabRequest, GetFabResponse
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Message,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node

from fedia3.coordinator.directory import Device, Invite, OpenRound, RoundControl, Token
from fedia3.coordinator.fleet_proxy import MAX_OBJECTS, UNKNOWN_S, Doorkeeper, Limits
from fedia3.coordinator.stores.memory_directory import MemoryDirectory
from fedia3.errors import Conflict
from fedia3.proto.fleet import OPERATIONS, PREFIX, Answer, Call

ANN, BOB = b"ann's key", b"bob's key"
IDS = {ANN: "a" * 32, BOB: "b" * 32}
NODE = Node(node_id=7)
APP = "the thin app's digest"
LATER_MS = 10**15


def device(key: bytes) -> Device:
    """An enrolled device with this node key."""
    return Device(IDS[key], "ann", "laptop", key.ljust(32, b"."), key, enrolled_ms=0)


def directory() -> MemoryDirectory:
    """Ann's and Bob's devices are enrolled."""
    made = MemoryDirectory()
    for key in (ANN, BOB):
        invite = Invite(key, "ann", LATER_MS, b"")
        made.add_invite(invite)
        made.enrol(invite, device(key), Token(key, "device", IDS[key], LATER_MS), now_ms=0)
    return made


@dataclass
class Clock:
    """Stands still until it is moved."""

    s: float = 0.0

    def __call__(self) -> float:
        return self.s


@dataclass
class Door:
    """A doorkeeper and the clock it looks at."""

    directory: MemoryDirectory = field(default_factory=directory)
    limits: Limits = field(default_factory=Limits)
    held_s: float = 0.0
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.keeper = Doorkeeper(
            self.directory,
            APP,
            limits=self.limits,
            held_s=self.held_s,
            now=self.clock,
            now_ms=lambda: round(self.clock.s * 1000),
        )

    def asks(self, *calls: Call) -> list[Answer | None]:
        """What becomes of the calls, one after the other; None is let through."""

        async def ask() -> list[Answer | None]:
            return [
                await self.keeper.greet(call) or await self.keeper.before(call) for call in calls
            ]

        return asyncio.run(ask())

    def status(self, call: Call) -> int | None:
        """The status of the door's own answer, None where the call is let through."""
        (answer,) = self.asks(call)
        return answer.status if answer else None


def call(name: str, request: object, key: bytes = ANN) -> Call:
    """A call as a node with this key makes it."""
    body = request.SerializeToString()  # type: ignore[attr-defined]  # a protobuf message
    return Call(OPERATIONS[PREFIX + name], {"flwr-public-key": b64encode(key).decode()}, body)


def poll(key: bytes = ANN) -> Call:
    """Asks for messages."""
    return call("pull-messages", PullMessagesRequest(node=NODE), key)


def heartbeat(key: bytes = ANN) -> Call:
    """Says that the node is there."""
    return call("send-node-heartbeat", SendNodeHeartbeatRequest(node=NODE), key)


def reply(*senders: int) -> Call:
    """A reply of these senders, pushed by node 7."""
    messages = [Message(metadata=Metadata(src_node_id=sender)) for sender in senders]
    return call("push-messages", PushMessagesRequest(node=NODE, messages_list=messages))


def touches(object_id: str, key: bytes = ANN) -> list[Call]:
    """Everything that a node can do to an object: read, write, delete it."""
    pulled = PullObjectRequest(node=NODE, object_id=object_id)
    pushed = PushObjectRequest(node=NODE, object_id=object_id)
    confirmed = ConfirmMessageReceivedRequest(node=NODE, message_object_id=object_id)
    return [
        call("pull-object", pulled, key),
        call("push-object", pushed, key),
        call("confirm-message-received", confirmed, key),
    ]


def opened(*keys: bytes, until_ms: int = LATER_MS) -> OpenRound:
    """A round that asks the devices with these keys."""
    return OpenRound(1, tuple(IDS[key] for key in keys), until_ms)


def test_an_enrolled_device_is_let_through() -> None:
    """
    Its heartbeat reaches the SuperLink.
    """
    assert Door().status(heartbeat()) is None


@pytest.mark.parametrize("name", sorted(o.name for o in OPERATIONS.values()))
def test_a_key_that_is_not_enrolled_is_refused(name: str) -> None:
    """
    401, whatever it asks for.
    """
    operation = OPERATIONS[PREFIX + name]
    assert Door().status(call(name, operation.request(), b"nobody's key")) == 401


def test_a_call_without_a_key_is_refused() -> None:
    """
    401: it comes from nobody.
    """
    bare = Call(OPERATIONS[PREFIX + "pull-messages"], {}, b"")
    assert Door().status(bare) == 401


def test_a_revoked_device_is_out_within_a_second() -> None:
    """
    What was remembered of it is older than that by then.
    """
    door = Door()
    assert door.status(heartbeat()) is None
    door.directory.revoke(IDS[ANN], now_ms=1)
    door.clock.s += 1.0
    assert door.status(heartbeat()) == 401
    assert door.status(heartbeat(BOB)) is None


def test_a_reply_in_another_devices_name_is_refused() -> None:
    """
    Node 7 may send node 7's replies; the SuperLink would believe any sender.
    """
    assert Door().status(reply(7)) is None
    assert Door().status(reply(8)) == 403
    assert Door().status(reply(7, 8)) == 403
    assert Door().status(reply()) == 403


def test_a_device_activates_its_own_key_only() -> None:
    """
    Another device's key in the request is a forgery.
    """
    assert Door().status(call("activate-node", ActivateNodeRequest(public_key=ANN))) is None
    assert Door().status(call("activate-node", ActivateNodeRequest(public_key=BOB))) == 403


def test_only_the_thin_app_is_fetched() -> None:
    """
    Another app's hash is refused before it reaches the SuperLink.
    """
    assert Door().status(call("get-fab", GetFabRequest(node=NODE, hash_str=APP))) is None
    assert Door().status(call("get-fab", GetFabRequest(node=NODE, hash_str="evil"))) == 403


def test_another_app_in_the_answer_is_held_back() -> None:
    """
    Also where the SuperLink itself would hand it out.
    """
    asked = call("get-fab", GetFabRequest(node=NODE, hash_str=APP))
    answer = Answer(body=GetFabResponse(fab=Fab(hash_str="evil")).SerializeToString())
    assert asyncio.run(Door().keeper.after(asked, answer)).status == 403


def statuses(door: Door, object_id: str, key: bytes = ANN) -> list[int | None]:
    """What becomes of pulling, pushing and confirming an object; None is let through."""
    return [answer.status if answer else None for answer in door.asks(*touches(object_id, key))]


def test_a_device_reads_its_own_requests_alone() -> None:
    """
    Ann may pull what her message is made of and confirm the message; Bob, who knows the ids, not.
    """
    door = Door()
    tree = ObjectTree(object_id="message", children=[ObjectTree(object_id="array")])
    fetched = PullMessagesResponse(messages_list=[Message()], message_object_trees=[tree])
    asyncio.run(door.keeper.after(poll(ANN), Answer(body=fetched.SerializeToString())))
    door.clock.s += UNKNOWN_S
    assert statuses(door, "message") == [None, 403, None]
    assert statuses(door, "array") == [None, 403, 403]
    assert statuses(door, "array", BOB) == [403, 403, 403]


def test_a_cohorts_common_object_is_fetched_once() -> None:
    """
    Ann fetches it from the SuperLink; Bob, who was told of it too, has it from the door.
    """
    door = Door()
    tree = ObjectTree(object_id="message", children=[ObjectTree(object_id="array")])
    fetched = PullMessagesResponse(messages_list=[Message()], message_object_trees=[tree])
    given = PullObjectResponse(object_found=True, object_available=True, object_content=b"1")

    async def ask() -> list[Answer | None]:
        for key in (ANN, BOB):
            await door.keeper.after(poll(key), Answer(body=fetched.SerializeToString()))
        pulls = [touches("array", key)[0] for key in (ANN, BOB)]
        first = await door.keeper.before(pulls[0])
        await door.keeper.after(pulls[0], Answer(body=given.SerializeToString()))
        return [first, await door.keeper.before(pulls[1])]

    assert asyncio.run(ask()) == [None, Answer(body=given.SerializeToString())]


def test_an_object_that_was_not_there_yet_is_asked_for_again() -> None:
    """
    The SuperLink names objects before it has them; its "not yet" is nothing to keep.
    """
    door = Door()
    tree = ObjectTree(object_id="array")
    fetched = PullMessagesResponse(messages_list=[Message()], message_object_trees=[tree])
    not_yet = PullObjectResponse(object_found=True, object_available=False)
    pull = touches("array")[0]

    async def ask() -> list[Answer | None]:
        await door.keeper.after(poll(), Answer(body=fetched.SerializeToString()))
        first = await door.keeper.before(pull)
        await door.keeper.after(pull, Answer(body=not_yet.SerializeToString()))
        return [first, await door.keeper.before(pull)]

    assert asyncio.run(ask()) == [None, None]


def test_a_device_writes_its_own_replies_alone() -> None:
    """
    Ann may push what she announced; that does not make another device's object hers to read.
    """
    door = Door()
    tree = ObjectTree(object_id="reply", children=[ObjectTree(object_id="delta")])
    sent = PushMessagesRequest(node=NODE, message_object_trees=[tree])
    asyncio.run(door.keeper.after(call("push-messages", sent), Answer()))
    door.clock.s += UNKNOWN_S
    assert statuses(door, "delta") == [403, None, 403]
    assert statuses(door, "delta", BOB) == [403, 403, 403]


def test_a_reply_has_few_objects() -> None:
    """
    Thousands of 12 MiB each would fill the SuperLink's disk; an update is a handful.
    """

    def announced(objects: int) -> Call:
        leaves = [ObjectTree(object_id=str(n)) for n in range(objects - 1)]
        tree = ObjectTree(object_id="reply", children=leaves)
        message = Message(metadata=Metadata(src_node_id=7))
        request = PushMessagesRequest(
            node=NODE, messages_list=[message], message_object_trees=[tree]
        )
        return call("push-messages", request)

    assert Door().status(announced(MAX_OBJECTS)) is None
    assert Door().status(announced(MAX_OBJECTS + 1)) == 413


def test_a_door_that_was_opened_anew_lets_work_under_way_go_on() -> None:
    """
    It does not know yet who was handed what; a minute later it does.
    """
    door = Door()
    assert statuses(door, "handed by the one before") == [None, None, None]
    door.clock.s += UNKNOWN_S
    assert statuses(door, "handed by the one before") == [403, 403, 403]


def test_an_idle_poll_is_answered_at_the_door() -> None:
    """
    No round is open: nothing to do, and the SuperLink never hears of the poll.
    """
    (answer,) = Door().asks(poll())
    assert answer == Answer(body=PullMessagesResponse().SerializeToString())


def test_polls_of_the_open_rounds_cohort_are_let_through() -> None:
    """
    Ann is asked in this round and Bob is not.
    """
    door = Door()
    door.directory.open_round(opened(ANN))
    assert door.status(poll(ANN)) is None
    assert door.status(poll(BOB)) == 200


def test_a_new_round_is_seen_within_half_a_second() -> None:
    """
    What was remembered of the rounds is older than that by then.
    """
    door = Door()
    assert door.status(poll()) == 200
    door.directory.open_round(opened(ANN))
    door.clock.s += 0.5
    assert door.status(poll()) is None


def test_a_clock_that_was_set_does_not_end_a_round() -> None:
    """
    A round is open until the directory says that it is not, whatever the time.
    """
    door = Door(clock=Clock(10.0))
    door.directory.open_round(opened(ANN, until_ms=5_000))
    assert door.status(poll()) is None


def request_in(round_num: int, until_ms: int) -> Answer:
    """A poll's answer that holds the request of a round with this deadline."""
    metadata = Metadata(group_id=str(round_num), created_at=0.0, ttl=until_ms / 1000)
    messages = [Message(metadata=metadata)]
    return Answer(body=PullMessagesResponse(messages_list=messages).SerializeToString())


async def settled() -> None:
    """Whatever can go on has gone on: the directory is read in threads."""
    for _ in range(20):
        await asyncio.sleep(0.005)


def test_a_held_poll_is_let_go_when_a_round_asks_its_device() -> None:
    """
    Ann's waits for nothing but the round; Bob's, whom it does not ask, waits on.
    """
    door = Door(held_s=600.0)

    async def scenario() -> None:
        anns = asyncio.create_task(door.keeper.before(poll(ANN)))
        bobs = asyncio.create_task(door.keeper.before(poll(BOB)))
        watching = asyncio.create_task(door.keeper.watch_rounds())
        await settled()
        assert not anns.done()
        door.directory.open_round(opened(ANN))
        door.clock.s += 1.0
        assert await anns is None
        assert not bobs.done()
        bobs.cancel()
        watching.cancel()

    asyncio.run(scenario())


def test_a_device_that_has_its_request_is_held_until_the_next_round() -> None:
    """
    There is one request for it in a round; an earlier round's late one does not count.
    """
    door = Door(clock=Clock(1.0))
    door.directory.open_round(opened(ANN, until_ms=10_000))

    async def scenario() -> list[Answer | None]:
        answers = []
        for fetched in (request_in(1, 9_000), request_in(2, 10_000), request_in(1, 10_000)):
            answers.append(await door.keeper.before(poll()))
            await door.keeper.after(poll(), fetched)
        return [*answers, await door.keeper.before(poll())]

    *before, then = asyncio.run(scenario())
    assert before == [None, None, None]
    assert then is not None


def test_a_newer_poll_takes_the_older_ones_place() -> None:
    """
    Whoever sent the older one is gone: it must not fetch what the newer one asks for.
    """
    door = Door(held_s=600.0)

    async def scenario() -> None:
        older = asyncio.create_task(door.keeper.before(poll()))
        await settled()
        newer = asyncio.create_task(door.keeper.before(poll()))
        answer = await older
        assert answer is not None
        assert answer.status == 200
        assert not newer.done()
        newer.cancel()

    asyncio.run(scenario())


def test_a_door_that_closes_holds_nobody() -> None:
    """
    Held polls are answered at once, and later ones are not held.
    """
    door = Door(held_s=600.0)

    async def scenario() -> None:
        held = asyncio.create_task(door.keeper.before(poll(ANN)))
        await settled()
        door.keeper.let_everybody_go()
        assert await held is not None
        assert await door.keeper.before(poll(BOB)) is not None

    asyncio.run(scenario())


def test_one_keys_flood_is_refused_and_costs_nobody_else() -> None:
    """
    Two calls at once, then one a second.
    """
    door = Door(limits=Limits(calls_a_s=1, at_once=2))
    calls = [heartbeat(), heartbeat(), heartbeat(), heartbeat(BOB)]
    assert [a.status if a else None for a in door.asks(*calls)] == [None, None, 429, None]
    door.clock.s += 1.0
    assert door.status(heartbeat()) is None


class BusyDirectory(MemoryDirectory):
    """Its database is locked."""

    def enrolled(self) -> tuple[Device, ...]:
        raise Conflict("another process kept the write lock")


def test_a_directory_that_cannot_be_read_refuses_for_a_while() -> None:
    """
    503, which a node repeats; after 401 to a heartbeat it would end itself.
    """
    assert Door(directory=BusyDirectory()).status(heartbeat()) == 503


class CountingDirectory(MemoryDirectory):
    """Counts how often it is read."""

    reads = 0

    def round_control(self) -> RoundControl:
        self.reads += 1
        return super().round_control()


def test_a_hundred_polls_at_once_read_the_directory_once() -> None:
    """
    The door does not hand its load on to the database.
    """
    counting = CountingDirectory()
    invite = Invite(ANN, "ann", LATER_MS, b"")
    counting.add_invite(invite)
    counting.enrol(invite, device(ANN), Token(ANN, "device", IDS[ANN], LATER_MS), now_ms=0)
    keeper = Door(directory=counting).keeper

    async def ask() -> None:
        await asyncio.gather(*(keeper.before(poll()) for _ in range(100)))

    asyncio.run(ask())
    assert counting.reads == 1
