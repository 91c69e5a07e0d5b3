"""The fleet's public door: who may call the SuperLink, what with, and when a call reaches it.

Behind the door the SuperLink checks that a call's signature belongs to the key it shows, and that
the node it speaks for belongs to that key. What it does not check is checked here: that the key is
an enrolled device's, that a reply is the sender's own, that an object is part of the device's own
messages, that no other app is fetched. Until the SuperLink has looked a key is only a claim, so all
that it gets from the door itself is what an empty poll gets.

A poll that has nothing to fetch is held here until a round asks its device. So an idle device costs
the SuperLink nothing but its heartbeats, and one that is asked learns it at once: after an empty
answer a node sleeps for three seconds, whatever happens.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedia3.clock import wall_ms
from fedia3.coordinator.directory import Directory, OpenRound, RoundControl
from fedia3.coordinator.handed_objects import HandedObjects, object_ids
from fedia3.coordinator.last_seen import LastSeen
from fedia3.coordinator.object_cache import ObjectCache
from fedia3.errors import Fedia3Error
from fedia3.proto.fleet import Answer, Call, refusal

DEVICES_EVERY_S = 0.9  # a revoked device is out within a second
ROUND_EVERY_S = 0.2
HELD_S = 20.0  # a node gives its poll up after 30, a relay on the way after 25
NOTED_EVERY_S = 5.0
UNKNOWN_S = 60.0  # after the door opened it does not know who was handed what before
MAX_OBJECTS = 8  # of one reply: an update has three
CALLS_A_S, CALLS_AT_ONCE = 50.0, 200.0  # of one key
KEYS_COUNTED = 10_000

Now = Callable[[], float]  # s, monotonic

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much one key may call."""

    calls_a_s: float = CALLS_A_S
    at_once: float = CALLS_AT_ONCE


class Doorkeeper:
    """A judge of fleet calls; ``app_digest`` is the only app that devices may fetch."""

    def __init__(
        self,
        directory: Directory,
        app_digest: str,
        *,
        limits: Limits = Limits(),
        held_s: float = HELD_S,
        now: Now = time.monotonic,
        now_ms: Callable[[], int] = wall_ms,
    ) -> None:
        self._directory = directory
        self._app_digest = app_digest
        self._devices = _Remembered(self._read_devices, DEVICES_EVERY_S, now)
        self._control = _Remembered(directory.round_control, ROUND_EVERY_S, now)
        self._handed, self._cache = HandedObjects(), ObjectCache()
        self._now, self._opened_at = now, now()
        self._held_s = held_s
        self._held: dict[str, asyncio.Event] = {}  # by device: its poll
        self._served: dict[str, OpenRound] = {}  # by device: the last round it fetched
        self._allowance = _Allowance(limits, now)
        self._last_seen = LastSeen(directory, now_ms)

    async def greet(self, call: Call) -> Answer | None:
        """Refuse strangers, and who calls too often, before anything of theirs is kept."""
        try:
            devices: Mapping[bytes, str] = await self._devices.value()
        except Fedia3Error as error:
            return _no_directory(error)
        if call.key not in devices:
            return refusal(401, "this key belongs to no enrolled device; enrol it")
        if not self._allowance.takes(call.key):
            return refusal(429, "too many calls; come again later")
        return None

    async def before(self, call: Call) -> Answer | None:
        """Refuse, answer an idle poll, or pass the call on."""
        try:
            devices: Mapping[bytes, str] = await self._devices.value()
            device_id = devices.get(call.key)
            if device_id is None:
                return refusal(401, "this key belongs to no enrolled device any more; enrol it")
            fault = _fault(call, self._app_digest) or self._foreign(call, device_id)
            return fault or await self._cached(call, device_id) or await self._idle(call, device_id)
        except Fedia3Error as error:
            return _no_directory(error)

    async def after(self, call: Call, answer: Answer) -> Answer:
        """Let the answer through, unless it brings another app; note what it says."""
        name = call.operation.name
        if name == "pull-object":
            self._keep(call, answer)
        if answer.status != 200:
            return answer
        if name == "get-fab" and not _is_app(answer.message(call.operation), self._app_digest):
            return refusal(403, "the coordinator hands out another app")
        if name in ("send-node-heartbeat", "pull-messages", "push-messages"):
            devices: Mapping[bytes, str] = await self._devices.value()
            if device_id := devices.get(call.key):
                await self._note(device_id, call, answer)
        return answer

    async def _note(self, device_id: str, call: Call, answer: Answer) -> None:
        request: Any = call.message
        if call.operation.name == "send-node-heartbeat":
            self._last_seen.note(device_id)
        elif call.operation.name == "push-messages":
            self._handed.note_announced(device_id, request.message_object_trees)
        else:
            await self._note_fetched(device_id, answer.message(call.operation))

    async def _note_fetched(self, device_id: str, fetched: Any) -> None:
        self._handed.note_given(device_id, fetched.message_object_trees)
        opened = (await self._control.value()).open_round
        if opened and _holds_request(fetched, opened):
            self._served[device_id] = opened

    async def _cached(self, call: Call, device_id: str) -> Answer | None:
        """An object of the device's own request that the SuperLink gave another device already.

        The key is only a claim, but the object's id is not to be guessed: it is the sha256 of what
        the device was told of by the SuperLink.
        """
        if call.operation.name != "pull-object":
            return None
        request: Any = call.message
        if not self._handed.may_touch(device_id, "pull-object", request):
            return None
        body = await self._cache.body(request.object_id)
        return None if body is None else Answer(body=body)

    def _keep(self, call: Call, answer: Answer) -> None:
        request: Any = call.message
        pulled: Any = answer.message(call.operation) if answer.status == 200 else None
        is_whole = pulled is not None and pulled.object_found and pulled.object_available
        self._cache.note(request.object_id, answer.body if is_whole else None)

    def _foreign(self, call: Call, device_id: str) -> Answer | None:
        """A refusal where the call touches an object that is not the device's."""
        if self._now() - self._opened_at < UNKNOWN_S:
            return None
        if self._handed.may_touch(device_id, call.operation.name, call.message):
            return None
        return refusal(403, "this object is no part of this device's messages")

    async def watch_rounds(self) -> None:
        """Let held polls go when a round asks their devices; ends when cancelled."""
        known: OpenRound | None = None
        while True:
            await asyncio.sleep(ROUND_EVERY_S)
            try:
                opened = (await self._control.value()).open_round
            except Fedia3Error as error:
                logger.warning("the directory cannot be read: %s", error)
                continue
            if opened is not None and opened != known:
                self._served.clear()
                self._let_go(opened.cohort)
            known = opened

    def let_everybody_go(self) -> None:
        """Hold no poll from now on, as when the door closes."""
        self._held_s = 0.0
        self._let_go(tuple(self._held))

    def _let_go(self, device_ids: Sequence[str]) -> None:
        for device_id in device_ids:
            if poll := self._held.get(device_id):
                poll.set()

    async def note_seen(self) -> None:
        """Tell the directory, now and then, whose heartbeats came; ends when cancelled."""
        while True:
            await asyncio.sleep(NOTED_EVERY_S)
            try:
                await asyncio.to_thread(self._last_seen.flush)
            except Fedia3Error as error:
                logger.warning("cannot note who was seen: %s", error)

    def _read_devices(self) -> Mapping[bytes, str]:
        return {device.node_key: device.device_id for device in self._directory.enrolled()}

    async def _idle(self, call: Call, device_id: str) -> Answer | None:
        """Hold a poll that would find nothing; answer it when its time is over."""
        if call.operation.name != "pull-messages" or await self._is_asked(device_id):
            return None
        if await self._hold(device_id) and await self._is_asked(device_id):
            return None
        return Answer(body=call.operation.response().SerializeToString())

    async def _is_asked(self, device_id: str) -> bool:
        # not until its deadline: a clock that is set would end a round that goes on
        control: RoundControl = await self._control.value()
        opened = control.open_round
        return (
            opened is not None
            and device_id in opened.cohort
            and self._served.get(device_id) != opened
        )

    async def _hold(self, device_id: str) -> bool:
        """Until a round opens or the time is over; False for a poll that a newer one replaced.

        Whoever waited for the older one is gone: what it fetched would be lost.
        """
        if older := self._held.pop(device_id, None):
            older.set()
        self._held[device_id] = poll = asyncio.Event()
        try:
            await asyncio.wait_for(poll.wait(), self._held_s)
        except TimeoutError:
            pass
        finally:
            is_newest = self._held.get(device_id) is poll
            if is_newest:
                del self._held[device_id]
        return is_newest


def _no_directory(error: Fedia3Error) -> Answer:
    logger.warning("the directory cannot be read: %s", error)
    return refusal(503, "the coordinator's directory cannot be read; come again")


def _fault(call: Call, app_digest: str) -> Answer | None:
    """What is wrong with an enrolled device's call, None if nothing is.

    Raises:
        BadInput: its body is no such message.
    """
    name, message = call.operation.name, call.message
    request: Any = message  # generated classes; the operation says which
    if name == "activate-node" and request.public_key != call.key:
        return refusal(403, "a device activates its own key")
    if name == "push-messages" and not _is_own_reply(request):
        return refusal(403, "a device sends its own replies, one at a time")
    if name == "push-messages" and _objects(request) > MAX_OBJECTS:
        return refusal(413, f"a reply is made of at most {MAX_OBJECTS} objects")
    if name == "get-fab" and request.hash_str != app_digest:
        return refusal(403, "there is one app here, and this is another")
    return None


def _is_own_reply(request: Any) -> bool:
    """The SuperLink checks that ``node`` is the caller's, but not who the message says it is."""
    senders = [message.metadata.src_node_id for message in request.messages_list]
    return senders == [request.node.node_id]


def _objects(request: Any) -> int:
    return sum(len(list(object_ids(tree))) for tree in request.message_object_trees)


def _is_app(answer: Any, app_digest: str) -> bool:
    return bool(answer.fab.hash_str == app_digest)


def _holds_request(answer: Any, opened: OpenRound) -> bool:
    """Whether the answer holds this round's request; one that an earlier round left ends before."""
    return any(
        message.metadata.group_id == str(opened.round_num)
        and (message.metadata.created_at + message.metadata.ttl) * 1000 >= opened.until_ms - 1
        for message in answer.messages_list
    )


class _Remembered:
    """A value that is read again when it is ``every_s`` old, once for all who wait for it."""

    def __init__(self, read: Callable[[], Any], every_s: float, now: Now) -> None:
        self._read = read
        self._every_s = every_s
        self._now = now
        self._lock = asyncio.Lock()
        self._value: Any = None
        self._read_at = float("-inf")

    async def value(self) -> Any:
        if self._now() - self._read_at < self._every_s:
            return self._value
        async with self._lock:
            if self._now() - self._read_at >= self._every_s:
                began = self._now()  # what is written while it is read is not in it
                self._value = await asyncio.to_thread(self._read)
                self._read_at = began
            return self._value


class _Allowance:
    """A token bucket for each key; the longest unused ones are forgotten."""

    def __init__(self, limits: Limits, now: Now) -> None:
        self._limits = limits
        self._now = now
        self._left: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # key: left, when

    def takes(self, key: bytes) -> bool:
        now = self._now()
        left, at = self._left.pop(key, (self._limits.at_once, now))
        left = min(self._limits.at_once, left + (now - at) * self._limits.calls_a_s)
        self._left[key] = (max(left - 1, 0.0) if left >= 1 else left, now)
        if len(self._left) > KEYS_COUNTED:
            self._left.popitem(last=False)
        return left >= 1
