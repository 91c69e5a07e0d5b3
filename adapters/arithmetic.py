"""Arithmetic on adapters: the difference that travels, the mean of a cohort, several as one.

Whatever makes one adapter of several is computed in float64 and rounded once.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedia3.adapters.adapter import Adapter, Vector, checked_vector, require_same_schema
from fedia3.adapters.dial import Alpha, alpha_values
from fedia3.adapters.schema import Schema
from fedia3.errors import BadAdapter, BadInput, BadSetting

Space = Literal["vector", "log"]


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


def relative_to(adapter: Adapter, global_adapter: Adapter) -> Vector:
    """The delta ``(n_params,)`` that, added to the global adapter in float32, gives the adapter.

    To the last bit where a scale is half to double its global one, or came of such a sum before.
    Others may have bits that no sum has: they are met within a rounding of delta and sum.

    Raises:
        WrongBaseModel: the adapters belong to different base models.
        BadAdapter: same base model, other targets.
    """
    delta = subtract(adapter, global_adapter)
    # Where the delta is much larger than the scale, its rounding may end one step beside.
    for towards in (np.float32(-np.inf), np.float32(np.inf)):
        beside = np.nextafter(delta, towards)
        misses = global_adapter.vector + delta != adapter.vector
        hits = global_adapter.vector + beside == adapter.vector
        delta = np.where(misses & hits, beside, delta)
    return delta


def product(adapters: Sequence[Adapter]) -> Adapter:
    """All adapters at once: IA3 scales multiply, ``∏ g_i`` elementwise.

    Raises:
        BadInput: there is no adapter.
        WrongBaseModel: the adapters belong to different base models.
        BadAdapter: same base model, other targets, or the product is not finite.
    """
    schema = _one_schema(adapters)
    with np.errstate(over="ignore"):  # said by _rounded, with a number
        return _rounded(schema, np.prod([_wide(each) for each in adapters], axis=0))


def sum_of_deltas(adapters: Sequence[Adapter], weights: Sequence[Alpha]) -> Adapter:
    """What each adapter does to the base model, added: ``1 + Σ w_i (g_i - 1)``.

    Raises:
        BadInput: there is no adapter.
        BadSetting: there is not one weight for each adapter, or a weight does not fit the schema.
        WrongBaseModel: the adapters belong to different base models.
        BadAdapter: same base model, other targets, or the sum is not finite.
    """
    schema = _one_schema(adapters)
    if len(weights) != len(adapters):
        raise BadSetting(f"expected {len(adapters)} weights, one an adapter, got {len(weights)}")
    with np.errstate(over="ignore", invalid="ignore"):  # as in product
        moves = [
            alpha_values(weight, schema) * (_wide(each) - 1)
            for each, weight in zip(adapters, weights, strict=True)
        ]
        return _rounded(schema, 1 + np.sum(moves, axis=0))


def interpolate(a: Adapter, b: Adapter, alpha: Alpha, space: Space = "vector") -> Adapter:
    """The point between ``a`` (``alpha`` 0) and ``b`` (``alpha`` 1), exact at both ends.

    In vector space ``(1 - α) a + α b``; in log space ``a^(1 - α) b^α``, so that half of the way to
    a doubled scale is the square root of two.

    Raises:
        WrongBaseModel: the adapters belong to different base models.
        BadAdapter: same base model, other targets, the point is not finite, or, in log space, a
            scale of either is zero or negative: it has no logarithm.
        BadSetting: the dial ``alpha`` does not fit the schema, or there is no such space.
    """
    schema, share = _one_schema((a, b)), alpha_values(alpha, a.schema)
    if space not in get_args(Space):
        raise BadSetting(f"the space is one of {get_args(Space)}, got {space!r}")
    with np.errstate(over="ignore", invalid="ignore"):  # as in product
        if space == "vector":
            return _rounded(schema, (1 - share) * _wide(a) + share * _wide(b))
        return _rounded(schema, np.exp((1 - share) * _log(a) + share * _log(b)))


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


def _one_schema(adapters: Sequence[Adapter]) -> Schema:
    """The schema that all of them have."""
    if not adapters:
        raise BadInput("expected at least one adapter, got none")
    for other in adapters[1:]:
        require_same_schema(adapters[0].schema, other.schema)
    return adapters[0].schema


def _wide(adapter: Adapter) -> NDArray[np.float64]:
    return adapter.vector.astype(np.float64)


def _log(adapter: Adapter) -> NDArray[np.float64]:
    for key, part in adapter.schema.slices.items():
        if (lowest := float(adapter.vector[part].min())) <= 0:
            raise BadAdapter(
                f"{key} holds the scale {lowest:g}, and log space is defined only for positive "
                "scales; interpolate in vector space"
            )
    return np.log(_wide(adapter))


def _rounded(schema: Schema, scales: NDArray[np.float64]) -> Adapter:
    with np.errstate(over="ignore"):  # the adapter counts and refuses them
        return Adapter(schema, scales.astype(np.float32))
