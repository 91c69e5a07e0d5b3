"""The people of a simulation: their text, read, split and encoded for the base model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedia3.adapters.base_model import BaseModel
from fedia3.client.data import Dataset, Example, read_jsonl
from fedia3.client.examples import encode_sides
from fedia3.client.splits import Split, majority_accuracy, split_users
from fedia3.client.tokens import chat_renderer
from fedia3.client.trainer import ClientExamples
from fedia3.coordinator.records import checked_name
from fedia3.errors import BadData
from fedia3.simulations.demo import demo_population
from fedia3.simulations.settings import Settings

LEAST_USERS = 2  # the control needs another user's adapter


@dataclass(frozen=True)
class People:
    """Everybody who takes part, ready to train."""

    clients: Mapping[str, ClientExamples[Any]]
    majority: Mapping[str, float | None]  # accuracy of the user's most common label, if labelled
    too_small: Mapping[str, int]  # users with too little text: how many examples they have
    labelled: bool  # completions are labels or answers: exact matches mean something
    left_out: int  # texts without a token left to learn once cut to max_length


def read_people(settings: Settings, base: BaseModel) -> Dataset:
    """The run's text by user, the demo population's where no data is named.

    Raises:
        BadData: the data cannot be read.
        BadInput: a user's name is too long or holds control characters: no registry keeps it.
    """
    if settings.data is not None:
        dataset = read_jsonl(
            Path(settings.data),
            settings.user_field,
            order_field=settings.order_field,
            skip_bad_lines=settings.skip_bad_lines,
            render=chat_renderer(base.tokenizer),
        )
        return _under_registry_names(dataset)
    rows = demo_population(settings.demo_users, settings.demo_texts)
    users = sorted({row["user"] for row in rows})
    return Dataset(
        {u: tuple(Example.whole(r["text"]) for r in rows if r["user"] == u) for u in users}
    )


def _under_registry_names(dataset: Dataset) -> Dataset:
    """The same people under the names the registry keeps: one Unicode form for each."""
    examples: dict[str, tuple[Example, ...]] = {}
    for user, theirs in dataset.examples.items():
        name = checked_name(user, "a user's name")
        examples[name] = examples.get(name, ()) + theirs
    return replace(dataset, examples=examples)


def prepare(dataset: Dataset, settings: Settings, seed: int, base: BaseModel) -> People:
    """Split by the plan and encode for the base; who is left without text on a side is too small.

    Raises:
        BadData: fewer than two users have enough text.
    """
    population = split_users(dataset.examples, replace(settings.split, seed=seed))
    length = settings.training.max_length
    encoded = {user: encode_sides(sides, base, length) for user, sides in population.splits.items()}
    clients = {u: e for u, e in sorted(encoded.items()) if e.train and e.validation and e.test}
    if len(clients) < LEAST_USERS:
        raise BadData(
            f"expected at least {LEAST_USERS} users with enough text, got {len(clients)}: "
            "the control compares each user with another one"
        )
    too_small = dict(population.too_small) | {
        u: len(dataset.examples[u]) for u in encoded if u not in clients
    }
    given = sum(len(side) for sides in population.splits.values() for side in _sides(sides))
    kept = sum(len(side) for sides in encoded.values() for side in _sides(sides))
    return People(
        clients,
        {user: majority_accuracy(population.splits[user]) for user in clients},
        too_small,
        all(e.prompt_end for sides in population.splits.values() for e in sides.test),
        given - kept,
    )


def _sides(split: Split | ClientExamples[Any]) -> tuple[Sequence[Any], ...]:
    return split.train, split.validation, split.test
