"""What the base model is pretrained on, and when its learning rate decays."""

from fedia3.simulations.pretrain import PEAK_LR, ROW, first_half, is_held_out, learning_rate, packed

PAD = 2


def test_half_of_the_names_does_not_depend_on_their_order_or_repetition() -> None:
    """A name that comes twice counts once; the larger half of five is three."""
    half = first_half(["a", "b", "c", "d", "e"])
    assert len(half) == 3
    assert first_half(["e", "d", "a", "c", "b", "a"]) == half


def test_about_one_text_in_twenty_is_held_out() -> None:
    """5 % of 2000 keys are 100, give or take chance."""
    assert 70 < sum(is_held_out(str(key)) for key in range(2000)) < 130


def test_a_document_that_does_not_fit_begins_the_next_row() -> None:
    """Documents of 200 and 100 tokens take two rows of 256, each padded."""
    first, second = packed([(7,) * 200, (8,) * 100], PAD)
    assert first == [7] * 200 + [PAD] * (ROW - 200)
    assert second == [8] * 100 + [PAD] * (ROW - 100)


def test_only_a_document_longer_than_a_row_is_cut() -> None:
    """300 tokens fill one row and 44 places of the next, where another document follows."""
    first, second = packed([(7,) * 300, (8,) * 10], PAD)
    assert first == [7] * ROW
    assert second[:54] == [7] * 44 + [8] * 10


def test_the_learning_rate_warms_up_and_ends_decayed_whatever_the_speed() -> None:
    """It follows the clock: the peak after 3 % of the time, 2 % of the peak at the end."""
    assert learning_rate(0.0) < PEAK_LR / 20
    assert learning_rate(0.03) == PEAK_LR
    assert learning_rate(1.0) == 0.02 * PEAK_LR
