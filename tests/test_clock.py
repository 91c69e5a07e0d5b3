from fedia3.clock import SetBack


def test_a_clock_that_is_set_is_noticed_once():
    """Time that passes is no setting; an hour back is told once, an hour ahead as less than 0."""
    wall, steady = [1000.0], [0.0]
    clock = SetBack(lambda: wall[0], lambda: steady[0])

    def pass_s(seconds: float, set_by: float = 0.0) -> float:
        steady[0] += seconds
        wall[0] += seconds + set_by
        return clock.by_s()

    assert pass_s(10) == 0
    assert pass_s(1, set_by=-3600) == 3600
    assert pass_s(1) == 0
    assert pass_s(1, set_by=3600) == -3600
