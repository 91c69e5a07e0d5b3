"""An adapter folded into its base model: an ordinary model that plain transformers loads.

IA3's scales act on a linear layer's output or input, so they are its weight's rows or columns:
``s ⊙ (W x + b) = (s ⊙ W) x + s ⊙ b`` for keys and values, ``W (s ⊙ x) = (W ⊙ s) x`` for the
feed-forward (Liu et al., 2022, §3.3). The 4-bit weights are decoded for it, so the folder is about
four times as large as the base.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.base_model import EXTRA_FILES, BaseModel, load_plain, quiet
from fedia3.adapters.schema import Target
from fedia3.errors import BadAdapter, BadSetting, Conflict, StorageFailed

Dtype = Literal["bfloat16", "float16"]


def write_merged_folder(
    adapter: Adapter, base_folder: Path, out: Path, dtype: Dtype = "bfloat16"
) -> None:
    """Write ``base_folder``'s model with the scales in its weights, tokenizer and papers included.

    Folded in float32 and rounded once to ``dtype``. ``out`` appears whole or not at all.

    Raises:
        BadSetting: there is no such dtype.
        Conflict: ``out`` holds files.
        WrongBaseModel: the adapter is for another base model.
        BadAdapter: it scales other targets, or a layer whose weight another one shares, or a
            weight leaves the range of ``dtype``.
        NotFound, BadInput, Corrupt: the base model cannot be loaded, see ``base_model.load``.
        StorageFailed: the folder cannot be written.
    """
    if dtype not in get_args(Dtype):
        raise BadSetting(f"weights are written as one of {get_args(Dtype)}, got {dtype!r}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise Conflict(f"{out} is not empty; a merged model needs a folder of its own")
    base = load_plain(base_folder)
    base.require(adapter.schema)
    fold(adapter, base.model)
    base.model.to(getattr(torch, dtype))
    _require_finite(base.model, dtype)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
            made = Path(work) / "model"
            _save(base, base_folder, made)
            made.replace(out)
    except OSError as error:
        raise StorageFailed(f"cannot write {out}: {error.strerror or error}") from error


def fold(adapter: Adapter, model: Any) -> None:
    """Multiply the scales into the model's weights and biases, in place.

    ``model`` is of the adapter's base, its linear layers ``nn.Linear`` or GPT-2's ``Conv1D``.

    Raises:
        BadAdapter: a scaled layer shares its weight with another one, which would be scaled too.
    """
    names = list(model.named_parameters(remove_duplicate=False))
    for target in adapter.schema.targets:
        module = model.get_submodule(target.name)
        if sum(parameter is module.weight for _, parameter in names) > 1:
            raise BadAdapter(
                f"{target.name} shares its weight with another layer, so its scales cannot be "
                "folded in; export the PEFT folder instead"
            )
        _fold_target(target, torch.tensor(adapter.scales(target.key)), module)


def _fold_target(target: Target, scales: Tensor, module: Any) -> None:
    weight = module.weight.data  # (out_features, in_features), a view the other way for Conv1D
    weight = weight.T if isinstance(module, Conv1D) else weight
    if target.kind == "ff":
        weight *= scales
        return
    rows = torch.from_numpy(target.part.positions()) if target.part else torch.arange(target.dim)
    weight[rows] *= scales[:, None]
    if module.bias is not None:
        module.bias.data[rows] *= scales


def _require_finite(model: Any, dtype: Dtype) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(cast(Tensor, parameter)).all()):
            raise BadAdapter(f"{name} leaves the range of {dtype} with this adapter; try bfloat16")


def _save(base: BaseModel, base_folder: Path, made: Path) -> None:
    with quiet():
        base.model.save_pretrained(made)
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(made)
    for name in EXTRA_FILES:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, made / name)
