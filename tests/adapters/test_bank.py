"""One bank: a device, a cohort, many users answered together."""

from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.bank import IA3Bank
from fedia3.adapters.base_model import BaseModel, load
from fedia3.adapters.base_store import SHIPPED
from fedia3.adapters.schema import Schema, Target
from fedia3.adapters.targets import ARCHITECTURES, find_targets
from fedia3.errors import BadAdapter, BadTargets
from fedia3.testing import tiny_model

BATCH = 3
FUSED = {"gpt2", "falcon", "phi3"}


def _inputs(architecture: str, batch: int = BATCH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    if architecture == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 99, (batch, 6), generator=generator)
    if architecture == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    return {"input_ids": ids}


def _schema(model: torch.nn.Module) -> Schema:
    return Schema("0" * 64, find_targets(model))


def _vector(schema: Schema, seed: int = 1) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).uniform(0.5, 1.5, schema.n_params).astype(np.float32)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_ones_leave_the_logits_bit_identical(architecture: str) -> None:
    """A bank of ones is exactly the bare base model."""
    model = tiny_model(architecture)
    bare = model(**_inputs(architecture)).logits
    bank = IA3Bank(model, _schema(model), rows=BATCH)
    with bank.using(torch.arange(BATCH)):
        assert torch.equal(model(**_inputs(architecture)).logits, bare)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_outside_using_the_model_is_the_bare_base(architecture: str) -> None:
    """Hooks act only inside ``using``, and are gone after ``detach``."""
    model = tiny_model(architecture)
    bare = model(**_inputs(architecture)).logits
    bank = IA3Bank(model, _schema(model))
    bank.load([_vector(bank.schema)])
    assert torch.equal(model(**_inputs(architecture)).logits, bare)
    bank.detach()
    with bank.using(torch.tensor([0])):
        assert torch.equal(model(**_inputs(architecture)).logits, bare)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - FUSED))
def test_one_row_agrees_with_peft(architecture: str) -> None:
    """Logits and gradients of one row equal PEFT's IA3 on the same model, fp32, 1e-5 relative."""
    model = tiny_model(architecture)
    schema = _schema(model)
    vector = _vector(schema)
    bank = IA3Bank(model, schema)
    bank.load([vector])
    with bank.using(torch.tensor([0])):
        ours = model(**_inputs(architecture)).logits
        ours.square().mean().backward()
    assert bank.scales.grad is not None

    names = [t.name for t in schema.targets]
    theirs = peft.get_peft_model(
        tiny_model(architecture),
        peft.IA3Config(
            target_modules=names,
            feedforward_modules=[t.name for t in schema.targets if t.kind == "ff"],
        ),
    )
    parameters = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    for target in schema.targets:
        parameter = parameters[f"base_model.model.{target.name}.ia3_l.default"]
        piece = torch.from_numpy(vector[schema.slices[target.key]])
        parameter.data = piece.view(parameter.shape).clone()
    logits = theirs.base_model.model(**_inputs(architecture)).logits
    logits.square().mean().backward()
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-6)
    for target in schema.targets:
        gradient = parameters[f"base_model.model.{target.name}.ia3_l.default"].grad
        assert gradient is not None
        torch.testing.assert_close(
            bank.scales.grad[0, schema.slices[target.key]], gradient.ravel(), rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("architecture", sorted(FUSED))
def test_fused_projections_scale_keys_and_values_only(architecture: str) -> None:
    """Scaling a fused k/v slice equals scaling those rows of the fused weight, queries left."""
    model = tiny_model(architecture)
    schema = _schema(model)
    vector = _vector(schema)
    bank = IA3Bank(model, schema)
    bank.load([vector])
    with bank.using(torch.tensor([0])):
        scaled = model(**_inputs(architecture)).logits

    merged: Any = tiny_model(architecture)
    for target in schema.targets:
        module: Any = merged.get_submodule(target.name)
        scale = torch.from_numpy(vector[schema.slices[target.key]])
        weight = module.weight.data.T if architecture == "gpt2" else module.weight.data
        if target.part is None:
            weight *= scale  # feed-forward: input columns
        else:
            positions = torch.from_numpy(target.part.positions())
            weight[positions] *= scale[:, None]
            if module.bias is not None:
                module.bias.data[positions] *= scale
    torch.testing.assert_close(scaled, merged(**_inputs(architecture)).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_rows_of_one_batch_equal_each_row_alone(architecture: str) -> None:
    """Example i, scaled by its row in a mixed batch, has the logits and gradient it has alone."""
    model = tiny_model(architecture)
    schema = _schema(model)
    vectors = [_vector(schema, seed) for seed in range(BATCH)]
    inputs = _inputs(architecture)
    bank = IA3Bank(model, schema)
    bank.load(vectors)
    with bank.using(torch.arange(BATCH)):
        together = model(**inputs).logits
        together.square().mean(dim=tuple(range(1, together.dim()))).sum().backward()
    gradients = bank.scales.grad
    assert gradients is not None
    for row, vector in enumerate(vectors):
        bank.load([vector])
        with bank.using(torch.tensor([0])):
            alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits
            alone.square().mean().backward()
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
        assert bank.scales.grad is not None
        torch.testing.assert_close(gradients[row], bank.scales.grad[0], rtol=1e-4, atol=1e-6)


def test_a_row_without_examples_has_no_gradient() -> None:
    """Rows that no example names are not touched."""
    model = tiny_model("llama")
    bank = IA3Bank(model, _schema(model), rows=2)
    with bank.using(torch.zeros(BATCH, dtype=torch.long)):
        model(**_inputs("llama")).logits.sum().backward()
    assert bank.scales.grad is not None
    assert bank.scales.grad[0].abs().sum() > 0
    assert bank.scales.grad[1].abs().sum() == 0


def test_a_bfloat16_model_feels_small_scales() -> None:
    """1.003 is 1 in bfloat16; the scale itself is not rounded, so the logits move."""
    model = tiny_model("llama").to(torch.bfloat16)
    bare = model(**_inputs("llama")).logits
    bank = IA3Bank(model, _schema(model))
    bank.load([np.full(bank.schema.n_params, 1.003, dtype=np.float32)])
    with bank.using(torch.tensor([0])):
        scaled = model(**_inputs("llama")).logits
    assert scaled.dtype == bare.dtype
    assert not torch.equal(scaled, bare)


def test_the_frozen_model_gets_no_gradient() -> None:
    """Only the bank learns."""
    model = tiny_model("llama").requires_grad_(False)
    bank = IA3Bank(model, _schema(model))
    with bank.using(torch.tensor([0])):
        model(**_inputs("llama")).logits.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert bank.scales.grad is not None


def test_a_row_comes_back_as_it_was_loaded() -> None:
    """``adapter(row)`` is the value that was loaded into the row."""
    model = tiny_model("gpt2")
    schema = _schema(model)
    bank = IA3Bank(model, schema)
    bank.load([_vector(schema, 1), _vector(schema, 2)])
    assert bank.adapter(1) == Adapter(schema, _vector(schema, 2))


def test_a_batch_of_another_size_than_the_rows_is_an_error() -> None:
    """Two rows for three examples: somebody would get somebody else's scales."""
    model = tiny_model("llama")
    bank = IA3Bank(model, _schema(model), rows=2)
    with bank.using(torch.tensor([0, 1])), pytest.raises(BadAdapter, match=r"2 rows.*3 examples"):
        model(**_inputs("llama"))


def test_a_vector_of_the_wrong_length_is_an_error() -> None:
    """Too short is said, with both lengths."""
    model = tiny_model("llama")
    bank = IA3Bank(model, _schema(model))
    with pytest.raises(BadAdapter, match=str(bank.schema.n_params)):
        bank.load([np.ones(5, dtype=np.float32)])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("model.layers.9.mlp.down_proj", "ff", 64), "does not have"),
        (Target("model.layers.0.mlp.down_proj", "ff", 63), "63 wide, the model's is 64"),
    ],
)
def test_a_schema_of_another_model_is_an_error(target: Target, message: str) -> None:
    """A module that is absent or has another width is named."""
    with pytest.raises(BadTargets, match=message):
        IA3Bank(tiny_model("llama"), Schema("0" * 64, (target,)))


@pytest.fixture(scope="module")
def four_bit() -> BaseModel:
    """The shipped base with its linear layers left to bitsandbytes."""
    return load(SHIPPED / "tiny", memory_budget=0)


def test_ones_leave_a_4bit_models_logits_bit_identical(four_bit: BaseModel) -> None:
    """Hooks on bitsandbytes' Linear4bit change nothing either."""
    ids = torch.arange(3, 27).view(2, 12)
    bare = four_bit.model(input_ids=ids).logits
    bank = IA3Bank(four_bit.model, four_bit.schema, rows=2)
    with bank.using(torch.arange(2)):
        scaled = four_bit.model(input_ids=ids).logits
    bank.detach()
    assert torch.equal(scaled, bare)


def test_a_4bit_models_gradient_is_that_of_its_decoded_weights(four_bit: BaseModel) -> None:
    """4-bit bfloat16 and decoded float32 pull the scales the same way: cosine above 0.99."""
    gradients = []
    for base in (four_bit, load(SHIPPED / "tiny")):
        bank = IA3Bank(base.model, base.schema)
        ids = torch.arange(3, 27).view(2, 12)
        with bank.using(torch.tensor([0])):
            logits = base.model(input_ids=ids).logits.float()
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            ).backward()
        bank.detach()
        assert bank.scales.grad is not None
        gradients.append(bank.scales.grad[0])
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
