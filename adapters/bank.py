"""The IA3 bank: many adapters on one frozen model, a row of scales per example.

One row is a device training for its owner, many rows are a simulated cohort in one
forward/backward, many rows without gradient are many users answered in one batch. IA3 (Liu et
al., 2022) acts elementwise, so gradients of different rows never mix and one batch of many rows
equals every row alone (docs/adr/0003).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.schema import Schema
from fedia3.adapters.targets import features
from fedia3.errors import BadAdapter, BadTargets


class IA3Bank(nn.Module):
    """Stacked adapters ``scales[rows, n_params]`` (float32) attached to a frozen model.

    The model keeps its modules; forward hooks multiply. Outside :meth:`using` it is the bare base
    model, bit for bit. Use :meth:`detach` to take the hooks off again.

    Raises:
        BadTargets: the schema names a module the model lacks, or whose width differs.
    """

    scales: nn.Parameter

    def __init__(self, model: nn.Module, schema: Schema, rows: int = 1) -> None:
        super().__init__()
        self.schema = schema
        self._active: dict[str, Tensor] | None = None
        self._positions = {
            t.key: torch.from_numpy(t.part.positions()) for t in schema.targets if t.part
        }
        device = next(model.parameters()).device
        self.scales = nn.Parameter(torch.ones(rows, schema.n_params, device=device))
        self._handles = list(self._attach(model))

    def _attach(self, model: nn.Module) -> Iterator[RemovableHandle]:
        modules = dict(model.named_modules())
        for name, kinds in _kinds_by_module(self.schema).items():
            if name not in modules:
                raise BadTargets(f"the schema scales {name}, which this model does not have")
            self._check_width(name, modules[name])
            if "ff" in kinds:
                yield modules[name].register_forward_pre_hook(self._scale_input(name))
            else:
                yield modules[name].register_forward_hook(self._scale_output(name))

    def _check_width(self, name: str, module: nn.Module) -> None:
        wide_in, wide_out = features(module)
        for target in self.schema.targets:
            if target.name != name:
                continue
            expected = target.part.total if target.part else target.dim
            actual = wide_in if target.kind == "ff" else wide_out
            if expected != actual:
                raise BadTargets(
                    f"the schema's {target.key} is {expected} wide, the model's is {actual}"
                )

    def _scale_input(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._active is None:
                return None
            return (_times(args[0], self._active[name]), *args[1:])

        return hook

    def _scale_output(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._active is None:
                return None
            return _times(output, self._active[name])

        return hook

    @contextmanager
    def using(self, rows: Tensor) -> Iterator[None]:
        """Let example ``i`` of every batch inside be scaled by row ``rows[i]``.

        ``rows`` is an integer tensor ``(batch,)``, or ``(1,)`` for one row whatever the batch.
        Backward of a gradient-checkpointed model must run inside as well.
        """
        picked = self.scales[rows.to(self.scales.device)]  # one gather: (batch, n_params)
        pieces = dict(
            zip(self.schema.slices, torch.split(picked, list(self.schema.dims), dim=1), strict=True)
        )
        previous, self._active = self._active, self._by_module(pieces)
        try:
            yield
        finally:
            self._active = previous

    def _by_module(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scales each module needs ``(batch, width)``; ones at a fused output's queries."""
        by_module: dict[str, Tensor] = {}
        for target in self.schema.targets:
            piece = pieces[target.key]
            if target.part is None:
                by_module[target.name] = piece
                continue
            whole = by_module.get(target.name)
            if whole is None:
                whole = piece.new_ones(piece.shape[0], target.part.total)
            positions = self._positions[target.key].to(piece.device)
            by_module[target.name] = whole.index_copy(1, positions, piece)
        return by_module

    def load(self, vectors: Sequence[NDArray[np.float32]]) -> None:
        """Make the bank these adapters, row by row; each ``(n_params,)``.

        Raises:
            BadAdapter: a vector has the wrong length.
        """
        wrong = [v.shape for v in vectors if v.shape != (self.schema.n_params,)]
        if wrong or not vectors:
            raise BadAdapter(
                f"expected vectors of {self.schema.n_params} scales, got {wrong or 'none'}"
            )
        stacked = torch.from_numpy(np.stack(vectors).astype(np.float32))
        self.scales = nn.Parameter(stacked.to(self.scales.device))

    def adapter(self, row: int) -> Adapter:
        """A row as a value."""
        return Adapter(self.schema, self.scales[row].detach().cpu().numpy())

    def detach(self) -> None:
        """Take the hooks off the model, which is the bare base again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _kinds_by_module(schema: Schema) -> dict[str, set[str]]:
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    for target in schema.targets:
        kinds[target.name].add(target.kind)
    return kinds


def _times(activation: Tensor, scale: Tensor) -> Tensor:
    """``activation`` ``(batch, …, width)`` times ``scale`` ``(batch or 1, width)``."""
    if scale.shape[0] not in (1, activation.shape[0]):
        raise BadAdapter(
            f"{scale.shape[0]} rows chosen for a batch of {activation.shape[0]} examples; "
            "give one row per example, or a single one"
        )
    middle = (1,) * (activation.dim() - 2)
    # a + a (s - 1): a scale's distance from one survives bfloat16, where 1.003 itself would be 1.
    beyond_one = (scale - 1).to(activation.dtype).view(scale.shape[0], *middle, scale.shape[-1])
    return torch.addcmul(activation, activation, beyond_one)
