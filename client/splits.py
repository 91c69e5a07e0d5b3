"""Decides which of a user's examples train, which tune and which judge: by time, lot or item.

A held-out example never repeats an item that was trained on: a gain measured here is not one
of having seen the line before. It is the careful choice where people repeat themselves ("ok",
"thanks"): what personalization saves on such lines is left out of the measurement.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Literal, get_args

from fedia3.client.data import Example
from fedia3.errors import BadData, BadSetting

By = Literal["order", "seed", "item"]


@dataclass(frozen=True)
class SplitPlan:
    """How everybody's examples are split.

    ``by`` is one of:

    - ``order``: train on the oldest, judge on the newest, as in use;
    - ``seed``: by lot, another one for each user;
    - ``item``: the same item falls to the same side for all users, for data where several people
      answered or labelled the same thing.
    """

    by: By = "order"
    seed: int = 0
    validation: float = 0.1  # share of a user's examples
    test: float = 0.2  # share; training gets the rest
    min_examples: int = 10  # users with fewer are left out
    max_examples: int | None = None  # the newest so many of each user

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise BadSetting(f"split by one of {', '.join(get_args(By))}, got {self.by!r}")
        if not (self.validation > 0 and self.test > 0 and self.validation + self.test < 1):
            raise BadSetting(
                "validation and test are shares above 0 that leave some for training, "
                f"got {self.validation} and {self.test}"
            )
        if self.min_examples < 3:
            raise BadSetting(f"min_examples is at least 3, one a side, got {self.min_examples}")
        if self.max_examples is not None and self.max_examples < self.min_examples:
            raise BadSetting(
                f"max_examples is at least min_examples ({self.min_examples}), "
                f"got {self.max_examples}"
            )


@dataclass(frozen=True)
class Split:
    """One user's examples, each side in the order they were given."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]  # chooses: early stopping, alpha, the gate
    test: tuple[Example, ...]  # only ever reported


@dataclass(frozen=True)
class Population:
    """Who takes part, and who has too little to be measured: user → number of examples."""

    splits: Mapping[str, Split]  # no side is empty
    too_small: Mapping[str, int]


def split(examples: Sequence[Example], plan: SplitPlan, user: str = "") -> Split:
    """One user's split; a pure function of its arguments, on every machine.

    Sides may come out empty where nearly all examples are the same, or by item.
    """
    newest = examples if plan.max_examples is None else examples[-plan.max_examples :]
    if plan.by == "item":
        train, validation, test = _sides_by_item(newest, plan)
    else:
        train, validation, test = _sides_by_count(newest, plan, user)
    trained = {example.item for example in train}
    validation = _unseen(validation, trained)
    test = _unseen(test, trained | {example.item for example in validation})
    return Split(tuple(train), tuple(validation), tuple(test))


def split_users(
    examples: Mapping[str, Sequence[Example]], plan: SplitPlan | None = None
) -> Population:
    """Split everybody who has ``min_examples`` and something new on every side.

    Raises:
        BadData: nobody has.
    """
    plan = plan or SplitPlan()
    splits: dict[str, Split] = {}
    too_small: dict[str, int] = {}
    for user, theirs in examples.items():
        sides = split(theirs, plan, user)
        enough = len(theirs) >= plan.min_examples
        if enough and sides.train and sides.validation and sides.test:
            splits[user] = sides
        else:
            too_small[user] = len(theirs)
    if not splits:
        most = max(too_small.values(), default=0)
        raise BadData(
            f"expected a user with at least {plan.min_examples} examples, different enough to "
            f"hold some out; the largest of {len(too_small)} users has {most}"
        )
    return Population(splits, too_small)


def majority_label(examples: Sequence[Example]) -> str | None:
    """The label met most often, the earliest of equals; None where nothing has a label."""
    counts = Counter(example.label for example in examples if example.label is not None)
    return max(counts, key=lambda label: counts[label]) if counts else None


def majority_accuracy(sides: Split) -> float | None:
    """How often the user's own majority label of training is right on test, from 0 to 1.

    What a personal classifier has to beat; None where nothing has a label.
    """
    guess = majority_label(sides.train)
    truths = [example.label for example in sides.test if example.label is not None]
    if guess is None or not truths:
        return None
    return sum(truth == guess for truth in truths) / len(truths)


def _sides_by_count(
    examples: Sequence[Example], plan: SplitPlan, user: str
) -> tuple[list[Example], list[Example], list[Example]]:
    """Train, validation and test of the planned sizes, at least one each for held-out sides."""
    n_test = max(1, round(plan.test * len(examples)))
    n_validation = max(1, round(plan.validation * len(examples)))
    n_train = max(0, len(examples) - n_validation - n_test)
    places = list(range(len(examples)))
    if plan.by == "seed":
        Random(_digest(str(plan.seed), user)).shuffle(places)
    cuts = (0, n_train, n_train + n_validation, len(examples))
    train, validation, test = (
        [examples[place] for place in sorted(places[first:last])] for first, last in pairwise(cuts)
    )
    return train, validation, test


def _sides_by_item(
    examples: Sequence[Example], plan: SplitPlan
) -> tuple[list[Example], list[Example], list[Example]]:
    train: list[Example] = []
    validation: list[Example] = []
    test: list[Example] = []
    for example in examples:
        lot = _digest(str(plan.seed), example.item) / 2**256  # the same for all users
        if lot < plan.test:
            test.append(example)
        elif lot < plan.test + plan.validation:
            validation.append(example)
        else:
            train.append(example)
    return train, validation, test


def _unseen(examples: Sequence[Example], seen: Collection[str]) -> list[Example]:
    return [example for example in examples if example.item not in seen]


def _digest(*words: str) -> int:
    """sha256 as a number: ``hash()`` of a text differs from one process to the next."""
    return int.from_bytes(hashlib.sha256("\x00".join(words).encode()).digest(), "big")
