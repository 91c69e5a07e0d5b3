"""People's text, split and encoded for a base model: of everybody, or of a device's one owner."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedia3.adapters.base_model import BaseModel
from fedia3.client.data import BadLine, Dataset, Example, read_jsonl
from fedia3.client.splits import Split, SplitPlan, split
from fedia3.client.tasks import Seq2Seq, SequenceClassification, Task, task_for
from fedia3.client.tokens import (
    chat_renderer,
    encode_all,
    encode_classification,
    encode_pair,
)
from fedia3.client.trainer import ClientExamples
from fedia3.errors import BadData

OWNER = "owner"  # whose text a device holds, whatever its coordinator calls it


@dataclass(frozen=True)
class OwnText:
    """A device's text: what is there, and the sides if there is enough."""

    digest: str  # of what was read; other text has another one
    texts: int
    skipped: tuple[BadLine, ...] = ()
    sides: Split | None = None  # None: too little
    too_little: str | None = None  # why, in words


def read_own(
    path: Path, plan: SplitPlan, base: BaseModel, *, order_field: str | None = None
) -> OwnText:
    """The text of a device's owner, who may be writing it: what is missing or bad is no error.

    Bad lines are left out and listed, as the half-written last line of a growing file is one.
    """
    render = chat_renderer(base.tokenizer)
    try:
        dataset = read_jsonl(
            path, owner=OWNER, order_field=order_field, skip_bad_lines=True, render=render
        )
    except BadData as error:
        return OwnText(digest_of(Dataset({})), 0, too_little=str(error))
    except OSError as error:
        unreadable = f"cannot read {error.filename or path} ({error.strerror})"
        return OwnText(digest_of(Dataset({})), 0, too_little=unreadable)
    texts = dataset.examples[OWNER]
    sides = split(texts, plan, OWNER)
    reason = _too_little(len(texts), sides, plan)
    return OwnText(
        digest=digest_of(dataset),
        texts=len(texts),
        skipped=dataset.skipped,
        sides=None if reason else sides,
        too_little=reason,
    )


def _too_little(texts: int, sides: Split, plan: SplitPlan) -> str | None:
    if texts >= plan.min_examples and sides.train and sides.validation and sides.test:
        return None
    return (
        f"expected at least {plan.min_examples} texts, different enough to hold some out, "
        f"got {texts}"
    )


def encode_sides(sides: Split, base: BaseModel, max_length: int) -> ClientExamples[Any]:
    """The sides as the base reads them; what has nothing to learn within ``max_length`` is gone.

    Raises:
        BadData: the base needs another kind of text: answers, or labels that it knows.
    """
    task = task_for(base.model, base.pad_id)
    return ClientExamples(
        *(
            _items(examples, task, base, max_length)
            for examples in (sides.train, sides.validation, sides.test)
        )
    )


def _items(
    examples: Sequence[Example], task: Task[Any], base: BaseModel, max_length: int
) -> Sequence[Any]:
    if isinstance(task, Seq2Seq):
        return [encode_pair(e, base.tokenizer, max_length) for e in examples]
    if isinstance(task, SequenceClassification):
        names = base.model.config.id2label
        labels = [names[i] for i in sorted(names)]
        return [encode_classification(e, base.tokenizer, labels, max_length) for e in examples]
    return encode_all(examples, base.tokenizer, max_length).items


def digest_of(dataset: Dataset) -> str:
    """sha256 (hex) of who wrote what in which order."""
    content = {
        user: [(e.text, e.learn) for e in theirs] for user, theirs in dataset.examples.items()
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
