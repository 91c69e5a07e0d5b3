"""The shape of an adapter: which modules of which base model are scaled, and in what order.

One adapter is one flat float32 vector; the schema says where each module's scales lie in it.
Convention as in IA3 (Liu et al., 2022, §3.3) and PEFT: scales of keys and values act on the
projection's output, scales of the feed-forward act on the down projection's input.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedia3.errors import BadAdapter

Kind = Literal["k", "v", "ff"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_LAYER = re.compile(r"(?:^|(.*?)\.)(\d{1,6})(?:\.|$)", re.ASCII)


@dataclass(frozen=True)
class Part:
    """The slice of a fused projection's output that belongs to its keys or its values.

    The slice is every ``stride`` positions, from ``first`` on, a run of ``width`` positions, in an
    output of ``total``: one run for GPT-2's ``c_attn``, one per head group for Falcon.
    """

    first: int
    width: int
    stride: int
    total: int

    def positions(self) -> NDArray[np.int64]:
        """Indices into the fused output, ascending, shape ``(dim,)``."""
        starts = np.arange(self.first, self.total, self.stride)
        return (starts[:, None] + np.arange(self.width)).ravel()


@dataclass(frozen=True)
class Target:
    """One scaled module: its path in the transformers model, what it is, how many scales."""

    name: str
    kind: Kind
    dim: int
    part: Part | None = None  # set where keys and values share one projection

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadAdapter(f"target {self.name}: kind is one of {KINDS}, got {self.kind!r}")
        if self.dim < 1:
            raise BadAdapter(f"target {self.name}: dim is at least 1, got {self.dim}")
        if self.part is not None and len(self.part.positions()) != self.dim:
            raise BadAdapter(f"target {self.name}: its part does not hold {self.dim} positions")

    @property
    def key(self) -> str:
        """The tensor's name in our files; unique in a schema, fused keys and values apart."""
        return f"{self.name}.{self.kind}"

    @property
    def layer(self) -> tuple[str, int] | None:
        """Its stack and its number there, as ``("model.layers", 3)``; None outside of layers."""
        found = _LAYER.match(self.name)
        return (found[1] or "", int(found[2])) if found else None


@dataclass(frozen=True)
class Schema:
    """The targets of one base model in fixed order.

    ``base_digest`` is the sha256 (hex) of the base model's manifest: adapters of two bases never
    mix, even where their shapes agree.
    """

    base_digest: str
    targets: tuple[Target, ...]

    def __post_init__(self) -> None:
        if not self.targets:
            raise BadAdapter("a schema needs at least one target")
        keys = [t.key for t in self.targets]
        if len(set(keys)) != len(keys):
            raise BadAdapter("a schema names no target twice")

    @cached_property
    def n_params(self) -> int:
        """Length of the flat vector."""
        return sum(t.dim for t in self.targets)

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """How many scales each target has, in order."""
        return tuple(t.dim for t in self.targets)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each target's scales lie in the flat vector, by :attr:`Target.key`."""
        ends = np.cumsum(self.dims).tolist()
        return {t.key: slice(end - t.dim, end) for t, end in zip(self.targets, ends, strict=True)}

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON form; sent beside every vector on the wire."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Schema":
        """Read :meth:`to_json`'s form.

        Raises:
            BadAdapter: the text is not a schema.
        """
        try:
            return cls._from_fields(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadAdapter(f"not an adapter schema: {error}") from error

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> "Schema":
        targets = tuple(
            Target(
                name=str(t["name"]),
                kind=t["kind"],
                dim=int(t["dim"]),
                part=Part(**t["part"]) if t.get("part") else None,
            )
            for t in fields["targets"]
        )
        return cls(base_digest=str(fields["base_digest"]), targets=targets)
