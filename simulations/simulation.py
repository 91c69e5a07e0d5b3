"""The whole loop on one machine: text → rounds on Flower → personal adapters → report.

The ServerApp and ClientApp are those of a deployment, joined by an in-process Grid; the clients
share one base model and each chunk of a cohort trains in one pass of the bank.
"""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch

from fedia3.adapters.adapter import Adapter, Vector
from fedia3.adapters.base_model import BaseModel, fastest_dtype, load
from fedia3.adapters.base_store import BaseStore
from fedia3.client.data import Dataset
from fedia3.client.examples import digest_of
from fedia3.client.flower import client_app
from fedia3.client.personalization import Personalized, personalize
from fedia3.client.tasks import task_for
from fedia3.client.trainer import Evaluation, ResidentTrainer, evaluate_rows, seed_of
from fedia3.coordinator.flower import server_app
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.rounds import Nobody, Observer, RoundPlan, run_rounds
from fedia3.simulations import report
from fedia3.simulations.grid import LocalGrid, run_server_app
from fedia3.simulations.population import People, prepare, read_people
from fedia3.simulations.report import HEALTHY, Report, RunFacts, UserResult
from fedia3.simulations.settings import RunFolder, Settings

T = TypeVar("T")
ROWS = 32  # clients trained or judged in one pass; bounds memory whatever the cohort


class Watcher(Observer, Protocol):
    """Who watches a simulation: the rounds, and what comes before and after them."""

    def run_started(self, folder: Path) -> None:
        """Base and text are sound; from here on the run can be resumed."""

    def seed_started(self, seed: int, people: People, base: BaseModel) -> None:
        """A federation is about to be trained."""

    def worked(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` users are through a step behind the rounds."""


class Unwatched(Nobody):
    """Watches nothing."""

    def run_started(self, folder: Path) -> None:
        """Not watched."""

    def seed_started(self, seed: int, people: People, base: BaseModel) -> None:
        """Not watched."""

    def worked(self, what: str, done: int, total: int) -> None:
        """Not watched."""


def simulate(settings: Settings, folder: RunFolder, watcher: Watcher | None = None) -> Report:
    """Train, personalize and report; a run that was interrupted continues at its last round.

    Everything follows from the settings, the data and the base, so the result of a resumed run
    has the same bytes as that of an uninterrupted one; number format and threads are held to.

    Raises:
        BadData: the data cannot be read, or holds fewer than two users with enough text.
        NotFound: no such base model.
        BadSetting: data, base, settings or compute are not those the run was started with.
    """
    started, watching = time.monotonic(), watcher or Unwatched()
    base = load(BaseStore().find(settings.base), dtype=fastest_dtype())
    dataset = read_people(settings, base)
    federations = [
        _Federation(settings, folder, base, dataset, seed, watching) for seed in settings.seeds
    ]
    compute = f"{base.model.dtype} on {torch.get_num_threads()} threads"
    folder.begin(settings, base=base.digest, data=digest_of(dataset), compute=compute)
    watching.run_started(folder.path)
    users = [result for federation in federations for result in federation.run()]
    facts = _facts(settings, base, dataset, federations, time.monotonic() - started)
    finished = Report(facts, tuple(users))
    report.write(finished, folder.path)
    return finished


class _Federation:
    """One seed: its population, its registry, its trainer."""

    def __init__(
        self,
        settings: Settings,
        folder: RunFolder,
        base: BaseModel,
        dataset: Dataset,
        seed: int,
        watcher: Watcher,
    ) -> None:
        self.settings, self.base, self.seed, self.watcher = settings, base, seed, watcher
        self.folder = folder.registry(seed)
        self.people = prepare(dataset, settings, seed, base)
        self.bytes_down = self.bytes_up = self.rejected = 0
        self.grad_norms: list[float] = []

    def run(self) -> list[UserResult]:
        self.watcher.seed_started(self.seed, self.people, self.base)
        self.trainer = ResidentTrainer(
            self.base.model,
            self.base.schema,
            task_for(self.base.model, self.base.pad_id),
            self.people.clients,
        )
        try:
            with Registry.open(self.folder) as registry:
                self._rounds(registry)
                return self._results(registry)
        finally:
            self.trainer.bank.detach()

    def _rounds(self, registry: Registry) -> None:
        plan = RoundPlan(
            cohort_size=min(self.settings.cohort, len(self.people.clients)),
            seed=self.seed,
            training=self.settings.training,
        )
        app = server_app(
            lambda fleet: run_rounds(
                registry,
                fleet,
                plan,
                start=Adapter.ones(self.base.schema),
                until_round=self.settings.rounds,
                observer=self.watcher,
            )
        )
        grid = LocalGrid(
            client_app(self.trainer),
            tuple(self.people.clients),
            chunk=ROWS,
            before_chunk=self.trainer.prepare,
        )
        run_server_app(app, grid)
        self._count(registry)

    def _count(self, registry: Registry) -> None:
        """What the committed rounds cost and what the gate refused, whichever process ran them."""
        for record in registry.rounds():
            self.rejected += int(record.metrics.get("rejected", 0))
            self.bytes_down = int(record.metrics.get("bytes_down_per_client", 0))
            self.bytes_up = int(record.metrics.get("bytes_up_per_client", 0))
            self.grad_norms += [
                c.metrics["grad_norm"] for c in record.contributions if "grad_norm" in c.metrics
            ]

    def _results(self, registry: Registry) -> list[UserResult]:
        """Personalize, publish and judge everybody.

        A resumed run does this over: it is the same work with the same result, and publishing the
        same bytes again changes nothing.
        """
        record, global_adapter = registry.global_adapter(self.base.schema)
        personal = self._personalize(registry, global_adapter, record.digest)
        users = list(self.people.clients)
        own = [personal[u].personal.on(global_adapter).vector for u in users]
        judged = {
            "base": self._judge("base", [Adapter.ones(self.base.schema).vector] * len(users)),
            "global": self._judge("global", [global_adapter.vector] * len(users)),
            "personal": self._judge("personal", own),
            "wrong": self._judge("another user's", [own[n] for n in partners(len(own), self.seed)]),
        }
        seen = self.base.pretraining_users
        return [
            self._result(u, personal[u], {k: v[n] for k, v in judged.items()}, u in seen)
            for n, u in enumerate(users)
        ]

    def _personalize(
        self, registry: Registry, global_adapter: Adapter, global_digest: str
    ) -> Mapping[str, Personalized]:
        users = list(self.people.clients)
        done: dict[str, Personalized] = {}
        for chunk in _chunks(users):
            done |= personalize(
                self.trainer,
                chunk,
                global_adapter,
                global_digest,
                self.settings.personal,
                self.seed,
            )
            for user in chunk:
                self._publish(registry, user, done[user])
            self.watcher.worked("personalizing", len(done), len(users))
        return done

    def _publish(self, registry: Registry, user: str, result: Personalized) -> None:
        """The personal part where the gate serves it; all simulated users share theirs."""
        if result.choice == "personal":
            registry.publish_personal(
                user,
                result.personal,
                num_examples=result.num_examples,
                metrics={
                    "validation_global": result.global_loss,
                    "validation_personal": result.personal_loss,
                },
                idem_key=f"personal-on-{result.personal.global_digest}",
            )

    def _judge(self, what: str, vectors: Sequence[Vector]) -> list[Evaluation]:
        examples = [c.test for c in self.people.clients.values()]
        results: list[Evaluation] = []
        for chunk in _chunks(list(zip(vectors, examples, strict=True))):
            results += evaluate_rows(
                self.base.model,
                self.trainer.bank,
                self.trainer.task,
                [vector for vector, _ in chunk],
                [theirs for _, theirs in chunk],
            )
            self.watcher.worked(f"testing {what}", len(results), len(vectors))
        return results

    def _result(
        self, user: str, personal: Personalized, judged: Mapping[str, Evaluation], seen: bool
    ) -> UserResult:
        exact = {k: v.exact if self.people.labelled else None for k, v in judged.items()}
        return UserResult(
            user=user,
            seed=self.seed,
            train_examples=personal.num_examples,
            test_examples=judged["base"].examples,
            test_tokens=judged["base"].tokens,
            base=judged["base"].loss,
            global_=judged["global"].loss,
            personal=judged["personal"].loss,
            wrong_user=judged["wrong"].loss,
            choice=personal.choice,
            seen_in_pretraining=seen,
            exact_base=exact["base"],
            exact_global=exact["global"],
            exact_personal=exact["personal"],
            majority=self.people.majority[user],
        )


def partners(count: int, seed: int) -> list[int]:
    """For each of ``count`` users another one, drawn by ``seed``: the control's adapters."""
    circle = np.random.default_rng(seed_of(seed, "control")).permutation(count)
    following = dict(zip(circle.tolist(), np.roll(circle, -1).tolist(), strict=True))
    return [following[n] for n in range(count)]


def _chunks(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + ROWS] for start in range(0, len(items), ROWS)]


def _facts(
    settings: Settings,
    base: BaseModel,
    dataset: Dataset,
    federations: Sequence[_Federation],
    seconds: float,
) -> RunFacts:
    first = federations[0]
    norms = [norm for federation in federations for norm in federation.grad_norms]
    return RunFacts(
        data="embedded demo users (synthetic)"
        if settings.data is None
        else Path(settings.data).name,
        base=base.manifest.name,
        base_digest=base.digest,
        users=len(first.people.clients),
        too_small=dict(first.people.too_small),
        rounds=settings.rounds,
        cohort=min(settings.cohort, len(first.people.clients)),
        seeds=settings.seeds,
        adapter_params=base.schema.n_params,
        bytes_down=first.bytes_down,
        bytes_up=first.bytes_up,
        rejected=sum(federation.rejected for federation in federations),
        grad_norm=(min(norms, default=0.0), max(norms, default=0.0)),
        unhealthy=sum(not HEALTHY[0] <= norm <= HEALTHY[1] for norm in norms),
        client_rounds=len(norms),
        peak_memory=_peak_memory(),
        seconds=seconds,
        skipped_lines=len(dataset.skipped),
        left_out=first.people.left_out,
    )


def _peak_memory() -> int:
    """Peak resident bytes of this process (Linux counts in kB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
