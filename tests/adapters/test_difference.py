"""How two adapters differ, on numbers small enough for the head."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.difference import differences, write_picture
from fedia3.adapters.schema import Schema, Target
from fedia3.errors import BadAdapter, WrongBaseModel

SCHEMA = Schema(
    "base",
    (
        Target("layers.0.self.k", "k", 2),
        Target("layers.0.cross.k", "k", 2),
        Target("layers.0.wo", "ff", 2),
        Target("head", "v", 1),
    ),
)


def _adapter(*scales: float, schema: Schema = SCHEMA) -> Adapter:
    return Adapter(schema, np.array(scales, dtype=np.float32))


ONES = _adapter(1, 1, 1, 1, 1, 1, 1)


def test_each_layer_and_kind_has_its_numbers():
    """
    A layer's two key projections count together: 3 and 4 away make 5, one of four scales by 4.
    """
    keys, feedforward, head = differences(ONES, _adapter(4, 1, 1, 5, 1.005, 1, 0.5))
    assert (keys.layer, keys.kind, keys.num_scales) == ("layers.0", "k", 4)
    assert (keys.distance, keys.largest, keys.moved) == (5, 4, 0.5)
    assert (feedforward.layer, feedforward.kind) == ("layers.0", "ff")
    assert feedforward.moved == 0  # half a per cent
    assert (head.layer, head.distance, head.moved) == ("head", 0.5, 1)


def test_moving_is_measured_against_what_a_scale_was():
    """From 100 to 100.5 is half a per cent, from 0.1 to 0.6 is five times as much as it was."""
    keys, *_ = differences(_adapter(100, 0.1, 1, 1, 1, 1, 1), _adapter(100.5, 0.6, 1, 1, 1, 1, 1))
    assert keys.moved == 0.25


def test_the_cosine_is_that_of_what_both_do_to_the_base():
    """The same way, against each other, across, and, from all-ones, no way at all."""
    a = _adapter(2, 2, 1, 1, 2, 1, 2)
    b = _adapter(1.5, 1.5, 1, 1, 1, 3, 0.5)
    keys, feedforward, head = differences(a, b)
    assert keys.cosine == pytest.approx(1)
    assert feedforward.cosine == pytest.approx(0)
    assert head.cosine == pytest.approx(-1)
    assert {each.cosine for each in differences(ONES, b)} == {None}


def test_what_is_of_two_base_models_is_not_compared():
    """Nor what scales other targets of one."""
    with pytest.raises(WrongBaseModel):
        differences(ONES, Adapter(Schema("other", SCHEMA.targets), ONES.vector))
    with pytest.raises(BadAdapter):
        differences(ONES, _adapter(1, 1, schema=Schema("base", SCHEMA.targets[:1])))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layers", [1, 2, 60])
def test_the_picture_shows_where_they_differ(layers: int, tmp_path: Path):
    """Equal adapters give another picture than different ones, whatever their owners' names."""
    schema = Schema("base", tuple(Target(f"h.{n}.k", "k", 2) for n in range(layers)))
    ones = Adapter.ones(schema)
    moved = Adapter(schema, np.linspace(0.5, 2, 2 * layers))
    equal, different = tmp_path / "equal.png", tmp_path / "different.png"
    write_picture(differences(ones, ones), equal, "$_$", "中")
    write_picture(differences(ones, moved), different, "$_$", "中")
    assert imread(equal).shape == imread(different).shape
    assert not np.array_equal(imread(equal), imread(different))
