"""Let a base model write in its user's manner."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.bank import IA3Bank
from fedia3.adapters.base_model import BaseModel
from fedia3.errors import BadSetting


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the likeliest."""

    max_new_tokens: int = 40
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise BadSetting(f"max_new_tokens is at least 1, got {self.max_new_tokens}")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise BadSetting(
                "temperature is at least 0 and top_p lies in (0, 1], "
                f"got {self.temperature} and {self.top_p}"
            )


def generate(base: BaseModel, adapter: Adapter, prompt: str, sampling: Sampling) -> str:
    """The model's continuation of ``prompt`` under ``adapter``; the prompt is not repeated.

    Raises:
        WrongBaseModel: the adapter belongs to another base.
        BadSetting: the base is no text-generating model, or needs a prompt and got none.
    """
    base.require(adapter.schema)
    if not base.model.can_generate():
        raise BadSetting(f"{base.manifest.name} does not generate text")
    inputs = _inputs(base, prompt)
    bank = IA3Bank(base.model, base.schema)
    bank.load([adapter.vector])
    torch.manual_seed(sampling.seed)
    try:
        with torch.inference_mode(), bank.using(torch.tensor([0])):
            written = base.model.generate(**inputs, **_options(base, sampling))
    finally:
        bank.detach()
    return _text(base, inputs["input_ids"][0], written[0])


def _inputs(base: BaseModel, prompt: str) -> dict[str, Tensor]:
    ids: Sequence[int] = base.tokenizer(
        prompt, add_special_tokens=False, split_special_tokens=True
    ).input_ids
    if not base.model.config.is_encoder_decoder and base.tokenizer.bos_token_id is not None:
        ids = [base.tokenizer.bos_token_id, *ids]
    if not ids:
        raise BadSetting(f"{base.manifest.name} needs a prompt of at least one character")
    tokens = torch.tensor([ids], device=base.model.device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _options(base: BaseModel, sampling: Sampling) -> dict[str, Any]:
    shared = {"max_new_tokens": sampling.max_new_tokens, "pad_token_id": base.pad_id}
    if sampling.temperature == 0:
        return {**shared, "do_sample": False}
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    return {**shared, **drawn, "top_k": 0}


def _text(base: BaseModel, prompt: Tensor, written: Tensor) -> str:
    """The new text: what the whole says beyond the prompt, so that no space is lost between.

    Where the prompt reads otherwise inside the whole (it ended within a character), the new
    tokens' own text.
    """
    whole, before, new = (
        str(base.tokenizer.decode(tokens, skip_special_tokens=True))
        for tokens in (written, prompt, written[len(prompt) :])
    )
    if base.model.config.is_encoder_decoder:
        return whole
    return whole[len(before) :] if whole.startswith(before) else new
