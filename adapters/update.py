"""What a device is asked to do in a round, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from fedia3.adapters.adapter import Vector
from fedia3.errors import BadSetting


@dataclass(frozen=True)
class TrainingPlan:
    """How a device trains; the coordinator sends it with every round.

    IA3 wants learning rates of 1e-3 to 1e-1, far above LoRA's.
    """

    learning_rate: float = 3e-2
    epochs: int = 1  # passes over the device's training split
    max_steps: int | None = None  # optimizer steps at most, whatever the epochs say
    batch_size: int = 8  # examples
    warmup_steps: int = 2
    clip_norm: float = 1.0  # L2 norm of one client's gradient
    weight_decay: float = 0.0  # pulls scales towards one, AdamW style
    max_length: int = 128  # tokens of one example; longer ones are cut
    patience: int | None = None  # epochs without a better validation loss before stopping

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate <= 1:
            raise BadSetting(f"learning_rate lies in (0, 1], got {self.learning_rate}")
        for name in ("epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise BadSetting(f"{name} is at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise BadSetting(f"{name} is at least 0, got {getattr(self, name)}")
        if self.clip_norm <= 0:
            raise BadSetting(f"clip_norm is above 0, got {self.clip_norm}")
        for name in ("max_steps", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadSetting(f"{name} is at least 1 where set, got {value}")


@dataclass(frozen=True, eq=False)
class TrainRequest:
    """One round's work for one client."""

    client: str
    round_num: int
    round_seed: int  # the same for all, as is what follows: a request is sent once for a cohort
    vector: Vector  # the global adapter, (n_params,)
    schema_digest: str
    plan: TrainingPlan

    @property
    def seed(self) -> int:
        """What this client trains with."""
        return client_seed(self.client, self.round_seed)


def client_seed(client: str, round_seed: int) -> int:
    """One client's share of a round's seed, in ``[0, 2**63)``: a signed field holds it."""
    return int.from_bytes(sha256(f"{round_seed}/{client}".encode()).digest()[:8]) >> 1


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """A device's answer: ``delta`` = its vector after training minus the one it was sent."""

    delta: Vector  # (n_params,)
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
