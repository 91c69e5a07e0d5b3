"""The adapter: one user's or everyone's IA3 scales as a value."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedia3.adapters.dial import Alpha, alpha_values
from fedia3.adapters.schema import Schema
from fedia3.errors import BadAdapter, WrongBaseModel

Vector = NDArray[np.float32]

_WIRE = np.dtype("<f4")


@dataclass(frozen=True, eq=False)
class Adapter:
    """IA3 scales of every target, flat float32 ``(n_params,)`` in schema order; ones = the base.

    Raises:
        BadAdapter: the vector has the wrong length or holds NaN or infinity.
    """

    schema: Schema
    vector: Vector

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", checked_vector(self.schema, self.vector))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        return self.schema == other.schema and bool(np.array_equal(self.vector, other.vector))

    def __hash__(self) -> int:
        return hash((self.schema, self.vector.tobytes()))

    @classmethod
    def ones(cls, schema: Schema) -> "Adapter":
        """The adapter that leaves the base model as it is."""
        return cls(schema, np.ones(schema.n_params, dtype=np.float32))

    def scales(self, key: str) -> Vector:
        """One target's scales ``(dim,)``, by :attr:`Target.key`."""
        return self.vector[self.schema.slices[key]]


@dataclass(frozen=True, eq=False)
class PersonalAdapter:
    """A user's own part, relative to the global adapter it was trained on.

    The user's effective scales are ``global + alpha * delta``, so a personal part outlives the
    global version it grew on. ``global_digest`` names that version's stored bytes.
    """

    schema: Schema
    delta: Vector  # (n_params,), zeros = exactly the global adapter
    global_digest: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "delta", checked_vector(self.schema, self.delta))

    def on(self, global_adapter: Adapter, alpha: Alpha = 1.0) -> Adapter:
        """The effective adapter on ``global_adapter``; ``alpha`` 0 = global, 1 = personal.

        Raises:
            BadSetting: the dial ``alpha`` does not fit the schema.
        """
        require_same_schema(self.schema, global_adapter.schema)
        dialled = alpha_values(alpha, self.schema).astype(np.float32) * self.delta
        return Adapter(self.schema, global_adapter.vector + dialled)


def checked_vector(schema: Schema, vector: NDArray[np.generic]) -> Vector:
    """A read-only contiguous float32 copy, once its length and values are sound."""
    if vector.shape != (schema.n_params,):
        raise BadAdapter(
            f"expected a flat vector of {schema.n_params} scales for this schema, "
            f"got shape {vector.shape}"
        )
    flat = np.array(vector, dtype=np.float32) + np.float32(0)  # -0.0 becomes 0.0: equal is equal
    if not np.isfinite(flat).all():
        raise BadAdapter(f"{int((~np.isfinite(flat)).sum())} of {flat.size} scales are not finite")
    flat.flags.writeable = False
    return flat


def vector_bytes(vector: NDArray[np.generic]) -> bytes:
    """A flat vector as it travels between processes: little-endian float32, nothing else."""
    return np.ascontiguousarray(vector, dtype=_WIRE).tobytes()


def vector_of(data: bytes) -> Vector:
    """The vector in :func:`vector_bytes`'s form, its length and values as they come.

    Raises:
        BadAdapter: it has no whole number of scales.
    """
    if len(data) % _WIRE.itemsize:
        raise BadAdapter(f"expected whole float32 numbers, got {len(data)} bytes")
    return np.frombuffer(data, dtype=_WIRE).astype(np.float32)


def require_same_schema(left: Schema, right: Schema) -> None:
    """Refuse to mix adapters of two base models or of two target lists.

    Raises:
        WrongBaseModel: the base models differ.
        BadAdapter: same base model, other targets.
    """
    if left.base_digest != right.base_digest:
        raise WrongBaseModel(
            f"one adapter is for base model {left.base_digest[:12]}, the other for "
            f"{right.base_digest[:12]}; train it anew on the base you run"
        )
    if left != right:
        raise BadAdapter("the adapters scale different targets of the same base model")
