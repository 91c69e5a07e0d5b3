"""The update gate: what a reply has to be before it may touch the global adapter.

Every reply is judged by itself, and nothing in it is believed before it was looked at. A bad one
costs its sender this round's contribution and nobody else anything.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedia3.adapters.encoding import require_scales
from fedia3.adapters.schema import Schema
from fedia3.adapters.update import ClientUpdate, TrainRequest
from fedia3.errors import BadAdapter, BadSetting

MAX_METRICS = 16  # names one client may report
MAX_METRIC_NAME = 64  # characters
INT64_END = 2**63


@dataclass(frozen=True)
class GateLimits:
    """How far one client may pull the global adapter."""

    max_norm: float = 100.0  # L2 norm of a delta; above it the update is rejected
    max_examples: int = 10_000  # one client's weight; above it the weight is capped

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise BadSetting(f"max_norm is above 0, got {self.max_norm}")
        if self.max_examples < 1:
            raise BadSetting(f"max_examples is at least 1, got {self.max_examples}")


@dataclass(frozen=True, eq=False)
class Reply:
    """What came back from one client, as it came.

    The transport vouches for ``client`` alone. ``failure`` is set where no update arrived: the
    class of what went wrong on the device or on the way.
    """

    client: str
    round_num: object = None
    schema_digest: object = None
    delta: object = None
    num_examples: object = None
    metrics: object = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True, eq=False)
class Admitted:
    """A usable update; ``note`` says what the gate changed, if anything."""

    update: ClientUpdate
    norm: float  # L2 norm of the delta
    note: str = ""


@dataclass(frozen=True)
class Rejected:
    """Why a reply is not used: expected and got."""

    reason: str


def admit(
    reply: Reply,
    request: TrainRequest | None,
    schema: Schema,
    limits: GateLimits,
    *,
    answered: bool = False,
) -> Admitted | Rejected:
    """Judge one reply to ``request`` (None: its sender was not asked). Never raises.

    ``answered`` says that the client's answer of this round is in already. A client that claims
    more than ``max_examples`` is admitted with its weight capped, and the note says so.
    """
    reason = (
        _unexpected(reply, request, answered)
        or _for_another_round_or_schema(reply, request, schema)
        or _unusable_delta(reply.delta, schema, limits)
        or _unusable_scales(reply.delta, request)
        or _unusable_weight(reply.num_examples)
    )
    return Rejected(reason) if reason else _admitted(reply, limits)


def _unexpected(reply: Reply, request: TrainRequest | None, answered: bool) -> str | None:
    if request is None:
        return "this client was not asked in this round"
    if answered:
        return "this client answered this round already; its first answer stands"
    return reply.failure


def _for_another_round_or_schema(
    reply: Reply, request: TrainRequest | None, schema: Schema
) -> str | None:
    expected = request.round_num if request else None
    if type(reply.round_num) is not int or reply.round_num != expected:
        return f"expected an update for round {expected}, got one for {_shown(reply.round_num)}"
    if reply.schema_digest != schema.digest:
        return f"expected schema {schema.digest[:12]}, got {_shown(reply.schema_digest)}"
    return None


def _unusable_delta(delta: object, schema: Schema, limits: GateLimits) -> str | None:
    if not isinstance(delta, np.ndarray):
        return f"expected a float32 vector, got {type(delta).__name__}"
    if delta.dtype != np.float32 or delta.shape != (schema.n_params,):
        got = f"{str(delta.dtype)[:40]} of shape {str(delta.shape)[:40]}"
        return f"expected a float32 vector of {schema.n_params} values, got {got}"
    if broken := int((~np.isfinite(delta)).sum()):
        return f"{broken} of {delta.size} values are not finite"
    if (norm := _norm(delta)) > limits.max_norm:
        return f"the delta's norm {norm:.6g} is above the limit {limits.max_norm:.6g}"
    return None


def _unusable_scales(delta: object, request: TrainRequest | None) -> str | None:
    """What the client's own adapter would be has to be one that can be stored.

    A weighted mean of such adapters is one too, so no admitted update spoils the commit.
    """
    assert isinstance(delta, np.ndarray)  # the checks before have settled it
    assert request is not None
    try:
        require_scales(request.vector + delta)
    except BadAdapter as error:
        return f"with this delta the adapter could not be stored: {error}"
    return None


def _unusable_weight(num_examples: object) -> str | None:
    if type(num_examples) is int and 0 < num_examples < INT64_END:
        return None
    return f"expected a positive whole number of examples, got {_shown(num_examples)}"


def _admitted(reply: Reply, limits: GateLimits) -> Admitted:
    # the checks before have settled the types
    assert isinstance(reply.delta, np.ndarray)
    assert isinstance(reply.num_examples, int)
    weight = min(reply.num_examples, limits.max_examples)
    capped = f"claims {reply.num_examples} examples, counted as {weight}: the limit"
    return Admitted(
        update=ClientUpdate(reply.delta, weight, _finite_metrics(reply.metrics)),
        norm=_norm(reply.delta),
        note=capped if weight < reply.num_examples else "",
    )


def _finite_metrics(metrics: object) -> dict[str, float]:
    """The finite numbers among them, few and with plain short names: they are stored for good."""
    if not isinstance(metrics, Mapping):
        return {}
    plain = {
        name: float(value)
        for name, value in metrics.items()
        if _is_plain_name(name) and _is_finite_number(value)
    }
    return {name: plain[name] for name in sorted(plain)[:MAX_METRICS]}


def _is_plain_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and 0 < len(name) <= MAX_METRIC_NAME
        and name.isascii()
        and name.isprintable()
    )


def _is_finite_number(value: object) -> bool:
    if type(value) is int:
        return -INT64_END < value < INT64_END
    return isinstance(value, float) and math.isfinite(value)


def _norm(delta: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
    return float(np.linalg.norm(delta.astype(np.float64)))


def _shown(value: object) -> str:
    """A stranger's value for a message: short, escaped, and never a failing ``repr``."""
    if isinstance(value, str):
        return repr(value[:40])
    if value is None or isinstance(value, float):
        return repr(value)
    if isinstance(value, int) and abs(value) < INT64_END:
        return str(value)
    return f"a value of type {type(value).__name__}"
