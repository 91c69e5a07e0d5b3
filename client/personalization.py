"""After the rounds: each user's own part on top of the global adapter, and whether to serve it.

Local fine-tuning from the global model (Wang et al., 2019, "Federated evaluation of on-device
personalization"), kept relative to the global, behind a gate: what is not better on the owner's
validation split is not served.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.update import TrainingPlan
from fedia3.client.trainer import (
    Item,
    Job,
    ResidentTrainer,
    evaluate_rows,
    seed_of,
    train_rows,
)

Choice = Literal["personal", "global"]


@dataclass(frozen=True, eq=False)
class Personalized:
    """One user's personal part and the gate's decision."""

    personal: PersonalAdapter
    global_loss: float  # validation, nats per learned token
    personal_loss: float
    num_examples: int  # trained on

    @property
    def choice(self) -> Choice:
        """What this user is served: personal only where it beat the global on validation."""
        return "personal" if self.personal_loss < self.global_loss else "global"

    def served(self, global_adapter: Adapter) -> Adapter:
        """The adapter that answers this user."""
        if self.choice == "global":
            return global_adapter
        return self.personal.on(global_adapter)


def personalize(
    trainer: ResidentTrainer[Item],
    users: Sequence[str],
    global_adapter: Adapter,
    global_digest: str,
    plan: TrainingPlan,
    seed: int,
) -> Mapping[str, Personalized]:
    """Fine-tune every user's row from the global adapter on the user's training split.

    The validation losses are those of the stored parts put back on the global, so what is judged
    is what will be served.
    """
    examples = [trainer.clients[user] for user in users]
    jobs = [
        Job(global_adapter.vector, e.train, e.validation, seed_of(seed, user, "personal"))
        for user, e in zip(users, examples, strict=True)
    ]
    rows = train_rows(trainer.model, trainer.bank, trainer.task, jobs, plan)
    parts = [
        PersonalAdapter(trainer.schema, r.vector - global_adapter.vector, global_digest)
        for r in rows
    ]
    validation = [e.validation for e in examples]
    before = _losses(trainer, [global_adapter] * len(users), validation)
    after = _losses(trainer, [p.on(global_adapter) for p in parts], validation)
    return {
        user: Personalized(part, was, now, len(e.train))
        for user, part, was, now, e in zip(users, parts, before, after, examples, strict=True)
    }


def _losses(
    trainer: ResidentTrainer[Item],
    adapters: Sequence[Adapter],
    examples: Sequence[Sequence[Item]],
) -> list[float]:
    vectors = [a.vector for a in adapters]
    results = evaluate_rows(trainer.model, trainer.bank, trainer.task, vectors, examples)
    return [r.loss for r in results]
