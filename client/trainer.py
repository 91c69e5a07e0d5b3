"""Train IA3 rows: one for a device's owner, many for a simulated cohort.

The model is frozen and shared; each client is a row of the bank with its own batches, its own
AdamW (Loshchilov and Hutter, 2019, algorithm 2), its own clipping and its own end, so a cohort
trained in one pass equals its clients trained one by one.
"""

import ctypes
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fedia3.adapters.adapter import Vector
from fedia3.adapters.bank import IA3Bank
from fedia3.adapters.schema import Schema
from fedia3.adapters.update import ClientUpdate, TrainingPlan, TrainRequest
from fedia3.client.tasks import Task
from fedia3.errors import BadData, BadInput, NoGradient, NotFound, WrongBaseModel

Item = TypeVar("Item")
TOKENS_AT_ONCE = 1024  # padded tokens of one forward/backward: what stays in cache trains fastest


@dataclass(frozen=True)
class Job(Generic[Item]):
    """One client's training: where it starts and what it learns from."""

    start: Vector  # (n_params,)
    train: Sequence[Item]
    validation: Sequence[Item]
    seed: int  # orders its batches


@dataclass(frozen=True, eq=False)
class Trained:
    """One client after training."""

    vector: Vector  # (n_params,)
    steps: int
    first_loss: float  # nats per learned token of the first batch, before any step
    mean_loss: float  # over all batches, each before its step
    grad_norm: float  # mean L2 norm before clipping
    diverged: bool  # a gradient was not finite: stopped at the last sound vector


@dataclass(frozen=True)
class Evaluation:
    """How well one adapter predicts one client's examples."""

    loss: float  # nats per learned token
    exact: float  # share of examples whose every learned token is the model's first choice
    tokens: int  # learned tokens
    examples: int


class RowAdam:
    """AdamW on the rows of ``scales[rows, n_params]``, each with its own count of steps.

    Weight decay pulls towards one, the scale that changes nothing. A row that is not stepped keeps
    its vector and moments.
    """

    BETAS = (0.9, 0.999)
    EPSILON = 1e-8

    def __init__(self, scales: Tensor) -> None:
        self.mean = torch.zeros_like(scales)
        self.square = torch.zeros_like(scales)
        self.steps = torch.zeros(scales.shape[0], 1, dtype=torch.float64)

    def step(
        self, scales: Tensor, gradient: Tensor, rows: Tensor, rates: Tensor, decay: float
    ) -> None:
        """Move ``rows`` of ``scales`` in place; ``rates`` ``(len(rows),)`` learning rates."""
        beta1, beta2 = self.BETAS
        grad, rate = gradient[rows], rates[:, None]
        self.steps[rows] += 1
        self.mean[rows] = self.mean[rows].lerp(grad, 1 - beta1)
        self.square[rows] = beta2 * self.square[rows] + (1 - beta2) * grad.square()
        mean_bias = (1 - beta1 ** self.steps[rows]).to(scales)
        square_bias = (1 - beta2 ** self.steps[rows]).sqrt().to(scales)
        denominator = self.square[rows].sqrt() / square_bias + self.EPSILON
        moved = scales[rows] - rate * decay * (scales[rows] - 1)
        scales[rows] = moved - rate / mean_bias * self.mean[rows] / denominator


def train_rows(
    model: nn.Module,
    bank: IA3Bank,
    task: Task[Item],
    jobs: Sequence[Job[Item]],
    plan: TrainingPlan,
) -> list[Trained]:
    """Train every job as its own row, all rows of a step in shared batches.

    With ``plan.patience`` a row stops after that many epochs without a better validation loss and
    returns the best of its epochs' vectors; whether that beats the start is the gate's question.

    Raises:
        BadData: a job has nothing to train on, or no validation examples though patience is set.
        NoGradient: a target's scales get no gradient from any job; the message names it.
    """
    trained = _Pass(model, bank, task, jobs, plan).run()
    give_memory_back()
    return trained


def give_memory_back() -> None:
    """Let the C library return freed activations to the system.

    glibc keeps their pieces, of another size in every batch: a simulation of 114 chat authors grew
    to 3.4 GB of which 0.8 GB were in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


class _Pass(Generic[Item]):
    """One run of :func:`train_rows`: the bank's rows, their optimizers and their ledgers."""

    def __init__(
        self,
        model: nn.Module,
        bank: IA3Bank,
        task: Task[Item],
        jobs: Sequence[Job[Item]],
        plan: TrainingPlan,
    ) -> None:
        for job in jobs:
            if not job.train or (plan.patience is not None and not job.validation):
                raise BadData("a client needs training examples, and with patience validation ones")
        self.model, self.bank, self.task, self.plan = model, bank, task, plan
        bank.load([job.start for job in jobs])
        self.adam = RowAdam(bank.scales.data)
        self.rows = [_Row(job, plan) for job in jobs]

    def run(self) -> list[Trained]:
        while active := [n for n, row in enumerate(self.rows) if not row.done]:
            self._step(active)
            self._validate([n for n in active if self.rows[n].at_epoch_end])
        return [row.trained(self.bank.adapter(n).vector) for n, row in enumerate(self.rows)]

    def _step(self, active: Sequence[int]) -> None:
        """One optimizer step of every active row."""
        losses = self._backward({n: self.rows[n].next_batch() for n in active})
        gradient = self.bank.scales.grad
        assert gradient is not None
        if self.adam.steps.sum() == 0:
            _require_gradient(gradient, self.bank.schema)
        norms = gradient.norm(dim=1)
        for n in active:
            self.rows[n].note(losses[n], float(norms[n]))
        moving = [n for n in active if not self.rows[n].diverged]
        if not moving:
            return
        clip = (self.plan.clip_norm / (norms + 1e-6)).clamp(max=1.0)  # torch's clip_grad_norm_
        rates = torch.tensor([self._rate(self.rows[n].steps) for n in moving])
        self.adam.step(
            self.bank.scales.data,
            gradient * clip[:, None],
            torch.tensor(moving),
            rates.to(gradient),
            self.plan.weight_decay,
        )

    def _rate(self, step: int) -> float:
        """Learning rate of a row's ``step``-th step, from 1: linear warm-up, then constant."""
        return self.plan.learning_rate * min(1.0, step / (self.plan.warmup_steps + 1))

    def _backward(self, batches: Mapping[int, Sequence[Item]]) -> dict[int, float]:
        """Gradients of every row's mean token loss into ``scales.grad``; the losses by row."""
        self.bank.scales.grad = None
        tokens = {n: sum(map(self.task.learned, batch)) for n, batch in batches.items()}
        losses = dict.fromkeys(batches, 0.0)
        for rows, items in _packs(self.task, batches):
            weights = torch.tensor([1 / tokens[n] for n in rows], device=self.bank.scales.device)
            with self.bank.using(torch.tensor(rows)):
                shares = self.task.score(self.model, items).loss * weights
                shares.sum().backward()  # type: ignore[no-untyped-call]  # torch's stub
            for n, share in zip(rows, shares.tolist(), strict=True):
                losses[n] += share
        return losses

    def _validate(self, rows: Sequence[int]) -> None:
        """At a row's epoch end, keep its best vector and stop it on a plateau."""
        if self.plan.patience is None or not rows:
            return
        examples = {n: self.rows[n].job.validation for n in rows}
        for n, result in _evaluate(self.model, self.bank, self.task, examples).items():
            self.rows[n].judge(result.loss, self.bank.adapter(n).vector)


class _Row(Generic[Item]):
    """One client's ledger while it trains."""

    def __init__(self, job: Job[Item], plan: TrainingPlan) -> None:
        self.job, self.plan = job, plan
        self.steps = 0
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.diverged = False
        self.stale_epochs = 0
        self.best: tuple[float, Vector] | None = None
        self.per_epoch = math.ceil(len(job.train) / plan.batch_size)
        self.last_step = min(plan.epochs * self.per_epoch, plan.max_steps or math.inf)
        self.order = np.random.default_rng(job.seed)
        self.batches: Iterator[Sequence[Item]] = iter(())

    @property
    def done(self) -> bool:
        plateau = self.plan.patience is not None and self.stale_epochs >= self.plan.patience
        return self.diverged or plateau or self.steps >= self.last_step

    @property
    def at_epoch_end(self) -> bool:
        return self.steps % self.per_epoch == 0 or self.steps >= self.last_step

    def next_batch(self) -> Sequence[Item]:
        if self.steps % self.per_epoch == 0:
            self.batches = self._shuffled()
        self.steps += 1
        return next(self.batches)

    def _shuffled(self) -> Iterator[Sequence[Item]]:
        order = self.order.permutation(len(self.job.train))
        for start in range(0, len(order), self.plan.batch_size):
            yield [self.job.train[i] for i in order[start : start + self.plan.batch_size]]

    def note(self, loss: float, norm: float) -> None:
        self.diverged = not (math.isfinite(loss) and math.isfinite(norm))
        if not self.diverged:
            self.losses.append(loss)
            self.norms.append(norm)

    def judge(self, loss: float, vector: Vector) -> None:
        if self.best is None or loss < self.best[0]:
            self.best, self.stale_epochs = (loss, vector), 0
        else:
            self.stale_epochs += 1

    def trained(self, last: Vector) -> Trained:
        return Trained(
            vector=last if self.best is None else self.best[1],
            steps=len(self.losses),
            first_loss=self.losses[0] if self.losses else math.nan,
            mean_loss=float(np.mean(self.losses)) if self.losses else math.nan,
            grad_norm=float(np.mean(self.norms)) if self.norms else math.nan,
            diverged=self.diverged,
        )


def evaluate_rows(
    model: nn.Module,
    bank: IA3Bank,
    task: Task[Item],
    vectors: Sequence[Vector],
    examples: Sequence[Sequence[Item]],
) -> list[Evaluation]:
    """Score ``examples[i]`` under ``vectors[i]``, all users in shared batches."""
    bank.load(vectors)
    results = _evaluate(model, bank, task, dict(enumerate(examples)))
    return [results[n] for n in range(len(vectors))]


@torch.inference_mode()
def _evaluate(
    model: nn.Module, bank: IA3Bank, task: Task[Item], examples: Mapping[int, Sequence[Item]]
) -> dict[int, Evaluation]:
    loss, exact = dict.fromkeys(examples, 0.0), dict.fromkeys(examples, 0)
    for rows, items in _packs(task, examples):
        with bank.using(torch.tensor(rows)):
            scores = task.score(model, items)
        for n, nats, right in zip(rows, scores.loss.tolist(), scores.exact.tolist(), strict=True):
            loss[n] += nats
            exact[n] += right
    tokens = {n: sum(map(task.learned, items)) for n, items in examples.items()}
    return {
        n: Evaluation(loss[n] / tokens[n], exact[n] / len(items), tokens[n], len(items))
        for n, items in examples.items()
    }


def _packs(
    task: Task[Item], batches: Mapping[int, Sequence[Item]]
) -> Iterator[tuple[list[int], list[Item]]]:
    """The examples of all rows in packs of like length, each within :data:`TOKENS_AT_ONCE`."""
    pairs = [(n, item) for n, items in batches.items() for item in items]
    pairs.sort(key=lambda pair: task.length(pair[1]))  # stable: the same packs in every run
    pack: list[tuple[int, Item]] = []
    for pair in pairs:
        if pack and (len(pack) + 1) * task.length(pair[1]) > TOKENS_AT_ONCE:
            yield [n for n, _ in pack], [item for _, item in pack]
            pack = []
        pack.append(pair)
    if pack:
        yield [n for n, _ in pack], [item for _, item in pack]


def _require_gradient(gradient: Tensor, schema: Schema) -> None:
    dead = [key for key, place in schema.slices.items() if not gradient[:, place].any()]
    if dead:
        raise NoGradient(
            f"no gradient reaches {', '.join(dead[:5])}"
            f"{f' and {len(dead) - 5} more' if len(dead) > 5 else ''}: "
            "the module is not used by the model's loss; leave it out of the targets"
        )


@dataclass(frozen=True)
class ClientExamples(Generic[Item]):
    """One client's encoded text, split for learning, deciding and reporting."""

    train: Sequence[Item]
    validation: Sequence[Item]
    test: Sequence[Item]


class ResidentTrainer(Generic[Item]):
    """The base model held in memory for the clients of this machine: one owner, or a cohort.

    A device answers :meth:`train` alone. A simulation calls :meth:`prepare` with a chunk of a
    round first: the chunk is trained in one pass and each :meth:`train` hands over its part.
    """

    def __init__(
        self,
        model: Any,
        schema: Schema,
        task: Task[Item],
        clients: Mapping[str, ClientExamples[Item]],
    ) -> None:
        self.model, self.schema, self.task, self.clients = model, schema, task, clients
        self.bank = IA3Bank(model, schema)
        self._prepared: dict[tuple[str, int], ClientUpdate] = {}

    def prepare(self, requests: Sequence[TrainRequest]) -> None:
        """Train these clients in one pass; they share one plan."""
        plans = {request.plan for request in requests}
        if len(plans) != 1:
            raise BadInput(f"a cohort trains by one plan, got {len(plans)}")
        trained = train_rows(
            self.model, self.bank, self.task, [self._job(r) for r in requests], plans.pop()
        )
        for request, result in zip(requests, trained, strict=True):
            self._prepared[request.client, request.round_num] = self._update(request, result)

    def train(self, request: TrainRequest) -> ClientUpdate:
        """One client's update.

        Raises:
            NotFound: this machine does not hold that client's data.
            WrongBaseModel: the request is for another base model or other targets.
        """
        if (request.client, request.round_num) not in self._prepared:
            self.prepare([request])
        return self._prepared.pop((request.client, request.round_num))

    def _job(self, request: TrainRequest) -> Job[Item]:
        if request.client not in self.clients:
            raise NotFound("this machine holds no data of the client it was asked to train")
        if request.schema_digest != self.schema.digest:
            raise WrongBaseModel(
                f"the coordinator trains schema {request.schema_digest[:12]}, this machine's base "
                f"model has {self.schema.digest[:12]}; load the coordinator's base"
            )
        examples = self.clients[request.client]
        return Job(request.vector, examples.train, examples.validation, request.seed)

    def _update(self, request: TrainRequest, trained: Trained) -> ClientUpdate:
        return ClientUpdate(
            delta=trained.vector - request.vector,
            num_examples=len(self.clients[request.client].train),
            metrics={
                "loss_first": trained.first_loss,
                "loss_mean": trained.mean_loss,
                "grad_norm": trained.grad_norm,
                "steps": float(trained.steps),
                "diverged": float(trained.diverged),
            },
        )


def seed_of(*parts: object) -> int:
    """A 64-bit seed from anything printable, the same in every process (``hash`` is not)."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
