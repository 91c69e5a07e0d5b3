from collections.abc import Sequence

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedia3.adapters.adapter import Adapter, vector_of
from fedia3.adapters.schema import Schema, Target
from fedia3.adapters.update import ClientUpdate, TrainingPlan, TrainRequest
from fedia3.client.flower import client_app
from fedia3.coordinator.flower import FlowerFleet, request_message, server_app
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.rounds import (
    Fleet,
    RoundPlan,
    RoundResult,
    load_state,
    run_round,
    run_rounds,
)
from fedia3.coordinator.state import ServerState
from fedia3.errors import BadSetting
from fedia3.simulations.grid import LocalGrid, run_server_app

SCHEMA = Schema("0" * 64, (Target("layer", "k", 2),))
ONES = Adapter.ones(SCHEMA)


class HalfWay:
    """Goes half the way to each client's target; one that has none fails with its words."""

    def __init__(self, **targets: float) -> None:
        self._targets = targets

    def train(self, request: TrainRequest) -> ClientUpdate:
        if request.client not in self._targets:
            raise RuntimeError("what alice wrote in /home/alice/diary.txt")
        delta = (self._targets[request.client] - request.vector) / 2
        return ClientUpdate(delta.astype(np.float32), 1, {"loss_mean": 0.5})


class Answers:
    """Answers with what it was given for each client."""

    def __init__(self, **updates: ClientUpdate) -> None:
        self._updates = updates

    def train(self, request: TrainRequest) -> ClientUpdate:
        return self._updates[request.client]


def request(client: str) -> TrainRequest:
    """A request of two scales."""
    return TrainRequest(client, 1, 0, ONES.vector, SCHEMA.digest, TrainingPlan())


def run(registry: Registry, grid: LocalGrid, plan: RoundPlan, until_round: int) -> None:
    """Rounds by a Flower ServerApp on ``grid``."""

    def campaign(fleet: Fleet) -> ServerState:
        return run_rounds(registry, fleet, plan, start=ONES, until_round=until_round)

    run_server_app(server_app(campaign), grid)


def test_a_server_app_and_a_client_app_run_rounds_in_one_process():
    """Targets 5 and 13 have the mean 9: half the way to it each round is 1, 5, 7, 8."""
    registry = Registry.in_memory()
    grid = LocalGrid(client_app(HalfWay(a=5, b=13)), ["a", "b"], chunk=2)
    vectors = []
    for until_round in range(4):
        run(registry, grid, RoundPlan(cohort_size=2), until_round)
        state = load_state(registry, SCHEMA)
        vectors.append(state.adapter.vector.tolist() if state else None)
    assert vectors == [[1, 1], [5, 5], [7, 7], [8, 8]]


def test_a_campaign_cut_after_round_2_goes_on_to_the_same_bits():
    """A new grid and a new ServerApp resume behind the last committed round."""
    plan = RoundPlan(cohort_size=2, seed=3)
    people = HalfWay(a=1.1, b=2.3, c=3.7)
    cut, whole = Registry.in_memory(), Registry.in_memory()
    run(cut, LocalGrid(client_app(people), ["a", "b", "c"]), plan, 2)
    run(cut, LocalGrid(client_app(people), ["c", "b", "a"]), plan, 4)
    run(whole, LocalGrid(client_app(people), ["a", "b", "c"]), plan, 4)
    assert cut.server_state() == whole.server_state()


def test_bad_clients_are_rejected_over_flower_while_the_round_goes_on():
    """NaN, wrong length, an exception and a boast go over the real messages; ``good`` decides."""
    zeros = np.zeros(2, np.float32)
    trainer = Answers(
        good=ClientUpdate(zeros + 2, 10),
        nan=ClientUpdate(zeros * np.nan, 10),
        long=ClientUpdate(np.zeros(3, np.float32), 10),
        boast=ClientUpdate(zeros, 10**12),
        none=ClientUpdate(zeros, 0),
    )
    grid = LocalGrid(client_app(trainer), ["good", "nan", "long", "boast", "none", "raises"])
    result = _round_on(grid, RoundPlan(cohort_size=6))
    assert {c.client: (c.verdict, c.reason) for c in result.contributions} == {
        "good": ("accepted", ""),
        "nan": ("rejected", "2 of 2 values are not finite"),
        "long": ("rejected", "expected a float32 vector of 2 values, got float32 of shape (3,)"),
        "boast": ("accepted", "claims 1000000000000 examples, counted as 10000: the limit"),
        "none": ("rejected", "expected a positive whole number of examples, got 0"),
        "raises": ("rejected", "the device reported a failure (code 2): KeyError"),
    }
    assert result.state.adapter.vector.tolist() == pytest.approx([1 + 20 / 10010] * 2)


def _round_on(grid: LocalGrid, plan: RoundPlan) -> RoundResult:
    results = []
    run_server_app(
        server_app(lambda fleet: results.append(run_round(ServerState(0, ONES), fleet, plan))),
        grid,
    )
    return results[0]


def test_a_chunk_is_trained_before_its_replies_are_asked_for():
    """Five clients in chunks of two: the trainer sees 2, 2 and 1 requests, each with its client."""
    seen: list[list[str]] = []

    def before_chunk(requests: Sequence[TrainRequest]) -> None:
        seen.append([r.client for r in requests])

    people = dict.fromkeys("abcde", 3.0)
    app = client_app(HalfWay(**people))
    fleet = FlowerFleet(LocalGrid(app, list(people), chunk=2, before_chunk=before_chunk))
    replies = fleet.ask([request(name) for name in fleet.population()], None)
    assert [next(replies).client, next(replies).client] == ["a", "b"]
    assert seen == [["a", "b"]]
    assert [r.client for r in replies] == ["c", "d", "e"]
    assert seen == [["a", "b"], ["c", "d"], ["e"]]


def test_messages_are_copied_both_ways():
    """A ClientApp that edits what it got, and keeps what it gave, changes nothing elsewhere."""
    kept = []
    app = ClientApp()

    @app.train()
    def edit(message, context):
        message.content["request"]["round"] = 99
        kept.append(Message(message.content, reply_to=message))
        return kept[0]

    grid = LocalGrid(app, ["a"])
    (node_id,) = grid.get_node_ids()
    sent = request_message(request("a"), node_id, None)
    (reply,) = grid.pull_messages(grid.push_messages([sent]))
    kept[0].content["request"]["round"] = 100
    assert sent.content["request"]["round"] == 1
    assert reply.content["request"]["round"] == 99


def test_a_client_app_that_raises_answers_with_an_error_without_text():
    """As Flower answers for it, less the words."""
    app = ClientApp()

    @app.train()
    def fail(message, context):
        raise RuntimeError("secret")

    grid = LocalGrid(app, ["a"])
    (node_id,) = grid.get_node_ids()
    ids = grid.push_messages([request_message(request("a"), node_id, None)])
    (reply,) = grid.pull_messages(ids)
    assert (reply.error.code, reply.error.reason) == (2, "RuntimeError")


def test_a_reply_is_given_once():
    """An id that was answered, or never pushed, gives nothing."""
    grid = LocalGrid(client_app(HalfWay(a=3)), ["a"])
    (node_id,) = grid.get_node_ids()
    ids = list(grid.push_messages([request_message(request("a"), node_id, None)]))
    assert len(list(grid.pull_messages([*ids, "unknown"]))) == 1
    assert list(grid.pull_messages(ids)) == []


def test_a_stock_server_app_runs_on_the_local_grid():
    """``send_and_receive``, which Flower's own strategies use, returns every reply."""
    app, replies = ServerApp(), []

    @app.main()
    def main(grid, context):
        messages = [request_message(request("?"), i, None) for i in grid.get_node_ids()]
        replies.extend(grid.send_and_receive(messages))

    run_server_app(app, LocalGrid(client_app(HalfWay(a=3, b=5)), ["a", "b"]))
    assert [vector_of(r.content["reply"]["delta"]).tolist() for r in replies] == [[1, 1], [2, 2]]


def test_a_chunk_of_nobody_is_refused():
    """A chunk of 0 clients would never end a round."""
    with pytest.raises(BadSetting, match="at least 1 client, got 0"):
        LocalGrid(ClientApp(), [], chunk=0)


def test_each_node_is_told_its_client():
    """The context a ClientApp gets says whom it trains for, and holds nothing of the last round."""
    seen = []
    app = ClientApp()

    @app.train()
    def look(message, context):
        seen.append((context.node_config["client"], len(context.state)))
        context.state["left"] = message.content["request"]
        return Message(RecordDict(), reply_to=message)

    grid = LocalGrid(app, ["a", "b"], chunk=4)
    ids = [*grid.get_node_ids(), *grid.get_node_ids()]
    messages = [request_message(request("?"), i, None) for i in ids]
    list(grid.pull_messages(grid.push_messages(messages)))
    assert seen == [("a", 0), ("b", 0), ("a", 0), ("b", 0)]
