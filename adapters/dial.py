"""The dial between two adapters: one number, or one for each kind of scales or range of layers.

As people write it:

    0.5                              half of the way, everywhere
    k=1,v=0.5,ff=0                   by kind: keys whole, values half, feed-forward not at all
    layer:0-3=1,layer:4-7=0.2        by layer, both ends counted; ``layer:4=0.2`` is a single one

0 is the first adapter (the global one), 1 the second (the user's own); below 0 and above 1 it goes
on along the same line.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedia3.adapters.schema import KINDS, Kind, Schema, Target
from fedia3.errors import BadSetting

FORMS = "expected 0.5, k=1,v=0.5,ff=0 or layer:0-3=1,layer:4-7=0.2"

_LAYERS = re.compile(r"layer:(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)


@dataclass(frozen=True)
class Dial:
    """One number for each kind of scales, or for each range of layers.

    Where a model has several stacks, as T5's encoder and decoder, a layer's number means that
    layer of each.

    Raises:
        BadSetting: a number is not finite, kinds and layers are mixed, or one has two numbers.
    """

    parts: tuple[tuple[Kind | range, float], ...]

    def __post_init__(self) -> None:
        for where, alpha in self.parts:
            if not math.isfinite(alpha):
                raise BadSetting(f"a dial's numbers are finite, got {_named(where)}={alpha}")
        if not self.parts or len({type(where) for where, _ in self.parts}) > 1:
            raise BadSetting(f"a dial goes by kind or by layer, got {str(self)!r}; {FORMS}")
        twice = [name for name, times in Counter(self._covered()).items() if times > 1]
        if twice:
            raise BadSetting(f"{str(self)!r} gives {_listed(twice)} several numbers; one each")

    def __str__(self) -> str:
        return ",".join(f"{_named(where)}={alpha:g}" for where, alpha in self.parts)

    def values(self, schema: Schema) -> NDArray[np.float64]:
        """The number of every scale, ``(n_params,)``.

        Raises:
            BadSetting: a kind or layer of the schema has no number, or one that has is not there.
        """
        names = [self._name(target) for target in schema.targets]
        missing, extra = set(names) - set(self._covered()), set(self._covered()) - set(names)
        if missing or extra:
            raise BadSetting(
                f"the adapter has {_listed(set(names))}, the dial {str(self)!r} names "
                f"{_listed(set(self._covered()))}; give each of them a number, and no other"
            )
        return np.repeat([self._of(target) for target in schema.targets], schema.dims)

    def _covered(self) -> list[Kind | int]:
        return [
            name
            for where, _ in self.parts
            for name in (where if isinstance(where, range) else (where,))
        ]

    def _name(self, target: Target) -> Kind | int:
        """What the dial calls the target: its kind, or its layer's number."""
        if not isinstance(self.parts[0][0], range):
            return target.kind
        if target.layer is None:
            raise BadSetting(f"{target.name} stands in no layer; dial by kind, as k=1,v=0.5,ff=0")
        return target.layer[1]

    def _of(self, target: Target) -> float:
        name = self._name(target)
        return next(
            alpha
            for where, alpha in self.parts
            if (name in where if isinstance(where, range) else name == where)
        )


Alpha = float | Dial


def parse_alpha(text: str) -> Alpha:
    """A dial as people write it; see the module's head.

    Raises:
        BadSetting: it is none of the three forms.
    """
    if "=" not in text:
        return require_finite(_number(text, text))
    return Dial(tuple(_part(part.strip(), text) for part in text.split(",")))


def alpha_values(alpha: Alpha, schema: Schema) -> NDArray[np.float64]:
    """The number of every scale, ``(n_params,)``.

    Raises:
        BadSetting: the number is not finite, or the dial does not fit the schema.
    """
    if isinstance(alpha, Dial):
        return alpha.values(schema)
    return np.full(schema.n_params, require_finite(alpha), dtype=np.float64)


def require_finite(alpha: float) -> float:
    """The number itself, once it is one.

    Raises:
        BadSetting: it is NaN or infinite.
    """
    if not math.isfinite(alpha):
        raise BadSetting(f"alpha is a finite number, got {alpha}")
    return alpha


def _part(part: str, text: str) -> tuple[Kind | range, float]:
    where, _, number = part.partition("=")
    alpha = _number(number, text)
    for kind in KINDS:
        if where == kind:
            return kind, alpha
    layers = _LAYERS.fullmatch(where)
    if layers is None:
        raise BadSetting(f"cannot read {part!r} of the dial {text!r}; {FORMS}")
    first, last = int(layers[1]), int(layers[2] or layers[1])
    if last < first:
        raise BadSetting(f"layers ascend, got {where!r}; write layer:{last}-{first}")
    return range(first, last + 1), alpha


def _number(number: str, text: str) -> float:
    try:
        return float(number)
    except ValueError as error:
        raise BadSetting(f"cannot read {number!r} of the dial {text!r}; {FORMS}") from error


def _named(where: Kind | range | int) -> str:
    if isinstance(where, range):
        return f"layer:{where.start}-{where.stop - 1}" if len(where) > 1 else f"layer:{where.start}"
    return f"layer:{where}" if isinstance(where, int) else where


def _listed(names: "set[Kind | int] | list[Kind | int]") -> str:
    """Layers as ranges, kinds one by one."""
    layers = sorted(name for name in names if isinstance(name, int))
    starts = [n for n in layers if n - 1 not in layers]
    ends = [n for n in layers if n + 1 not in layers]
    ranges = [range(start, end + 1) for start, end in zip(starts, ends, strict=True)]
    return ", ".join(map(_named, [*ranges, *sorted(n for n in names if isinstance(n, str))]))
