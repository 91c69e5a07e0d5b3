import pytest

from fedia3.adapters.update import client_seed
from fedia3.coordinator.cohort import round_seed, select
from fedia3.errors import BadSetting

PEOPLE = [f"user{i}" for i in range(20)]


def test_the_cohort_does_not_depend_on_the_populations_order():
    """The same people in another order give the same cohort."""
    assert select(PEOPLE, 1, 0, 5) == select(PEOPLE[::-1], 1, 0, 5)


def test_nobody_is_drawn_twice():
    """Names listed twice are one client."""
    assert sorted(select(["a", "b", "a"], 1, 0, 3)) == ["a", "b"]


def test_a_cohort_larger_than_the_population_is_everybody():
    """Twenty people and a cohort of fifty: all twenty take part."""
    assert sorted(select(PEOPLE, 1, 0, 50)) == sorted(PEOPLE)


def test_everybody_is_drawn_about_equally_often():
    """Over 400 rounds of 5 out of 20, everybody is drawn about 100 times."""
    drawn = [client for r in range(400) for client in select(PEOPLE, r, 0, 5)]
    assert all(60 < drawn.count(client) < 140 for client in PEOPLE)


def test_round_and_seed_change_the_cohort():
    """Another round or another seed draws other people."""
    assert len({select(PEOPLE, 1, 0, 5), select(PEOPLE, 2, 0, 5), select(PEOPLE, 1, 1, 5)}) == 3


def test_somebody_who_leaves_is_replaced_and_the_others_stay():
    """When one of the cohort leaves the population, one place changes."""
    cohort = select(PEOPLE, 1, 0, 5)
    without = select([p for p in PEOPLE if p != cohort[0]], 1, 0, 5)
    assert set(cohort[1:]) < set(without)


def test_an_empty_cohort_is_refused():
    """A cohort of 0 is a mistake, not a round."""
    with pytest.raises(BadSetting, match="at least 1 client, got 0"):
        select(PEOPLE, 1, 0, 0)


def test_a_clients_seed_fits_a_signed_field_and_differs_by_client_and_round():
    """Seeds lie in [0, 2**63) and no two of these agree."""
    seeds = [client_seed(c, round_seed(r, 0)) for c in ("a", "b") for r in (1, 2)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
