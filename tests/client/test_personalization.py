"""Each user's own part, and the gate before it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.schema import Schema, Target
from fedia3.adapters.targets import find_targets
from fedia3.adapters.update import TrainingPlan
from fedia3.client.personalization import Personalized, personalize
from fedia3.client.tasks import CausalLM, Scores
from fedia3.client.tokens import IGNORED, Encoded
from fedia3.client.trainer import ClientExamples, ResidentTrainer, evaluate_rows
from fedia3.testing import tiny_model

SMALL = Schema("0" * 64, (Target("k_proj", "k", 2),))
PLAN = TrainingPlan(epochs=3, batch_size=2, patience=2)
DIGEST = "ab" * 32


class Unread:
    """A test example: whoever looks at it fails the test."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError("personalization read the test split")


def text(*words: int) -> Encoded:
    """Token 1, then the words, all of them learned."""
    return Encoded([1, *words], [IGNORED, *words])


def clients() -> dict[str, ClientExamples[Any]]:
    """ann repeats herself; bob's validation text has nothing of what he trains on."""
    ann, bob = [text(7, 8, 7, 8)] * 4, [text(9, 10, 9, 10)] * 4
    return {
        "ann": ClientExamples(ann, [text(7, 8, 7)], [Unread()]),
        "bob": ClientExamples(bob, [text(40, 41, 42)], [Unread()]),
    }


class Diverging(CausalLM):
    """Every loss is NaN."""

    def score(self, model: Any, items: Any) -> Scores:
        scores = super().score(model, items)
        return replace(scores, loss=scores.loss * float("nan"))


@pytest.fixture
def trainer() -> ResidentTrainer[Any]:
    """ann and bob on a tiny Llama."""
    model = tiny_model("llama").requires_grad_(False)
    return ResidentTrainer(
        model, Schema("0" * 64, find_targets(model)), CausalLM(pad_id=0), clients()
    )


def start(trainer: ResidentTrainer[Any]) -> Adapter:
    """A global adapter that is not just ones."""
    noise = np.random.default_rng(0).normal(1, 0.1, trainer.schema.n_params)
    return Adapter(trainer.schema, noise.astype(np.float32))


def judged(global_loss: float, personal_loss: float) -> Personalized:
    """A part of +0.5 and −0.5 with these validation losses."""
    part = PersonalAdapter(SMALL, np.array([0.5, -0.5], np.float32), DIGEST)
    return Personalized(part, global_loss, personal_loss, num_examples=9)


def test_what_is_better_on_validation_is_served():
    """
    Global scales of 1 and a part of +0.5 and −0.5 make 1.5 and 0.5.
    """
    result = judged(global_loss=2.0, personal_loss=1.0)
    assert result.choice == "personal"
    assert result.served(Adapter.ones(SMALL)).vector.tolist() == [1.5, 0.5]


@pytest.mark.parametrize("personal_loss", [2.0, 2.5, float("nan"), float("inf")])
def test_what_is_not_better_is_not_served(personal_loss: float):
    """
    Equal, worse or no number at all: the global adapter itself answers.
    """
    result, everyone = judged(2.0, personal_loss), Adapter.ones(SMALL)
    assert result.choice == "global"
    assert result.served(everyone) is everyone


def test_what_is_judged_is_what_is_stored(trainer: ResidentTrainer[Any]):
    """
    The stored part put back on the global adapter scores exactly the loss that chose it.
    """
    everyone = start(trainer)
    results = personalize(trainer, ["ann", "bob"], everyone, DIGEST, PLAN, seed=0)
    again = evaluate_rows(
        trainer.model,
        trainer.bank,
        trainer.task,
        [result.personal.on(everyone).vector for result in results.values()],
        [trainer.clients[user].validation for user in results],
    )
    assert [r.personal_loss for r in results.values()] == [e.loss for e in again]


def test_the_part_is_relative_to_the_global_it_names(trainer: ResidentTrainer[Any]):
    """
    Half of the part moves half as far, and the global version's digest travels with it.
    """
    everyone = start(trainer)
    part = personalize(trainer, ["ann"], everyone, DIGEST, PLAN, seed=0)["ann"].personal
    assert part.global_digest == DIGEST
    assert np.abs(part.delta).max() > 0.01
    np.testing.assert_allclose(
        part.on(everyone, alpha=0.5).vector - everyone.vector, part.delta / 2, atol=1e-6
    )


def test_validation_decides_and_the_test_split_is_never_read(trainer: ResidentTrainer[Any]):
    """
    ann's part is better on her validation text; the test examples raise at any look.
    """
    results = personalize(trainer, ["ann", "bob"], start(trainer), DIGEST, PLAN, seed=0)
    assert results["ann"].choice == "personal"
    assert results["ann"].personal_loss < results["ann"].global_loss
    assert [r.num_examples for r in results.values()] == [4, 4]
    with pytest.raises(AssertionError, match="test split"):
        trainer.task.length(trainer.clients["ann"].test[0])


def test_a_part_that_is_worse_is_kept_and_not_served(trainer: ResidentTrainer[Any]):
    """
    What bob learned is his, better or worse; the gate alone decides what answers him.
    """
    everyone = start(trainer)
    bob = personalize(trainer, ["bob"], everyone, DIGEST, PLAN, seed=0)["bob"]
    worse = replace(bob, personal_loss=bob.global_loss + 0.1)
    assert bob.personal.delta.any()
    assert worse.choice == "global"
    assert worse.served(everyone) == everyone


def test_company_changes_nobody(trainer: ResidentTrainer[Any]):
    """
    ann's part is the same, to rounding, whether bob is trained beside her or not.
    """
    everyone = start(trainer)
    plan = replace(PLAN, epochs=1, patience=None)  # rounding adds up over more steps
    alone = personalize(trainer, ["ann"], everyone, DIGEST, plan, seed=0)["ann"]
    together = personalize(trainer, ["bob", "ann"], everyone, DIGEST, plan, seed=0)["ann"]
    np.testing.assert_allclose(together.personal.delta, alone.personal.delta, atol=5e-6)


def test_a_user_whose_training_diverges_is_served_the_global(
    trainer: ResidentTrainer[Any],
):
    """
    The only user's loss is not finite from the first step on: a part of zeros, not an error.
    """
    trainer.task = Diverging(pad_id=0)
    plan = replace(PLAN, patience=None)
    ann = personalize(trainer, ["ann"], start(trainer), DIGEST, plan, seed=0)["ann"]
    assert not ann.personal.delta.any()
    assert ann.choice == "global"
