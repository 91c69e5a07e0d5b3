"""A base model writes on, under somebody's adapter."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.base_model import BaseModel
from fedia3.client.generation import Sampling, generate
from fedia3.errors import BadAdapter, BadSetting, WrongBaseModel

GREEDY = Sampling(max_new_tokens=8, temperature=0)


def written_by_transformers(base: BaseModel, ids: list[int]) -> str:
    """What transformers' own greedy search appends to these tokens."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        whole = base.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=8,
            do_sample=False,
        )
    return str(base.tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True))


def bytes_of(base: BaseModel, text: str) -> list[int]:
    """ASCII text behind the begin token, a token a byte, found in the vocabulary by hand."""
    return [0, *base.tokenizer.convert_tokens_to_ids([c.replace(" ", "Ġ") for c in text])]


def random_adapter(base: BaseModel) -> Adapter:
    """Scales far from one."""
    noise = np.random.default_rng(1).normal(1, 2, base.schema.n_params)
    return Adapter(base.schema, noise.astype(np.float32))


def test_ones_write_what_the_base_model_writes(toy: BaseModel):
    """
    Greedy, under the adapter that changes nothing: transformers' own text, without the prompt.
    """
    expected = written_by_transformers(toy, bytes_of(toy, "to be"))
    assert generate(toy, Adapter.ones(toy.schema), "to be", GREEDY) == expected != ""


def test_control_tokens_in_a_prompt_stay_text(toy: BaseModel):
    """
    "</s>" is four characters when somebody types it, not the end of the text.
    """
    prompt = "a</s> b"
    ids = bytes_of(toy, prompt)
    assert len(ids) == 8 and ids.count(1) == 0
    written = generate(toy, Adapter.ones(toy.schema), prompt, GREEDY)
    assert written == written_by_transformers(toy, ids)


def test_an_adapter_writes_otherwise(toy: BaseModel):
    """
    Scales far from one change the greedy text.
    """
    plain = generate(toy, Adapter.ones(toy.schema), "to be", GREEDY)
    assert generate(toy, random_adapter(toy), "to be", GREEDY) != plain


def test_the_base_model_is_left_as_it_was(toy: BaseModel):
    """
    After an adapter wrote, ones write what they wrote before.
    """
    ones = Adapter.ones(toy.schema)
    before = generate(toy, ones, "to be", GREEDY)
    generate(toy, random_adapter(toy), "to be", GREEDY)
    assert generate(toy, ones, "to be", GREEDY) == before


def test_an_empty_prompt_begins_a_text(toy: BaseModel):
    """
    The begin token alone is prompt enough.
    """
    written = generate(toy, Adapter.ones(toy.schema), "", GREEDY)
    assert written == written_by_transformers(toy, [0])


def test_the_seed_draws_the_text(toy: BaseModel):
    """
    The same seed gives the same text; of three more seeds one at least gives another.
    """
    texts = [
        generate(
            toy, Adapter.ones(toy.schema), "a", Sampling(max_new_tokens=8, temperature=1.0, seed=n)
        )
        for n in (0, 0, 1, 2, 3)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_a_prompt_that_decodes_otherwise_is_not_repeated(toy: BaseModel):
    """
    A tokenizer whose decoding changes the prompt (here: its case) still yields only the new text.
    """
    shouting = replace(toy, tokenizer=Shouting(toy.tokenizer))
    expected = written_by_transformers(toy, bytes_of(toy, "to be")).upper()
    assert generate(shouting, Adapter.ones(toy.schema), "to be", GREEDY) == expected


class Shouting:
    """Decodes everything to capitals."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.tokenizer(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def decode(self, *args: Any, **options: Any) -> str:
        return str(self.tokenizer.decode(*args, **options)).upper()


def test_another_bases_adapter_is_refused(toy: BaseModel):
    """
    Same shapes, another digest: the message names both base models.
    """
    other = Adapter.ones(replace(toy.schema, base_digest="0" * 64))
    with pytest.raises(WrongBaseModel, match=f"000000000000.*{toy.digest[:12]}"):
        generate(toy, other, "to be", GREEDY)


def test_other_targets_of_the_same_base_are_refused(toy: BaseModel):
    """
    An adapter of only the first target does not fit the bank.
    """
    fewer = replace(toy.schema, targets=toy.schema.targets[:1])
    with pytest.raises(BadAdapter, match="other targets"):
        generate(toy, Adapter.ones(fewer), "to be", GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is at least 1, got 0"),
        ({"temperature": -1.0}, "got -1.0"),
        ({"temperature": float("nan")}, "got nan"),
        ({"top_p": 0.0}, "top_p lies in"),
        ({"top_p": 1.5}, "top_p lies in"),
    ],
)
def test_sampling_has_bounds(options: dict[str, Any], message: str):
    """
    Nothing to write, colder than greedy, or a share outside (0, 1].
    """
    with pytest.raises(BadSetting, match=message):
        Sampling(**options)
