"""How two adapters differ: by layer and kind of scales, as numbers and as a picture."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedia3.adapters.adapter import Adapter, Vector, require_same_schema
from fedia3.adapters.schema import KINDS, Kind, Target
from fedia3.errors import BadInput

MOVED = 0.01  # a scale has moved once it changed by more than this share of what it was
MOST_ROWS_WITH_NUMBERS = 48  # of a heat map; beyond them numbers could not be read
PANELS = (  # field, title, unit, lowest and highest (None: of the data), colours
    ("distance", "how far the scales moved", "L2 distance, no unit", 0, None, "viridis"),
    ("moved", "scales that moved by more than 1 %", "share, 0 … 1", 0, 1, "viridis"),
    ("cosine", "direction of the deltas to all-ones", "cosine, −1 … 1", -1, 1, "RdBu"),
)


@dataclass(frozen=True)
class Difference:
    """From one adapter's scales to the other's, within one layer and kind."""

    layer: str  # as "model.layers.3"; a module's own name where it stands in no layer
    kind: Kind
    num_scales: int
    distance: float  # L2
    largest: float  # the largest change of a scale
    cosine: float | None  # between both deltas to all-ones; None where one of them is zero
    moved: float  # share of the scales that changed by more than 1 % of what they were, 0 … 1


def differences(a: Adapter, b: Adapter) -> tuple[Difference, ...]:
    """Every layer and kind in schema order.

    The cosine compares what the two do to the base model: 1 where they turn it the same way, 0
    where they have nothing in common, -1 where one undoes the other.

    Raises:
        WrongBaseModel: the adapters belong to different base models.
        BadAdapter: same base model, other targets.
    """
    require_same_schema(a.schema, b.schema)
    keys: dict[tuple[str, Kind], list[str]] = {}
    for target in a.schema.targets:
        keys.setdefault((_layer_name(target), target.kind), []).append(target.key)
    return tuple(
        _difference(
            layer,
            kind,
            np.concatenate([a.scales(key) for key in together]),
            np.concatenate([b.scales(key) for key in together]),
        )
        for (layer, kind), together in keys.items()
    )


def write_picture(found: Sequence[Difference], path: Path, left: str, right: str) -> None:
    """A PNG of distance, share moved and cosine, layers by kinds; ``left``, ``right``: names.

    Raises:
        BadInput: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import (  # noqa: PLC0415  # half a second of import
        FigureCanvasAgg,
    )
    from matplotlib.figure import Figure  # noqa: PLC0415  # as above

    layers = list(dict.fromkeys(each.layer for each in found))
    kinds = [kind for kind in KINDS if any(each.kind == kind for each in found)]
    figure = Figure(figsize=(13, max(3.6, min(24.0, 2.0 + 0.3 * len(layers)))), dpi=110)
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(PANELS), sharey=True)
    for panel, (name, title, unit, lowest, highest, colours) in zip(panels, PANELS, strict=True):
        values = np.full((len(layers), len(kinds)), np.nan)
        for each in found:
            if (value := getattr(each, name)) is not None:
                values[layers.index(each.layer), kinds.index(each.kind)] = value
        image = panel.imshow(values, aspect="auto", cmap=colours, vmin=lowest, vmax=highest)
        figure.colorbar(image, ax=panel, label=unit)
        panel.set_title(title, fontsize=10)
        panel.set_facecolor("#d0d0d0")  # where there is no value
        panel.set_xticks(range(len(kinds)), kinds)
        panel.set_xlabel("kind of scales")
        if len(layers) <= MOST_ROWS_WITH_NUMBERS:
            _write_numbers(panel, image, values)
    panels[0].set_ylabel("layer")
    panels[0].set_yticks(range(len(layers)), layers, parse_math=False, fontsize=8)
    figure.suptitle(f"from {left} to {right}", fontsize=11, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a user's name in a rare script: boxes
        figure.tight_layout()
        try:
            figure.savefig(path, format="png")
        except OSError as error:
            raise BadInput(f"cannot draw into {path}: {error.strerror}; name another") from error


def _layer_name(target: Target) -> str:
    if target.layer is None:
        return target.name
    stack, number = target.layer
    return f"{stack}.{number}" if stack else str(number)


def _difference(layer: str, kind: Kind, a: Vector, b: Vector) -> Difference:
    before, after = a.astype(np.float64), b.astype(np.float64)
    change = np.abs(after - before)
    return Difference(
        layer=layer,
        kind=kind,
        num_scales=len(a),
        distance=float(np.linalg.norm(change)),
        largest=float(change.max()),
        cosine=_cosine(before - 1, after - 1),
        moved=float(np.mean(change > MOVED * np.abs(before))),
    )


def _cosine(left: Any, right: Any) -> float | None:
    lengths = np.linalg.norm(left), np.linalg.norm(right)
    if not all(lengths):
        return None
    return float(np.clip((left / lengths[0]) @ (right / lengths[1]), -1, 1))


def _write_numbers(panel: Any, image: Any, values: Any) -> None:
    """Each cell's value, in black or white, whichever its colour lets read."""
    for (row, column), value in np.ndenumerate(values):
        is_known = bool(np.isfinite(value))
        red, green, blue, _ = image.cmap(image.norm(value)) if is_known else (1, 1, 1, 1)
        colour = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
        text = f"{value:#.2g}" if is_known else "–"
        panel.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
