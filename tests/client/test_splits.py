"""Who trains on what, who is judged on what, and who has too little."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedia3.client.data import Example
from fedia3.client.splits import (
    Split,
    SplitPlan,
    majority_accuracy,
    majority_label,
    split,
    split_users,
)
from fedia3.errors import BadData, BadSetting


def said(*texts: object) -> list[Example]:
    """Plain text examples, oldest first."""
    return [Example.whole(str(text)) for text in texts]


def labelled(*labels: str) -> tuple[Example, ...]:
    """Examples of different texts with these labels."""
    return tuple(
        Example.answer(f"text {place}\n\n", label, label=label)
        for place, label in enumerate(labels)
    )


def texts(sides: Split) -> tuple[list[str], list[str], list[str]]:
    """Training, validation and test texts."""
    train, validation, test = (
        [example.text for example in side] for side in (sides.train, sides.validation, sides.test)
    )
    return train, validation, test


def test_by_order_the_oldest_train_and_the_newest_judge() -> None:
    """
    Ten examples split 7, 1, 2 in the order of time.
    """
    train, validation, test = texts(split(said(*range(10)), SplitPlan(by="order")))
    assert (train, validation, test) == (list("0123456"), ["7"], ["8", "9"])


def test_by_lot_sides_have_the_same_sizes_and_another_order_for_each_user() -> None:
    """
    Two users who wrote the same have other held-out lines, but the same number of them.
    """
    plan = SplitPlan(by="seed")
    ann, bob = (split(said(*range(100)), plan, user) for user in ("ann", "bob"))
    sizes = [[len(side) for side in texts(sides)] for sides in (ann, bob)]
    assert sizes == [[70, 10, 20], [70, 10, 20]]
    assert ann.test != bob.test
    assert list(ann.train) == sorted(ann.train, key=lambda example: int(example.text))


def test_the_same_seed_splits_alike_in_every_process() -> None:
    """
    A resumed run judges on the lines it has never trained on, whatever PYTHONHASHSEED is.
    """
    code = (
        "from fedia3.client.data import Example; from fedia3.client.splits import *;"
        "sides = split([Example.whole(str(i)) for i in range(20)], SplitPlan(by='seed'), 'ann');"
        "print([e.text for e in sides.test])"
    )
    here = [example.text for example in split(said(*range(20)), SplitPlan(by="seed"), "ann").test]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(here)


def test_another_seed_splits_differently() -> None:
    """
    The seed is what a repeated measurement changes.
    """
    one, two = (split(said(*range(50)), SplitPlan(by="seed", seed=seed)) for seed in (1, 2))
    assert one.test != two.test


def test_by_item_everybody_has_an_item_on_the_same_side() -> None:
    """
    Several people answered the same questions: none is trained by one and judged by another.
    """
    answers = {
        user: [Example.answer(f"question {i}\n\n", f"{user} says {i}") for i in range(100)]
        for user in ("ann", "bob")
    }
    population = split_users(answers, SplitPlan(by="item"))
    ann, bob = (population.splits[user] for user in ("ann", "bob"))
    assert [e.item for e in ann.test] == [e.item for e in bob.test]
    assert {e.item for e in ann.train}.isdisjoint(e.item for e in bob.test)


def test_by_item_shares_are_met_roughly() -> None:
    """
    Of a thousand items about a tenth validates and a fifth tests.
    """
    _, validation, test = texts(split(said(*range(1000)), SplitPlan(by="item")))
    assert 70 < len(validation) < 130
    assert 150 < len(test) < 250


def test_held_out_lines_that_were_trained_on_are_dropped() -> None:
    """
    The newest lines are "ok", an old one, and "new": only "new" can judge.
    """
    examples = said("ok", *range(1, 8), "ok", "new")
    assert texts(split(examples, SplitPlan()))[2] == ["new"]


def test_only_the_newest_examples_count_where_there_is_a_cap() -> None:
    """
    Of twenty examples with a cap of ten, the first ten take no part.
    """
    train, validation, test = texts(split(said(*range(20)), SplitPlan(max_examples=10)))
    assert train + validation + test == [str(number) for number in range(10, 20)]


def test_users_with_too_few_examples_are_listed_apart() -> None:
    """
    Nine examples are too few, ten are enough.
    """
    population = split_users({"ann": said(*range(9)), "bob": said(*range(10))})
    assert (list(population.splits), population.too_small) == (["bob"], {"ann": 9})


def test_users_who_only_repeat_themselves_are_listed_apart() -> None:
    """
    Forty times "ok" leaves nothing to be judged on.
    """
    population = split_users({"ann": said(*["ok"] * 40), "bob": said(*range(10))})
    assert population.too_small == {"ann": 40}


def test_nobody_with_enough_is_an_error() -> None:
    """
    The message says how far the largest user is from the minimum.
    """
    with pytest.raises(BadData, match=r"at least 10 examples.* largest of 1 users has 4"):
        split_users({"ann": said(*range(4))})


@given(
    n=st.integers(3, 60),
    validation=st.floats(0.01, 0.45),
    test=st.floats(0.01, 0.45),
    by=st.sampled_from(["order", "seed"]),
)
def test_different_examples_are_each_on_exactly_one_side(
    n: int, validation: float, test: float, by: str
) -> None:
    """
    Nothing is lost or used twice, and no side that is held out is empty.
    """
    plan = replace(SplitPlan(validation=validation, test=test), by=by)  # type: ignore[arg-type]  # hypothesis draws plain text
    sides = texts(split(said(*range(n)), plan))
    assert sorted(sum(sides, [])) == sorted(map(str, range(n)))  # noqa: RUF017  # three short lists
    assert all(sides[1:])


@pytest.mark.parametrize(
    "settings",
    [
        {"by": "day"},
        {"validation": 0.0},
        {"validation": 0.6, "test": 0.4},
        {"min_examples": 2},
        {"max_examples": 5},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    """
    No side may be empty by plan.
    """
    with pytest.raises(BadSetting, match="got "):
        SplitPlan(**settings)  # type: ignore[arg-type]  # wrong on purpose


def test_the_majority_label_is_what_a_classifier_has_to_beat() -> None:
    """
    Training says "yes" twice of three times; "yes" is right on one of two tests.
    """
    train, test = labelled("yes", "no", "yes"), labelled("yes", "no")
    assert majority_accuracy(Split(train, (), test)) == 0.5


def test_of_equal_labels_the_earliest_is_the_majority() -> None:
    """
    A tie is the same label on every run.
    """
    assert majority_label(labelled("no", "yes", "yes", "no")) == "no"


def test_without_labels_there_is_no_majority() -> None:
    """
    Plain text has nothing to guess.
    """
    examples = tuple(said("one", "two"))
    assert majority_accuracy(Split(examples, examples, examples)) is None
