"""The dial, as people write it and as every scale sees it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedia3.adapters.adapter import Adapter, PersonalAdapter, Vector
from fedia3.adapters.arithmetic import interpolate
from fedia3.adapters.dial import Dial, alpha_values, parse_alpha
from fedia3.adapters.schema import Schema, Target
from fedia3.errors import BadSetting

SCHEMA = Schema(
    "base",
    tuple(
        target
        for layer in (0, 1)
        for target in (
            Target(f"layers.{layer}.k_proj", "k", 1),
            Target(f"layers.{layer}.v_proj", "v", 1),
            Target(f"layers.{layer}.down_proj", "ff", 2),
        )
    ),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", [0.5] * 8),
        ("k=1,v=0.5,ff=0", [1, 0.5, 0, 0, 1, 0.5, 0, 0]),
        ("layer:0=1,layer:1=0.2", [1, 1, 1, 1, 0.2, 0.2, 0.2, 0.2]),
        ("layer:0-1=-2", [-2] * 8),
        (" ff=3, v=2 ,k=1 ", [1, 2, 3, 3, 1, 2, 3, 3]),
    ],
)
def test_every_scale_has_its_number(text: str, expected: list[float]):
    """Two layers of one key, one value and two feed-forward scales."""
    assert alpha_values(parse_alpha(text), SCHEMA).tolist() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read ''"),
        ("half", "cannot read 'half'"),
        ("nan", "finite"),
        ("k=inf,v=1,ff=1", "finite"),
        ("k=1,v=0.5,ff", "cannot read ''"),
        ("k=1,q=0.5", "cannot read 'q=0.5'"),
        ("layer:=1", "cannot read 'layer:=1'"),
        ("layer:1-0=1", "ascend"),
        ("k=1,layer:0-1=1", "by kind or by layer"),
        ("k=1,v=1,ff=1,k=2", "gives k several"),
        ("layer:0-1=1,layer:1=2", "gives layer:1 several"),
    ],
)
def test_what_is_no_dial_is_refused(text: str, message: str):
    """With what was expected."""
    with pytest.raises(BadSetting, match=message):
        parse_alpha(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k=1,v=0.5", "has ff, k, v, the dial 'k=1,v=0.5' names k, v"),
        ("layer:0=1", "has layer:0-1, the dial 'layer:0=1' names layer:0"),
        ("layer:0-2=1", "names layer:0-2"),
    ],
)
def test_a_dial_names_all_there_is_and_nothing_else(text: str, message: str):
    """Nobody has to guess what holds for the rest."""
    with pytest.raises(BadSetting, match=message):
        alpha_values(parse_alpha(text), SCHEMA)


def test_what_stands_in_no_layer_is_dialled_by_kind():
    """A projection outside of every stack has no number."""
    alone = Schema("base", (Target("k_proj", "k", 1),))
    with pytest.raises(BadSetting, match="k_proj stands in no layer"):
        alpha_values(parse_alpha("layer:0=1"), alone)
    assert alpha_values(Dial((("k", 0.5),)), alone).tolist() == [0.5]


numbers = st.floats(-4, 4)
vectors = st.lists(st.floats(-8, 8, width=32), min_size=8, max_size=8).map(
    lambda values: np.array(values, dtype=np.float32)
)


@given(numbers, vectors, vectors)
def test_equal_numbers_everywhere_are_the_scalar(alpha: float, one: Vector, other: Vector):
    """By kind, by layer or as one number: the same scales to the bit."""
    own, everyone = PersonalAdapter(SCHEMA, one, "0" * 64), Adapter(SCHEMA, other)
    by_kind, by_layer = (
        Dial((("k", alpha), ("v", alpha), ("ff", alpha))),
        Dial(((range(2), alpha),)),
    )
    for dial in (by_kind, by_layer):
        assert own.on(everyone, dial) == own.on(everyone, alpha)
        mixed = interpolate(everyone, Adapter(SCHEMA, one), dial)
        assert mixed == interpolate(everyone, Adapter(SCHEMA, one), alpha)


@given(st.lists(st.floats(-9, 9).map(lambda x: round(x, 3)), min_size=3, max_size=3))
def test_a_dial_is_written_as_it_is_read(alphas: list[float]):
    """Kinds and layers, through text and back."""
    k, v, ff = alphas
    by_kind = Dial((("k", k), ("v", v), ("ff", ff)))
    by_layer = Dial(((range(2), k), (range(2, 3), v), (range(5, 9), ff)))
    assert [parse_alpha(str(by_kind)), parse_alpha(str(by_layer))] == [by_kind, by_layer]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn.k_proj", ("model.layers", 3)),
        ("encoder.block.0.layer.1.DenseReluDense.wo", ("encoder.block", 0)),
        ("0.k_proj", ("", 0)),
        ("blocks.7", ("blocks", 7)),
        ("conv1d.k_proj", None),
    ],
)
def test_a_target_knows_its_layer(name: str, layer: tuple[str, int] | None):
    """The first number in its path, and the stack before it."""
    assert Target(name, "k", 1).layer == layer
