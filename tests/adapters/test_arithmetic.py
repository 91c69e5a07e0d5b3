"""Arithmetic on adapters, on numbers small enough for the head."""

from collections.abc import Callable, Iterator
from random import Random
from typing import cast

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fedia3.adapters.adapter import Adapter, PersonalAdapter, Vector
from fedia3.adapters.arithmetic import (
    Space,
    add,
    interpolate,
    l2_norm,
    max_abs,
    product,
    relative_to,
    subtract,
    sum_of_deltas,
    weighted_mean,
)
from fedia3.adapters.schema import Schema, Target
from fedia3.errors import BadAdapter, BadInput, BadSetting, WrongBaseModel

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


def test_scales_of_several_adapters_multiply():
    """2 and 3, then 0.5 and 2, then 3 and 1 are 3 and 6."""
    assert product([_adapter(2, 3), _adapter(0.5, 2), _adapter(3, 1)]) == _adapter(3, 6)


def test_deltas_to_the_base_are_added_by_weight():
    """1.5 moves a scale by 0.5, 3 by 2: half of the first and twice the second make 5.25."""
    summed = sum_of_deltas([_adapter(1.5, 1), _adapter(3, 1)], [0.5, 2])
    assert summed == _adapter(5.25, 1)


def test_in_log_space_half_of_the_way_is_the_geometric_mean():
    """Between 1 and 4 lies 2, between 2 and 8 lies 4."""
    assert interpolate(_adapter(1, 2), _adapter(4, 8), 0.5, "log") == _adapter(2, 4)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_log_space_is_for_positive_scales(scale: float):
    """A scale without a logarithm is named with its target; vector space takes it."""
    with pytest.raises(BadAdapter, match=r"k_proj\.k holds the scale .* positive"):
        interpolate(_adapter(1, 2), _adapter(scale, 2), 0.5, "log")
    assert interpolate(_adapter(1, 2), _adapter(scale, 2), 1.0).vector[0] == scale


def test_a_space_that_is_none_is_refused():
    """Vector or log."""
    with pytest.raises(BadSetting, match="'cubic'"):
        interpolate(_adapter(1, 2), _adapter(1, 2), 0.5, cast(Space, "cubic"))


def test_nothing_has_no_product():
    """Nor a sum: of which base model would it be?"""
    with pytest.raises(BadInput, match="at least one adapter"):
        product([])


def test_each_adapter_of_a_sum_has_a_weight():
    """Two adapters, one weight."""
    with pytest.raises(BadSetting, match="expected 2 weights"):
        sum_of_deltas([_adapter(1, 1), _adapter(1, 1)], [1.0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "combine",
    [
        product,
        lambda both: sum_of_deltas(both, [1e300, 1e300]),
        lambda both: interpolate(*both, 1e300, "log"),
    ],
)
def test_what_leaves_float32_is_refused(combine: Callable[[list[Adapter]], Adapter]):
    """1e38 times 1e38 is no float32; an error says so, and no warning of numpy's."""
    with pytest.raises(BadAdapter, match="not finite"):
        combine([_adapter(1e38, 1), _adapter(2e38, 1)])


scales = st.floats(0.125, 8, width=32)
vectors = st.tuples(scales, scales).map(lambda pair: _adapter(*pair))
signed = st.floats(-8, 8, width=32, allow_subnormal=False)
signed_vectors = st.tuples(signed, signed).map(lambda pair: _adapter(*pair))
alphas = st.floats(0, 1)


def _is_near(left: Adapter, right: Adapter) -> bool:
    """Equal up to a few units in float32's last place."""
    return np.allclose(left.vector, right.vector, rtol=4e-7, atol=1e-6)


@given(st.lists(vectors, min_size=1, max_size=4), st.randoms())
def test_a_product_does_not_depend_on_the_order(adapters: list[Adapter], random: Random):
    """Nor do ones in it matter."""
    shuffled = [*adapters, Adapter.ones(SCHEMA)]
    random.shuffle(shuffled)
    assert _is_near(product(shuffled), product(adapters))


@given(signed_vectors)
def test_one_adapter_alone_stays_what_it_is(g: Adapter):
    """As a product, and as a sum of weight one; at weight zero the base model is left."""
    assert product([g]) == g
    assert _is_near(sum_of_deltas([g], [1.0]), g)
    assert sum_of_deltas([g], [0.0]) == Adapter.ones(SCHEMA)


@given(signed_vectors, signed_vectors, alphas)
def test_vector_interpolation_is_a_sum_of_deltas(a: Adapter, b: Adapter, alpha: float):
    """Weights 1 - α and α; the ones cancel."""
    assert _is_near(interpolate(a, b, alpha), sum_of_deltas([a, b], [1 - alpha, alpha]))


@given(vectors, vectors, alphas)
def test_log_interpolation_parts_a_product(a: Adapter, b: Adapter, alpha: float):
    """What is α of the way from the base to b, times what is left, is b; and it lies below."""
    ones = Adapter.ones(SCHEMA)
    there = interpolate(ones, b, alpha, "log")
    assert _is_near(product([there, interpolate(ones, b, 1 - alpha, "log")]), b)
    mean, line = interpolate(a, b, alpha, "log"), interpolate(a, b, alpha)
    assert (mean.vector <= line.vector * (1 + 1e-6)).all()  # geometric below arithmetic


@given(vectors, vectors, st.sampled_from(["vector", "log"]))
def test_both_ends_are_exact(a: Adapter, b: Adapter, space: Space):
    """0 is the first, 1 the second, to the bit."""
    assert interpolate(a, b, 0.0, space) == a
    assert interpolate(a, b, 1.0, space) == b


@given(st.floats(0.5, 2, width=32), st.floats(0.5, 2, width=32))
def test_a_part_gives_back_the_adapter_it_was_taken_from(own: float, everyones: float):
    """Within a factor of two, to the bit: the global scale plus the delta is the user's own."""
    adapter, everyone = _adapter(own, 1), _adapter(everyones, 1)
    assume(everyones / 2 <= own <= everyones * 2)
    assert PersonalAdapter(SCHEMA, relative_to(adapter, everyone), "0" * 64).on(everyone) == adapter


@given(signed, st.floats(-2, 2, width=32))
@example(1 + 2**-21, -9 - 2**-20)  # their rounded sum is -8, and -8 less the first rounds to -9
def test_what_was_a_part_once_is_one_again(everyones: float, delta: float):
    """Any global scale plus any delta, taken apart anew, is met to the bit."""
    everyone = _adapter(everyones, 1)
    effective = PersonalAdapter(SCHEMA, _vector(delta, 0), "0" * 64).on(everyone)
    again = PersonalAdapter(SCHEMA, relative_to(effective, everyone), "0" * 64)
    assert again.on(everyone) == effective


def test_a_scale_far_below_its_global_is_met_within_the_deltas_last_place():
    """0.1 has bits that 1.7 - 1.6 has not."""
    adapter, everyone = _adapter(0.1, 1), _adapter(1.7, 1)
    met = everyone.vector + relative_to(adapter, everyone)
    assert 0 < abs(met[0] - np.float32(0.1)) <= np.spacing(np.float32(1.6)) / 2


@pytest.mark.parametrize(
    "combine",
    [
        subtract,
        relative_to,
        lambda a, b: product([a, b]),
        lambda a, b: sum_of_deltas([a, b], [1, 1]),
        lambda a, b: interpolate(a, b, 0.5),
    ],
)
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
