"""The schema: where each target's scales lie, and what a target may be."""

import pytest

from fedia3.adapters.schema import Part, Schema, Target
from fedia3.errors import BadAdapter

KEYS = Target("attention.k_proj", "k", 2)
DOWN = Target("mlp.down_proj", "ff", 3)


def test_the_second_target_starts_where_the_first_ends():
    """Two scales of keys and three of feed-forward lie at 0-2 and 2-5 of five."""
    schema = Schema("base", (KEYS, DOWN))

    assert schema.n_params == 5
    assert schema.slices == {"attention.k_proj.k": slice(0, 2), "mlp.down_proj.ff": slice(2, 5)}


def test_the_order_of_targets_is_part_of_the_digest():
    """The same targets in another order are another schema: vectors would not line up."""
    assert Schema("base", (KEYS, DOWN)).digest != Schema("base", (DOWN, KEYS)).digest


def test_the_base_model_is_part_of_the_digest():
    """The same targets on another base model are another schema."""
    assert Schema("base", (KEYS,)).digest != Schema("other", (KEYS,)).digest


def test_json_gives_the_schema_back():
    """A schema with and without parts survives the way through JSON."""
    fused = Target("c_attn", "v", 2, Part(first=4, width=2, stride=6, total=6))
    schema = Schema("base", (KEYS, fused))

    assert Schema.from_json(schema.to_json()) == schema


def test_the_values_of_gpt2_are_the_last_third_of_its_projection():
    """Of an output of queries, keys and values, two wide each, values are positions 4 and 5."""
    assert Part(first=4, width=2, stride=6, total=6).positions().tolist() == [4, 5]


def test_keys_of_two_groups_are_two_runs():
    """Where every group of three positions ends in key, value, the keys are positions 1 and 4."""
    assert Part(first=1, width=1, stride=3, total=6).positions().tolist() == [1, 4]


def test_keys_and_values_of_one_projection_have_their_own_names():
    """A fused projection gives two targets of one module name and two tensor names."""
    parts = [Part(first=first, width=2, stride=6, total=6) for first in (2, 4)]
    schema = Schema(
        "base", (Target("c_attn", "k", 2, parts[0]), Target("c_attn", "v", 2, parts[1]))
    )

    assert list(schema.slices) == ["c_attn.k", "c_attn.v"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        pytest.param((), "at least one target", id="no targets"),
        pytest.param((KEYS, KEYS), "no target twice", id="one target twice"),
    ],
)
def test_a_schema_lists_targets_once(targets: tuple[Target, ...], message: str):
    """No targets or twice the same one are refused."""
    with pytest.raises(BadAdapter, match=message):
        Schema("base", targets)


def test_a_target_without_scales_is_refused():
    """A dimension of zero is named with its target."""
    with pytest.raises(BadAdapter, match=r"k_proj.*at least 1, got 0"):
        Target("k_proj", "k", 0)


def test_a_part_holds_as_many_positions_as_its_target_has_scales():
    """Three scales on two positions are refused."""
    with pytest.raises(BadAdapter, match="does not hold 3 positions"):
        Target("c_attn", "k", 3, Part(first=2, width=2, stride=6, total=6))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"base_digest": "b", "targets": [{"name": "a", "kind": "q", "dim": 1}]}',
        '{"base_digest": "b", "targets": [{"name": "a", "kind": "k", "dim": "many"}]}',
    ],
)
def test_text_that_is_no_schema_is_refused(text: str):
    """Whatever is wrong with the text, the error is ours."""
    with pytest.raises(BadAdapter):
        Schema.from_json(text)
