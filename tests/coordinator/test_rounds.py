from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.schema import Schema, Target
from fedia3.adapters.update import TrainRequest
from fedia3.coordinator.gate import GateLimits, Reply
from fedia3.coordinator.records import Contribution
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.rounds import RoundPlan, RoundResult, load_state, run_round, run_rounds
from fedia3.coordinator.state import ServerState
from fedia3.errors import BadSetting, QuorumNotMet, WrongBaseModel

SCHEMA = Schema("0" * 64, (Target("layer", "k", 1),))
ONES = Adapter.ones(SCHEMA)
START = ServerState(0, ONES)

Behaviour = Callable[[TrainRequest], Sequence[Reply]]


class ToyFleet:
    """Clients by name; each answers a request with any number of replies."""

    def __init__(self, **clients: Behaviour) -> None:
        self._clients = clients
        self.asked: list[int] = []  # rounds

    def population(self) -> Sequence[str]:
        return tuple(self._clients)

    def ask(self, requests: Sequence[TrainRequest], deadline_s: float | None) -> Iterator[Reply]:
        for request in requests:
            self.asked.append(request.round_num)
            yield from self._clients[request.client](request)


def pulls_to(target: float, *, examples: int = 1, **metrics: float) -> Behaviour:
    """Goes half the way to ``target`` in every round."""

    def train(request: TrainRequest) -> Sequence[Reply]:
        delta = ((target - request.vector) / 2).astype(np.float32)
        return [_reply(request, delta=delta, num_examples=examples, metrics=metrics)]

    return train


def _reply(request: TrainRequest, **fields: object) -> Reply:
    sound = {
        "round_num": request.round_num,
        "schema_digest": request.schema_digest,
        "delta": np.zeros(1, np.float32),
        "num_examples": 1,
    }
    return Reply(request.client, **(sound | fields))  # type: ignore[arg-type]  # any field at all


def says(**fields: object) -> Behaviour:
    """Answers with a sound reply in which ``fields`` are replaced."""
    return lambda request: [_reply(request, **fields)]


def silent(request: TrainRequest) -> Sequence[Reply]:
    """Never answers."""
    return []


class Diary:
    """Writes down what it watches."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def round_started(self, round_num: int, cohort: Sequence[str]) -> None:
        self.lines.append(f"{round_num} asks {len(cohort)}")

    def reply_judged(self, round_num: int, contribution: Contribution) -> None:
        self.lines.append(f"{round_num} {contribution.client} {contribution.verdict}")

    def round_committed(self, result: RoundResult) -> None:
        self.lines.append(f"{result.state.round_num} committed")


def verdicts(result: RoundResult) -> dict[str, tuple[str, str]]:
    """Verdict and reason by client."""
    return {c.client: (c.verdict, c.reason) for c in result.contributions}


def test_the_next_state_is_the_weighted_mean_of_the_cohorts_updates():
    """From 1, deltas of 1 (one example) and 3 (three) have the mean 2.5."""
    fleet = ToyFleet(a=pulls_to(3, examples=1), b=pulls_to(7, examples=3))
    result = run_round(START, fleet, RoundPlan(cohort_size=2))
    assert result.state.round_num == 1
    assert result.state.adapter.vector.tolist() == [3.5]


def test_a_bad_client_costs_itself_its_contribution_and_nobody_else_anything():
    """Seven clients go wrong in seven ways; the eighth moves the adapter as if it were alone."""
    fleet = ToyFleet(
        good=pulls_to(3),
        nan=says(delta=np.array([np.nan], np.float32)),
        long=says(delta=np.zeros(2, np.float32)),
        late=says(round_num=0),
        huge=says(delta=np.array([1e6], np.float32)),
        other=says(schema_digest="f" * 64),
        broken=says(failure="the device reported a failure"),
        absent=silent,
    )
    result = run_round(START, fleet, RoundPlan(cohort_size=8))
    assert result.state.adapter.vector.tolist() == [2.0]
    assert verdicts(result) == {
        "good": ("accepted", ""),
        "nan": ("rejected", "1 of 1 values are not finite"),
        "long": ("rejected", "expected a float32 vector of 1 values, got float32 of shape (2,)"),
        "late": ("rejected", "expected an update for round 1, got one for 0"),
        "huge": ("rejected", "the delta's norm 1e+06 is above the limit 100"),
        "other": ("rejected", f"expected schema {SCHEMA.digest[:12]}, got '{'f' * 40}'"),
        "broken": ("rejected", "the device reported a failure"),
        "absent": ("missing", "no reply before the deadline"),
    }


def test_a_claim_of_many_examples_is_capped():
    """A client that claims 10**12 examples weighs no more than the limit: as much as the other."""
    fleet = ToyFleet(liar=pulls_to(3, examples=10**12), honest=pulls_to(7, examples=10))
    plan = RoundPlan(cohort_size=2, limits=GateLimits(max_examples=10))
    result = run_round(START, fleet, plan)
    assert result.state.adapter.vector.tolist() == [3.0]
    assert verdicts(result)["liar"] == (
        "accepted",
        "claims 1000000000000 examples, counted as 10: the limit",
    )


def test_only_the_first_answer_counts():
    """A client that answers twice is folded in once, and its contribution stays accepted."""
    fleet = ToyFleet(twice=lambda r: [*pulls_to(3)(r), *pulls_to(9)(r)])
    diary = Diary()
    result = run_round(START, fleet, RoundPlan(cohort_size=1), diary)
    assert result.state.adapter.vector.tolist() == [2.0]
    assert verdicts(result) == {"twice": ("accepted", "")}
    assert diary.lines == ["1 asks 1", "1 twice accepted", "1 twice rejected"]


def test_a_stranger_is_no_part_of_the_round():
    """A reply under a name that was not asked is shown and left out."""
    stranger = Reply("eve", 1, SCHEMA.digest, np.ones(1, np.float32), 1)
    fleet = ToyFleet(a=lambda r: [stranger, *pulls_to(3)(r)])
    result = run_round(START, fleet, RoundPlan(cohort_size=1))
    assert result.state.adapter.vector.tolist() == [2.0]
    assert list(verdicts(result)) == ["a"]


def test_a_round_counts_bytes_examples_and_mean_losses():
    """Of three clients two train (weights 1 and 3), one is silent; one scale is four bytes."""
    fleet = ToyFleet(
        a=pulls_to(3, examples=1, loss_first=4.0, loss_mean=2.0),
        b=pulls_to(3, examples=3, loss_first=8.0, own=1.0),
        c=silent,
    )
    assert run_round(START, fleet, RoundPlan(cohort_size=3)).metrics == {
        "clients": 3,
        "accepted": 2,
        "rejected": 0,
        "missing": 1,
        "num_examples": 4,
        "bytes_down": 12,
        "bytes_down_per_client": 4,
        "bytes_up": 8,
        "bytes_up_per_client": 4.0,
        "loss_first": 7.0,
        "loss_mean": 2.0,
    }


def test_an_absurd_loss_cannot_keep_a_round_from_being_stored():
    """Two claims whose sum overflows leave the mean out instead of an infinity."""
    fleet = ToyFleet(a=pulls_to(3, loss_mean=1.7e308), b=pulls_to(3, loss_mean=1.7e308))
    assert "loss_mean" not in run_round(START, fleet, RoundPlan(cohort_size=2)).metrics


def test_a_round_without_a_quorum_is_not_committed():
    """Two of three usable are asked for, one is: rounds before stay, this one leaves no trace."""
    registry = Registry.in_memory()
    turns_bad = ToyFleet(
        a=pulls_to(3),
        b=lambda r: pulls_to(3)(r) if r.round_num < 2 else says(num_examples=0)(r),
        c=silent,
    )
    plan = RoundPlan(cohort_size=3, quorum=2)
    with pytest.raises(QuorumNotMet, match="expected 2 usable updates, got 1 of 3 clients asked"):
        run_rounds(registry, turns_bad, plan, start=ONES, until_round=5)
    state = load_state(registry, SCHEMA)
    assert state == ServerState(1, Adapter(SCHEMA, np.array([2], np.float32)))


def test_too_few_clients_are_not_even_asked():
    """With two clients and a quorum of three nobody trains in vain."""
    fleet = ToyFleet(a=pulls_to(3), b=pulls_to(3))
    with pytest.raises(QuorumNotMet, match="needs 3 usable updates, but only 2 clients"):
        run_round(START, fleet, RoundPlan(cohort_size=3, quorum=3))
    assert fleet.asked == []


def test_three_rounds_are_committed_one_by_one():
    """Half the way to 9 in each round: 1, 5, 7, 8."""
    registry = Registry.in_memory()
    diary = Diary()
    fleet = ToyFleet(a=pulls_to(9))
    plan = RoundPlan(cohort_size=1)
    state = run_rounds(registry, fleet, plan, start=ONES, until_round=3, observer=diary)
    assert state.adapter.vector.tolist() == [8.0]
    assert load_state(registry, SCHEMA) == state
    assert [r.round_num for r in registry.rounds()] == [0, 1, 2, 3]
    assert diary.lines[:3] == ["1 asks 1", "1 a accepted", "1 committed"]
    assert diary.lines[3:] == [
        line.replace("1 ", f"{n} ", 1) for n in (2, 3) for line in diary.lines[:3]
    ]


def test_a_registry_begins_with_the_start_adapter_as_round_0():
    """No round to run still leaves a global adapter: the one given."""
    registry = Registry.in_memory()
    start = Adapter(SCHEMA, np.array([2], np.float32))
    run_rounds(registry, ToyFleet(), RoundPlan(cohort_size=1), start=start, until_round=0)
    assert load_state(registry, SCHEMA) == ServerState(0, start)


def test_an_interrupted_campaign_resumes_bit_identical():
    """Two rounds, then a crash in the third, then a new start: the same bits as without a crash."""
    plan = RoundPlan(cohort_size=2, seed=5)
    people = {f"u{i}": pulls_to(i / 3, examples=i) for i in range(1, 6)}

    def crash(request: TrainRequest) -> Sequence[Reply]:
        if request.round_num == 3:
            raise KeyboardInterrupt
        return people[request.client](request)

    interrupted, uninterrupted = Registry.in_memory(), Registry.in_memory()
    with pytest.raises(KeyboardInterrupt):
        run_rounds(
            interrupted, ToyFleet(**dict.fromkeys(people, crash)), plan, start=ONES, until_round=4
        )
    fleet = ToyFleet(**people)
    resumed = run_rounds(interrupted, fleet, plan, start=ONES, until_round=4)
    assert set(fleet.asked) == {3, 4}
    assert resumed == run_rounds(uninterrupted, ToyFleet(**people), plan, start=ONES, until_round=4)
    assert interrupted.server_state() == uninterrupted.server_state()


def test_a_registry_of_another_base_model_is_refused():
    """Rounds do not go on with an adapter of a base model they were not trained on."""
    registry = Registry.in_memory()
    plan = RoundPlan(cohort_size=1)
    run_rounds(registry, ToyFleet(), plan, start=ONES, until_round=0)
    other = Adapter.ones(Schema("1" * 64, SCHEMA.targets))
    with pytest.raises(WrongBaseModel):
        run_rounds(registry, ToyFleet(), plan, start=other, until_round=0)


@pytest.mark.parametrize(
    "settings",
    [{"cohort_size": 0}, {"cohort_size": 2, "quorum": 3}, {"cohort_size": 2, "quorum": 0},
     {"cohort_size": 1, "deadline_s": 0.0}],
)  # fmt: skip
def test_a_plan_that_cannot_work_is_refused(settings):
    """A quorum outside the cohort or a deadline of no time is a mistake in the settings."""
    with pytest.raises(BadSetting):
        RoundPlan(**settings)
