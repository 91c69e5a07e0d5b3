"""Scores of the three tasks on models whose answer is known."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedia3.client.tasks import CausalLM, Seq2Seq, SequenceClassification, task_for
from fedia3.client.tokens import IGNORED, Encoded, EncodedClass, EncodedPair
from fedia3.errors import BadSetting
from fedia3.testing import tiny_model

LN8 = math.log(8)


class Guesser(nn.Module):
    """Of 8 tokens or classes it finds all equally likely, or is sure of one of them."""

    def __init__(self, sure_of: int | None = None, per_text: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.sure_of, self.per_text = sure_of, per_text
        self.seen: dict[str, torch.Tensor] = {}

    def forward(self, **inputs):
        self.seen = inputs
        ids = inputs.get("labels", inputs["input_ids"])
        logits = torch.zeros(*(ids.shape[:1] if self.per_text else ids.shape), 8)
        if self.sure_of is not None:
            logits[..., self.sure_of] = 100.0
        return SimpleNamespace(logits=logits + self.weight)


def test_every_learned_token_costs_what_the_model_thinks_of_it():
    """
    Equal odds of 8 cost ln 8 nats a token: two learned tokens here, one there, padding nothing.
    """
    items = [Encoded([1, 5, 6], [IGNORED, 5, 6]), Encoded([1, 5], [IGNORED, 5])]
    model = Guesser()
    scores = CausalLM(pad_id=3).score(model, items)
    assert scores.loss.tolist() == pytest.approx([2 * LN8, LN8])
    assert model.seen["input_ids"].tolist() == [[1, 5, 6], [1, 5, 3]]
    assert model.seen["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_prompt_costs_nothing():
    """
    Of four tokens only the last is learned.
    """
    item = Encoded([1, 4, 5, 6], [IGNORED, IGNORED, IGNORED, 6])
    assert CausalLM(0).score(Guesser(), [item]).loss.tolist() == pytest.approx([LN8])
    assert (CausalLM(0).length(item), CausalLM(0).learned(item)) == (4, 1)


def test_exact_means_every_learned_token():
    """
    Always saying 5 is right for the completion "5", wrong for "5 6", whatever the prompts are.
    """
    items = [Encoded([1, 4, 5], [IGNORED, IGNORED, 5]), Encoded([1, 5, 6], [IGNORED, 5, 6])]
    assert CausalLM(0).score(Guesser(sure_of=5), items).exact.tolist() == [True, False]


def test_a_target_sequence_is_scored_token_by_token():
    """
    Targets of 2 and 1 tokens; the labels are not shifted, that is the model's affair.
    """
    items = [EncodedPair([4, 5, 6], [5, 5]), EncodedPair([4], [7])]
    task, model = Seq2Seq(pad_id=0), Guesser(sure_of=5)
    assert task.score(Guesser(), items).loss.tolist() == pytest.approx([2 * LN8, LN8])
    assert task.score(model, items).exact.tolist() == [True, False]
    assert model.seen["labels"].tolist() == [[5, 5], [7, IGNORED]]
    assert (task.length(items[0]), task.learned(items[0])) == (5, 2)


def test_a_class_is_one_guess():
    """
    One label each, whatever the length of the text.
    """
    items = [EncodedClass([4, 5, 6], 2), EncodedClass([4], 3)]
    task, model = SequenceClassification(pad_id=0), Guesser(sure_of=2, per_text=True)
    assert task.score(Guesser(per_text=True), items).loss.tolist() == pytest.approx([LN8, LN8])
    assert task.score(model, items).exact.tolist() == [True, False]
    assert (task.length(items[0]), task.learned(items[0])) == (3, 1)


def test_a_causal_score_is_the_models_own_loss():
    """
    transformers' mean over the learned tokens, times their number.
    """
    model = tiny_model("llama")
    item = Encoded([1, 7, 8, 9], [IGNORED, IGNORED, 8, 9])
    ids, labels = torch.tensor([item.input_ids]), torch.tensor([item.labels])
    with torch.no_grad():
        mean = float(model(input_ids=ids, labels=labels).loss)
        assert CausalLM(0).score(model, [item]).loss.tolist() == pytest.approx([2 * mean])


def test_the_neighbours_length_does_not_matter():
    """
    A short text scores the same beside a long one as alone.
    """
    model = tiny_model("llama")
    short, long = Encoded([1, 7], [IGNORED, 7]), Encoded([1, *range(3, 20)], [1, *range(3, 20)])
    with torch.no_grad():
        alone = CausalLM(0).score(model, [short]).loss[0]
        beside = CausalLM(0).score(model, [short, long]).loss[0]
    assert float(beside) == pytest.approx(float(alone), abs=1e-5)


@pytest.mark.parametrize(
    ("architecture", "task"),
    [("gpt2", CausalLM(2)), ("t5", Seq2Seq(2)), ("bert", SequenceClassification(2))],
)
def test_the_models_class_says_its_task(architecture: str, task: object):
    """
    The head decides: nothing is guessed from the data.
    """
    assert task_for(tiny_model(architecture), pad_id=2) == task


def test_a_model_of_another_kind_is_named():
    """
    Image models are not scored here.
    """
    with pytest.raises(BadSetting, match="ViTForImageClassification"):
        task_for(tiny_model("vit"), pad_id=0)
