"""Arithmetic on adapters: the difference that travels, the mean of a cohort, a way between two."""

from collections.abc import Iterable

import numpy as np

from fedia3.adapters.adapter import Adapter, Vector, checked_vector, require_same_schema
from fedia3.errors import BadAdapter, BadInput


def subtract(after: Adapter, before: Adapter) -> Vector:
    """The delta ``(n_params,)`` that training made: ``add(before, delta)`` is ``after``.

    Raises:
        WrongBaseModel: the adapters belong to different base models.
        BadAdapter: same base model, other targets.
    """
    require_same_schema(after.schema, before.schema)
    return after.vector - before.vector


def add(adapter: Adapter, delta: Vector) -> Adapter:
    """The adapter moved by ``delta`` ``(n_params,)``.

    Raises:
        BadAdapter: the delta has another length, or the sum is not finite.
    """
    return Adapter(adapter.schema, adapter.vector + checked_vector(adapter.schema, delta))


def interpolate(a: Adapter, b: Adapter, alpha: float) -> Adapter:
    """The point on the line from ``a`` (``alpha`` 0) to ``b`` (``alpha`` 1), exact at both ends.

    Raises:
        WrongBaseModel: the adapters belong to different base models.
        BadAdapter: same base model, other targets.
    """
    require_same_schema(a.schema, b.schema)
    # In float64: with float32 factors, 0.3 * x + 0.7 * x would not give x back.
    mixed = (1.0 - alpha) * a.vector.astype(np.float64) + alpha * b.vector.astype(np.float64)
    return Adapter(a.schema, mixed.astype(np.float32))


def compose(a: Adapter, b: Adapter) -> Adapter:
    """Both adapters at once: IA3 scales multiply, so their elementwise product.

    Raises:
        WrongBaseModel: the adapters belong to different base models.
        BadAdapter: same base model, other targets.
    """
    require_same_schema(a.schema, b.schema)
    return Adapter(a.schema, a.vector * b.vector)


def weighted_mean(pairs: Iterable[tuple[Vector, float]]) -> Vector:
    """The mean of vectors ``(n_params,)``, each counted with its weight (McMahan et al., 2017, §2).

    Raises:
        BadInput: there is no vector, a weight is negative or not finite, or all weights are zero.
        BadAdapter: the vectors differ in length.
    """
    # Kept as a running sum: a cohort's updates do not fit in memory together. In float64: float32
    # loses small deltas beside a large sum.
    total: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None = None
    total_weight = 0.0
    for vector, weight in pairs:
        if not 0 <= weight < float("inf"):
            raise BadInput(f"a weight is a finite number of at least 0, got {weight}")
        total = np.zeros(vector.shape) if total is None else total
        if vector.shape != total.shape:
            raise BadAdapter(f"expected vectors of shape {total.shape}, got one of {vector.shape}")
        total += np.multiply(vector, weight, dtype=np.float64)
        total_weight += weight
    if total is None or total_weight == 0:
        raise BadInput("expected at least one vector with a weight above zero to average, got none")
    return (total / total_weight).astype(np.float32)


def l2_norm(vector: Vector) -> float:
    """Euclidean length of a delta, summed in float64."""
    return float(np.linalg.norm(vector.astype(np.float64)))


def max_abs(vector: Vector) -> float:
    """The largest magnitude among a delta's entries."""
    return float(np.max(np.abs(vector)))
