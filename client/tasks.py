"""What a model is scored on: next tokens, a class, or a target sequence.

A task turns a batch of encoded examples into one loss per example, so that the trainer can add
them up client by client whatever batch they shared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation
from torch import Tensor, nn

from fedia3.adapters.peft_folder import task_type_of
from fedia3.client.tokens import IGNORED, Encoded, EncodedClass, EncodedPair

Item_contra = TypeVar("Item_contra", contravariant=True)


@dataclass(frozen=True, eq=False)
class Scores:
    """One batch's scores, example by example."""

    loss: Tensor  # (batch,) nats, summed over the example's learned tokens
    logits: Tensor  # (batch, length, classes)
    labels: Tensor  # (batch, length), IGNORED where the loss does not look

    @property
    def exact(self) -> Tensor:
        """(batch,) bool: every learned token is the model's first choice; training never asks."""
        wrong = (self.logits.argmax(dim=-1) != self.labels) & (self.labels != IGNORED)
        return ~wrong.any(dim=1)


class Task(Protocol, Generic[Item_contra]):
    """How one kind of example is scored by one kind of model."""

    def length(self, item: Item_contra) -> int:
        """Tokens the example takes up in a batch."""

    def learned(self, item: Item_contra) -> int:
        """Tokens (or classes) of the example the loss looks at; at least 1."""

    def score(self, model: nn.Module, items: Sequence[Item_contra]) -> Scores:
        """Loss and exactness of every example; gradients flow into the loss."""


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction on the learned tokens of a text."""

    pad_id: int

    def length(self, item: Encoded) -> int:
        """Tokens of the whole text."""
        return len(item.input_ids)

    def learned(self, item: Encoded) -> int:
        """Tokens that are predicted; the first has nothing before it."""
        return item.n_learned

    def score(self, model: nn.Module, items: Sequence[Encoded]) -> Scores:
        """Cross entropy of each learned token given those before it."""
        ids = _padded([i.input_ids for i in items], self.pad_id, model)
        mask = _padded([[1] * len(i.input_ids) for i in items], 0, model)
        labels = _padded([i.labels for i in items], IGNORED, model)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return _token_scores(logits[:, :-1], labels[:, 1:])


@dataclass(frozen=True)
class Seq2Seq:
    """A target sequence given a source sequence, for encoder-decoder models."""

    pad_id: int

    def length(self, item: EncodedPair) -> int:
        """Tokens of source and target together."""
        return len(item.source_ids) + len(item.target_ids)

    def learned(self, item: EncodedPair) -> int:
        """Tokens of the target."""
        return len(item.target_ids)

    def score(self, model: nn.Module, items: Sequence[EncodedPair]) -> Scores:
        """Cross entropy of each target token; the model shifts the labels itself."""
        ids = _padded([i.source_ids for i in items], self.pad_id, model)
        mask = _padded([[1] * len(i.source_ids) for i in items], 0, model)
        labels = _padded([i.target_ids for i in items], IGNORED, model)
        logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
        return _token_scores(logits, labels)


@dataclass(frozen=True)
class SequenceClassification:
    """One class per text, for models with a trained classification head (it stays frozen)."""

    pad_id: int

    def length(self, item: EncodedClass) -> int:
        """Tokens of the text."""
        return len(item.input_ids)

    def learned(self, item: EncodedClass) -> int:  # noqa: ARG002  # every example has one class
        """One class."""
        return 1

    def score(self, model: nn.Module, items: Sequence[EncodedClass]) -> Scores:
        """Cross entropy of the class."""
        ids = _padded([i.input_ids for i in items], self.pad_id, model)
        mask = _padded([[1] * len(i.input_ids) for i in items], 0, model)
        logits = model(input_ids=ids, attention_mask=mask).logits
        classes = torch.tensor([[i.label_index] for i in items], device=logits.device)
        return _token_scores(logits[:, None], classes)


def task_for(model: object, pad_id: int) -> CausalLM | Seq2Seq | SequenceClassification:
    """The task a transformers model was built for, by its class name.

    Raises:
        BadSetting: the model is of another kind (masked, image …); the message names the class.
    """
    match task_type_of(type(model).__name__):
        case "CAUSAL_LM":
            return CausalLM(pad_id)
        case "SEQ_2_SEQ_LM":
            return Seq2Seq(pad_id)
        case "SEQ_CLS":
            return SequenceClassification(pad_id)


def _token_scores(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of ``labels`` ``(batch, length)`` under ``logits`` ``(batch, length, vocabulary)``."""
    flat = logits.float().flatten(0, 1)
    per_token = F.cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=IGNORED)
    return Scores(per_token.view(labels.shape).sum(dim=1), logits, labels)


def _padded(rows: Sequence[Sequence[int]], fill: int, model: nn.Module) -> Tensor:
    longest = max(len(row) for row in rows)
    padded = [[*row, *[fill] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, device=next(model.parameters()).device)
