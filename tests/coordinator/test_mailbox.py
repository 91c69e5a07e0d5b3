"""Replies that are there are fetched; who announced one and did not upload it holds nobody."""

from dataclasses import dataclass, field

import httpx
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.message_pb2 import PullObjectResponse as Pulled
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedia3.coordinator.mailbox import Mailbox


def reply(to: str) -> Message:
    """A device's reply to the request of this id."""
    metadata = Metadata(1, "", 5, 1, to, "3", 1000.0, 60.0, MessageType.TRAIN)
    record = ConfigRecord({"delta": np.ones(2, "<f4").tobytes(), "to": to})
    made = make_message(metadata, RecordDict({"reply": record}))
    made.metadata.__dict__["_message_id"] = made.object_id
    return made


@dataclass
class SuperLink:
    """Gives what was announced, once, and of the objects those that were uploaded."""

    announced: list[Message]
    objects: dict[str, bytes] = field(default_factory=dict)
    confirmed: list[str] = field(default_factory=list)
    asked: list[list[str]] = field(default_factory=list)
    is_away: bool = False
    is_over: bool = False  # the uploads' sessions have ended

    def upload(self, *replies: Message) -> None:
        for each in replies:
            nested = get_all_nested_objects(each)
            self.objects |= {name: made.deflate() for name, made in nested.items()}

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802  # Flower's name
        self._require_here()
        self.asked.append(sorted(request.message_ids))
        here = [m for m in self.announced if m.metadata.reply_to_message_id in request.message_ids]
        self.announced = [m for m in self.announced if m not in here]
        return PullAppMessagesResponse(
            messages_list=[message_to_proto(m) for m in here],
            message_object_trees=[get_object_tree(m) for m in here],
        )

    def PullObject(self, request: PullObjectRequest) -> Pulled:  # noqa: N802  # Flower's name
        self._require_here()
        content = self.objects.get(request.object_id)
        if content is None:
            return Pulled(object_found=not self.is_over, object_available=False)
        return Pulled(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request: ConfirmMessageReceivedRequest) -> None:  # noqa: N802  # Flower's name
        self._require_here()
        self.confirmed.append(request.message_object_id)

    def _require_here(self) -> None:
        if self.is_away:
            raise httpx.ConnectError("away")


def mailbox(link: SuperLink) -> Mailbox:
    """Of run 1."""
    return Mailbox(link, Node(node_id=1), 1)  # type: ignore[arg-type]  # stands in for the API


def answered(messages: list[Message]) -> list[str]:
    """Whose requests these answer."""
    return sorted(m.metadata.reply_to_message_id for m in messages)


def test_replies_come_whole_once_and_are_confirmed() -> None:
    """
    What the device put in comes out.
    """
    link = SuperLink([reply("a"), reply("b")])
    link.upload(*link.announced)
    box = mailbox(link)
    messages = box.pull(["a", "b", "c"])
    assert answered(messages) == ["a", "b"]
    assert {m.content["reply"]["to"] for m in messages} == {"a", "b"}
    assert sorted(link.confirmed) == sorted(m.metadata.message_id for m in messages)
    assert box.pull(["c"]) == []


def test_a_reply_that_was_announced_and_not_uploaded_holds_nobody() -> None:
    """
    The others come at once, and it comes when it is there; it is not asked for by name again.
    """
    slow, quick = reply("slow"), reply("quick")
    link = SuperLink([slow, quick])
    link.upload(quick)
    box = mailbox(link)
    assert answered(box.pull(["slow", "quick"])) == ["quick"]
    assert box.pull(["slow"]) == []
    link.upload(slow)
    assert answered(box.pull(["slow"])) == ["slow"]
    assert link.asked == [["quick", "slow"]]


def test_a_reply_whose_upload_was_given_up_comes_as_an_error() -> None:
    """
    Flower forgets its objects after three minutes; the round need not wait for its deadline.
    """
    link = SuperLink([reply("a")])
    box = mailbox(link)
    assert box.pull(["a"]) == []
    link.is_over = True
    (message,) = box.pull(["a", "b"])
    assert message.metadata.reply_to_message_id == "a"
    assert message.error.reason == "ObjectPullError"
    assert box.pull(["b"]) == []
    assert link.asked == [["a"], ["b"], ["b"]]


@pytest.mark.parametrize(
    "root",
    [
        b"",
        b"\xff\x00body",
        b"NoSuchClass  0\x00",
        b"Message  0\x00",  # neither content nor an error
        b"Message  3\x00\xff\xff\xff",
        b"Message " + b"0" * 64 + b" 0\x00",  # its content was not announced
        b"RecordDict  0\x00",
    ],
    ids=["empty", "no text", "unknown", "hollow", "garbled", "a part missing", "no message"],
)
def test_a_reply_that_is_no_message_comes_as_an_error_and_holds_nobody(root: bytes) -> None:
    """
    The device is answered for; the others' replies come.
    """
    bad, good = reply("bad"), reply("good")
    link = SuperLink([bad, good])
    link.upload(bad, good)
    link.objects[bad.metadata.message_id] = root
    messages = {m.metadata.reply_to_message_id: m for m in mailbox(link).pull(["bad", "good"])}
    assert messages["bad"].has_error()
    assert messages["good"].content["reply"]["to"] == "good"


def test_a_reply_is_to_the_request_it_was_announced_for() -> None:
    """
    Whatever its own text says: only what was announced has been checked against the sender's key.
    """
    theirs, mine = reply("theirs"), reply("mine")
    link = SuperLink([mine])
    link.upload(mine, theirs)
    link.objects[mine.metadata.message_id] = link.objects[theirs.metadata.message_id]
    assert answered(mailbox(link).pull(["mine", "theirs"])) == ["mine"]


def test_a_superlink_that_is_away_loses_no_reply() -> None:
    """
    What was announced before is fetched afterwards.
    """
    link = SuperLink([reply("a")])
    box = mailbox(link)
    assert box.pull(["a"]) == []
    link.upload(reply("a"))
    link.is_away = True
    with pytest.raises(httpx.HTTPError):
        box.pull(["a"])
    link.is_away = False
    assert answered(box.pull(["a"])) == ["a"]
