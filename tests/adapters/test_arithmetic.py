"""Arithmetic on adapters, on numbers small enough for the head."""

from collections.abc import Iterator

import numpy as np
import pytest

from fedia3.adapters.adapter import Adapter, Vector
from fedia3.adapters.arithmetic import (
    add,
    compose,
    interpolate,
    l2_norm,
    max_abs,
    subtract,
    weighted_mean,
)
from fedia3.adapters.schema import Schema, Target
from fedia3.errors import BadAdapter, BadInput, WrongBaseModel

SCHEMA = Schema("base", (Target("k_proj", "k", 2),))


def _vector(*values: float) -> Vector:
    return np.array(values, dtype=np.float32)


def _adapter(*values: float) -> Adapter:
    return Adapter(SCHEMA, _vector(*values))


def test_the_delta_is_after_minus_before():
    """From 1, 1 to 1.5, 0.5 the scales moved by 0.5 and -0.5."""
    assert subtract(_adapter(1.5, 0.5), _adapter(1, 1)).tolist() == [0.5, -0.5]


def test_adding_the_delta_gives_after_back():
    """What subtract took apart, add puts together."""
    before, after = _adapter(1, 1), _adapter(1.5, 0.5)

    assert add(before, subtract(after, before)) == after


def test_a_delta_of_another_length_is_refused():
    """One number is not spread over two scales."""
    with pytest.raises(BadAdapter, match="flat vector of 2"):
        add(_adapter(1, 1), _vector(0.5))


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        pytest.param(0.0, [1.0, 2.0], id="0 is the first"),
        pytest.param(0.25, [1.5, 2.0], id="a quarter of the way"),
        pytest.param(1.0, [3.0, 2.0], id="1 is the second"),
    ],
)
def test_interpolation_goes_from_the_first_to_the_second(alpha: float, expected: list[float]):
    """Between 1 and 3 a quarter of the way is 1.5; between 2 and 2 it stays 2."""
    assert interpolate(_adapter(1, 2), _adapter(3, 2), alpha).vector.tolist() == expected


def test_interpolating_between_equals_changes_nothing():
    """Rounding of 0.3 and 0.7 does not move a scale that both agree on."""
    same = _adapter(0.1, 1.7)

    assert interpolate(same, same, 0.3) == same


def test_composed_scales_multiply():
    """2 and 3 after 0.5 and 2 are 1 and 6."""
    assert compose(_adapter(2, 3), _adapter(0.5, 2)).vector.tolist() == [1.0, 6.0]


@pytest.mark.parametrize("combine", [subtract, compose, lambda a, b: interpolate(a, b, 0.5)])
def test_adapters_of_two_base_models_do_not_mix(combine):
    """Equal shapes are not enough."""
    other = Adapter(Schema("other", SCHEMA.targets), _vector(1, 1))

    with pytest.raises(WrongBaseModel):
        combine(_adapter(1, 1), other)


def test_each_vector_counts_with_its_weight():
    """1 and 3 with weights 1 and 3 average to 2.5."""
    assert weighted_mean([(_vector(1), 1), (_vector(3), 3)]).tolist() == [2.5]


def test_a_vector_of_weight_zero_does_not_count():
    """A client without examples is heard but changes nothing."""
    assert weighted_mean([(_vector(1), 0), (_vector(3), 2)]).tolist() == [3.0]


def test_small_deltas_survive_beside_large_ones():
    """2^24 + 1 - 2^24 over three vectors is a third; a float32 sum would lose the 1."""
    large = 2.0**24
    pairs = [(_vector(large), 1), (_vector(1), 1), (_vector(-large), 1)]

    assert weighted_mean(pairs).tolist() == [np.float32(1 / 3)]


def test_the_mean_holds_one_vector_at_a_time():
    """Vectors are taken from the iterator one by one; a cohort does not fit in memory together."""
    buffer = _vector(0)

    def reused() -> Iterator[tuple[Vector, float]]:
        for value in (1, 3):
            buffer[:] = value  # a kept reference to the first vector would see 3
            yield buffer, 1

    assert weighted_mean(reused()).tolist() == [2.0]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        pytest.param([], "at least one vector", id="nobody"),
        pytest.param([(_vector(1), 0)], "at least one vector", id="only zero weights"),
        pytest.param([(_vector(1), 2), (_vector(1), -1)], "got -1", id="negative weight"),
        pytest.param([(_vector(1), float("nan"))], "got nan", id="NaN weight"),
        pytest.param([(_vector(1), float("inf"))], "got inf", id="infinite weight"),
        pytest.param([(_vector(1, 1), 1), (_vector(1), 1)], r"shape \(2,\)", id="two lengths"),
    ],
)
def test_what_has_no_mean_is_refused(pairs: list[tuple[Vector, float]], message: str):
    """Nobody, no weight, a weight that is none, or vectors of two lengths."""
    with pytest.raises(BadInput, match=message):
        weighted_mean(pairs)


def test_the_norm_is_euclidean():
    """3 and 4 make 5."""
    assert l2_norm(_vector(3, -4)) == 5.0


def test_the_norm_does_not_overflow_in_float32():
    """The square of 1e30 is no float32, the norm is."""
    assert l2_norm(_vector(1e30, 0)) == pytest.approx(1e30)


def test_the_largest_magnitude_may_be_negative():
    """Of 3 and -4 the larger magnitude is 4."""
    assert max_abs(_vector(3, -4)) == 4.0
