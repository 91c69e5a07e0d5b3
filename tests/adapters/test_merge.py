"""An adapter folded into its base, checked against the bank on the decoded base."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.bank import IA3Bank
from fedia3.adapters.base_model import load, load_plain, quiet
from fedia3.adapters.manifest import read_manifest
from fedia3.adapters.merge import Dtype, fold, write_merged_folder
from fedia3.adapters.schema import Schema, Target
from fedia3.errors import BadAdapter, BadSetting, Conflict, WrongBaseModel
from fedia3.testing import tiny_base

TOKENS = torch.arange(3, 27).view(2, 12)  # two texts of twelve tokens
ARCHITECTURES = ("llama", "gpt2", "phi3", "falcon", "t5", "bert", "qwen2")


def some_adapter(schema: Schema) -> Adapter:
    """Scales between a half and two, all different."""
    return Adapter(schema, np.random.default_rng(0).uniform(0.5, 2, schema.n_params))


def logits(model: Any) -> NDArray[np.float32]:
    """The model's answer to two texts, in float32."""
    given = {"labels": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return cast(NDArray[np.float32], model(input_ids=TOKENS, **given).logits.float().numpy())


def through_the_bank(folder: Path) -> NDArray[np.float32]:
    """What the base model answers under the adapter, as it is trained and served."""
    base = load(folder)
    bank = IA3Bank(base.model, base.schema)
    bank.load([some_adapter(base.schema).vector])
    with bank.using(torch.tensor([0])):
        return logits(base.model)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 4-bit base of each kind of layers: separate, fused, Conv1D, with biases."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_base(folder, request.param)
    return folder


def test_folded_weights_compute_what_the_bank_computes(base_folder: Path):
    """In float32 the two differ by rounding alone, and both from the bare base."""
    plain = load_plain(base_folder)
    bare = logits(plain.model)
    fold(some_adapter(plain.schema), plain.model)
    expected = through_the_bank(base_folder)
    np.testing.assert_allclose(logits(plain.model), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(bare - expected).max() > 100 * np.abs(logits(plain.model) - expected).max()


@pytest.mark.parametrize(("dtype", "rounding"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_plain_transformers_loads_the_merged_folder(
    dtype: Dtype, rounding: float, base_folder: Path, tmp_path: Path
):
    """Every weight is the folded one, rounded once; the answers are the bank's within rounding."""
    manifest = read_manifest(base_folder)
    folded = load_plain(base_folder)
    write_merged_folder(some_adapter(folded.schema), base_folder, tmp_path / "merged", dtype)
    with quiet():
        kind = getattr(transformers, manifest.created_from.architecture)
        merged = kind.from_pretrained(tmp_path / "merged", dtype="auto", local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.dtype == getattr(torch, dtype)
    fold(some_adapter(folded.schema), folded.model)
    weights = merged.state_dict()
    for name, exact in folded.model.state_dict().items():
        assert torch.equal(weights[name].float(), exact.to(merged.dtype).float()), name
    expected = through_the_bank(base_folder)
    # A dozen layers round a weight and a sum each; an error of a scale would be of the size of one.
    tolerance = 24 * rounding * float(np.abs(expected).max())
    np.testing.assert_allclose(logits(merged.float().eval()), expected, atol=tolerance)
    assert tokenizer("hi").input_ids == folded.tokenizer("hi").input_ids
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_folder_with_something_in_it_is_left_alone(toy_folder: Path, tmp_path: Path):
    """--out with somebody's own file in it."""
    (tmp_path / "thesis.txt").write_text("mine")
    adapter = some_adapter(load_plain(toy_folder).schema)
    with pytest.raises(Conflict, match="not empty"):
        write_merged_folder(adapter, toy_folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_bases_adapter_is_not_folded_in(toy_folder: Path, tmp_path: Path):
    """Nor one of other targets; nothing is written."""
    schema = load_plain(toy_folder).schema
    for error, wrong in (
        (WrongBaseModel, Schema("f" * 64, schema.targets)),
        (BadAdapter, Schema(schema.base_digest, schema.targets[:2])),
    ):
        with pytest.raises(error):
            write_merged_folder(Adapter.ones(wrong), toy_folder, tmp_path / "merged")
    with pytest.raises(BadSetting, match="'int4'"):
        write_merged_folder(Adapter.ones(schema), toy_folder, tmp_path / "m", cast(Dtype, "int4"))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_float16_cannot_hold_are_refused(toy_folder: Path, tmp_path: Path):
    """A scale of a hundred million is out of its range, and in that of bfloat16."""
    schema = load_plain(toy_folder).schema
    huge = Adapter(schema, np.full(schema.n_params, 1e8, np.float32))
    with pytest.raises(BadAdapter, match="range of float16"):
        write_merged_folder(huge, toy_folder, tmp_path / "merged", "float16")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_two_layers_share_is_not_scaled_for_both():
    """The head is the embedding's weight turned around: scaling it would change the input too."""

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(2, 2)
            self.head = torch.nn.Linear(2, 2)
            self.head.weight = self.embedding.weight

    with pytest.raises(BadAdapter, match="head shares its weight"):
        fold(Adapter.ones(Schema("b", (Target("head", "k", 2),))), Tied())
