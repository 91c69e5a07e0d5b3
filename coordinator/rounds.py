"""The round: ask a cohort, let each reply through the gate, fold, commit, go on.

Nothing here knows how devices are reached: a ``Fleet`` does. Everything a round decides follows
from the last committed server state, the plan and the replies, so a crash anywhere resumes at the
last committed round and comes out the same.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.schema import Schema
from fedia3.adapters.update import TrainingPlan, TrainRequest
from fedia3.coordinator.cohort import round_seed, select
from fedia3.coordinator.gate import Admitted, GateLimits, Rejected, Reply, admit
from fedia3.coordinator.records import Contribution
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.state import ServerState, decode_state, encode_state
from fedia3.coordinator.strategy import FedAvg
from fedia3.errors import BadSetting, QuorumNotMet

# of what clients report, the round keeps these means
MEAN_METRICS = ("loss_first", "loss_mean", "grad_norm")


class Fleet(Protocol):
    """The devices that can be reached."""

    def population(self) -> Sequence[str]:
        """The clients that can be asked now."""
        ...

    def ask(self, requests: Sequence[TrainRequest], deadline_s: float | None) -> Iterator[Reply]:
        """Send the requests; yield the replies as they arrive, in any order, until the deadline.

        Who does not answer yields nothing. None waits for as long as the transport lets it.
        """
        ...


@dataclass(frozen=True)
class RoundPlan:
    """How rounds are run; the same for every round of a campaign."""

    cohort_size: int  # clients asked in a round
    quorum: int = 1  # usable updates without which a round is not committed
    deadline_s: float | None = None  # for a round's replies
    seed: int = 0  # draws the cohorts and seeds the clients' training
    training: TrainingPlan = field(default_factory=TrainingPlan)
    limits: GateLimits = field(default_factory=GateLimits)

    def __post_init__(self) -> None:
        if not 1 <= self.quorum <= self.cohort_size:
            raise BadSetting(
                f"the quorum lies between 1 and the cohort's size {self.cohort_size}, "
                f"got {self.quorum}"
            )
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise BadSetting(f"deadline_s is above 0 where set, got {self.deadline_s}")


@dataclass(frozen=True)
class RoundResult:
    """A finished round that is not committed yet.

    ``metrics``: clients asked, accepted, rejected and missing; ``num_examples`` of the accepted;
    ``bytes_down`` and ``bytes_up`` of all clients together and ``…_per_client`` for each one asked
    and each one that answered, 4 bytes a scale; the mean of MEAN_METRICS over the accepted clients
    that report them, weighted by examples.
    """

    state: ServerState
    contributions: tuple[Contribution, ...]  # one for each client asked
    metrics: Mapping[str, float]


class Observer(Protocol):
    """Somebody who watches the rounds, a progress display for one."""

    def round_started(self, round_num: int, cohort: Sequence[str]) -> None:
        """The cohort is about to be asked."""

    def reply_judged(self, round_num: int, contribution: Contribution) -> None:
        """A client's reply came in, or the deadline passed without one."""

    def round_committed(self, result: RoundResult) -> None:
        """The round is stored; a crash from here on resumes behind it."""


class Nobody:
    """Watches nothing."""

    def round_started(self, round_num: int, cohort: Sequence[str]) -> None:
        """Not watched."""

    def reply_judged(self, round_num: int, contribution: Contribution) -> None:
        """Not watched."""

    def round_committed(self, result: RoundResult) -> None:
        """Not watched."""


def run_rounds(
    registry: Registry,
    fleet: Fleet,
    plan: RoundPlan,
    *,
    start: Adapter,
    until_round: int,
    observer: Observer | None = None,
) -> ServerState:
    """Run and commit rounds until ``until_round`` is committed; the state after it.

    A registry without rounds begins with round 0, ``start`` itself, so that a global adapter
    always exists. One with rounds goes on behind the last, and ``start`` only says which schema
    they have.

    Raises:
        QuorumNotMet: a round had too few usable replies; the rounds before it stay committed.
        WrongBaseModel: the registry's rounds train another base model than ``start``'s.
        Corrupt: the registry's server state cannot be read.
        Conflict: another coordinator runs rounds on the same registry.
    """
    watching = observer or Nobody()
    state = load_state(registry, start.schema) or begin(registry, start)
    while state.round_num < until_round:
        result = run_round(state, fleet, plan, watching)
        commit(registry, result)
        watching.round_committed(result)
        state = result.state
    return state


def load_state(registry: Registry, schema: Schema) -> ServerState | None:
    """The last committed state, None before the first."""
    data = registry.server_state()
    return None if data is None else decode_state(data, schema)


def begin(registry: Registry, start: Adapter) -> ServerState:
    """Commit round 0: the global adapter that training starts from."""
    state = ServerState(round_num=0, adapter=start)
    commit(registry, RoundResult(state, contributions=(), metrics={}))
    return state


def commit(registry: Registry, result: RoundResult) -> None:
    """Store state, global adapter and contributions in one transaction."""
    registry.commit_round(
        result.state.round_num,
        encode_state(result.state),
        result.state.adapter,
        contributions=result.contributions,
        metrics=result.metrics,
    )


def run_round(
    state: ServerState, fleet: Fleet, plan: RoundPlan, observer: Observer | None = None
) -> RoundResult:
    """One round: whatever a single client sends, the others' updates make the next state.

    Raises:
        QuorumNotMet: fewer usable updates than ``plan.quorum``, or fewer clients to ask.
    """
    watching = observer or Nobody()
    requests = requests_for(state, fleet.population(), plan)
    _require_enough_clients(requests, state, plan)
    watching.round_started(state.round_num + 1, tuple(requests))
    judging = Judging(state, requests, plan.limits)
    for reply in fleet.ask(tuple(requests.values()), plan.deadline_s):
        watching.reply_judged(state.round_num + 1, judging.take(reply))
    for contribution in judging.close():
        watching.reply_judged(state.round_num + 1, contribution)
    _require_quorum(judging, plan)
    return judging.result()


def requests_for(
    state: ServerState, population: Sequence[str], plan: RoundPlan
) -> dict[str, TrainRequest]:
    """What the cohort of the round after ``state`` is asked, by client."""
    round_num = state.round_num + 1
    return {
        client: TrainRequest(
            client=client,
            round_num=round_num,
            round_seed=round_seed(round_num, plan.seed),
            vector=state.adapter.vector,
            schema_digest=state.adapter.schema.digest,
            plan=plan.training,
        )
        for client in select(population, round_num, plan.seed, plan.cohort_size)
    }


class Judging:
    """A round's books while replies come in: the running sum and what became of each client."""

    def __init__(
        self, state: ServerState, requests: Mapping[str, TrainRequest], limits: GateLimits
    ) -> None:
        self._state = state
        self._requests = requests
        self._limits = limits
        self._fold = FedAvg(state.adapter.schema)
        self._contributions: dict[str, Contribution] = {}
        self._bytes_up: list[int] = []

    @property
    def contributions(self) -> tuple[Contribution, ...]:
        """What became of each client so far."""
        return tuple(self._contributions.values())

    def take(self, reply: Reply) -> Contribution:
        """Judge one reply and fold it in if it is sound.

        An answer nobody asked for is judged as well, but is no part of the round.
        """
        request = self._requests.get(reply.client)
        answered = reply.client in self._contributions
        verdict = admit(reply, request, self._state.adapter.schema, self._limits, answered=answered)
        contribution = _contribution(reply.client, verdict)
        if request and not answered:
            self._contributions[reply.client] = contribution
            self._bytes_up.append(reply.delta.nbytes if isinstance(reply.delta, np.ndarray) else 0)
        if isinstance(verdict, Admitted):
            self._fold.add(verdict.update)
        return contribution

    def close(self) -> list[Contribution]:
        """Note who has not answered; later replies are too late."""
        absent = [c for c in self._requests if c not in self._contributions]
        late = [Contribution(c, "missing", "no reply before the deadline") for c in absent]
        self._contributions.update((c.client, c) for c in late)
        return late

    def result(self) -> RoundResult:
        """The next state and the round's record.

        Raises:
            QuorumNotMet: there is no update to average.
        """
        return RoundResult(self._fold.apply(self._state), self.contributions, self._metrics())

    def _metrics(self) -> dict[str, float]:
        verdicts = [c.verdict for c in self.contributions]
        down = self._state.adapter.vector.nbytes
        up = sum(self._bytes_up)
        return {
            "clients": len(verdicts),
            "accepted": verdicts.count("accepted"),
            "rejected": verdicts.count("rejected"),
            "missing": verdicts.count("missing"),
            "num_examples": self._fold.num_examples,
            "bytes_down": down * len(verdicts),
            "bytes_down_per_client": down,
            "bytes_up": up,
            "bytes_up_per_client": up / len(self._bytes_up),
            **_means(c for c in self.contributions if c.verdict == "accepted"),
        }


def _contribution(client: str, verdict: Admitted | Rejected) -> Contribution:
    if isinstance(verdict, Rejected):
        return Contribution(client, "rejected", verdict.reason)
    update = verdict.update
    return Contribution(
        client, "accepted", verdict.note, update.num_examples, verdict.norm, update.metrics
    )


def _means(accepted: Iterable[Contribution]) -> dict[str, float]:
    """MEAN_METRICS over the clients, weighted by examples.

    The names are ours and a mean that overflows is left out: what one client claims must not
    make the round impossible to store.
    """
    contributions = list(accepted)
    means = {name: _mean(name, contributions) for name in MEAN_METRICS}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def _mean(name: str, contributions: Sequence[Contribution]) -> float:
    told = [(c.num_examples, c.metrics[name]) for c in contributions if name in c.metrics]
    weight = sum(examples for examples, _ in told)
    return sum(examples * value for examples, value in told) / weight if weight else math.nan


def _require_enough_clients(
    requests: Mapping[str, TrainRequest], state: ServerState, plan: RoundPlan
) -> None:
    if len(requests) < plan.quorum:
        raise QuorumNotMet(
            f"round {state.round_num + 1} needs {plan.quorum} usable updates, but only "
            f"{len(requests)} clients can be asked; wait for more or lower the quorum"
        )


def _require_quorum(judging: Judging, plan: RoundPlan) -> None:
    accepted = sum(c.verdict == "accepted" for c in judging.contributions)
    if accepted < plan.quorum:
        others = [c for c in judging.contributions if c.verdict != "accepted"]
        first = f"; {others[0].client!r}: {others[0].reason}" if others else ""
        raise QuorumNotMet(
            f"expected {plan.quorum} usable updates, got {accepted} of "
            f"{len(judging.contributions)} clients asked; the round is not committed{first}"
        )
