"""Who takes part in a round."""

from collections.abc import Sequence
from hashlib import sha256

from fedia3.errors import BadSetting


def select(population: Sequence[str], round_num: int, seed: int, size: int) -> tuple[str, ...]:
    """Draw ``size`` clients uniformly, without replacement; all of them where there are fewer.

    Everybody's place in the round's queue is a hash of seed, round and client, and the first
    ``size`` take part. So the draw neither depends on the population's order nor on names listed
    twice, and a client that joins or leaves changes the cohort by one place at most.

    Raises:
        BadSetting: ``size`` is below 1.
    """
    if size < 1:
        raise BadSetting(f"a cohort has at least 1 client, got {size}")
    places = {client: _place(client, round_num, seed) for client in population}
    return tuple(sorted(places, key=places.__getitem__)[:size])


def round_seed(round_num: int, seed: int) -> int:
    """What a round's clients draw their seeds from, in ``[0, 2**63)``: a signed field holds it.

    It does not tell ``seed``, by which the next cohorts could be known.
    """
    return int.from_bytes(_place("train", round_num, seed)[:8]) >> 1


def _place(client: str, round_num: int, seed: int) -> bytes:
    return sha256(f"{seed}/{round_num}/{client}".encode()).digest()
