"""A coordinator that listens, its callers, and adapters that fit its base model on paper."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.manifest import schema
from fedia3.adapters.schema import Schema
from fedia3.proto.caller import Caller
from fedia3.testing_service import NO_LIMITS, EnrolledDevice, RunningService, running_service


class Clock:
    """The coordinator's clock, as the tests set it."""

    now_ms = 1_900_000_000_000

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def clock() -> Clock:
    """Some day in 2030."""
    return Clock()


@pytest.fixture
def service(tmp_path: Path, clock: Clock) -> Iterator[RunningService]:
    """A coordinator with a base model on paper, without limits on calls."""
    with running_service(tmp_path, in_memory=True, limits=NO_LIMITS, now_ms=clock) as running:
        yield running


Calling = Callable[..., Caller]


@pytest.fixture
def calling(service: RunningService, clock: Clock) -> Iterator[Calling]:
    """Opens a caller: of a device, of the operator, or with a token; its clock is the service's."""
    with ExitStack() as stack:

        def opened(who: EnrolledDevice | str | None = None) -> Caller:
            token, key = None, None
            if isinstance(who, EnrolledDevice):
                token, key = who.token, who.signing_key
            elif who == "operator":
                token, key = service.operator_token, service.operator_key
            elif who is not None:
                token = who
            caller = Caller(
                service.address, ca=service.ca, token=token, signing_key=key, now_ms=clock
            )
            return stack.enter_context(caller)

        yield opened


@pytest.fixture
def shape(service: RunningService) -> Schema:
    """Five scales: two of keys, three of a feed-forward."""
    return schema(service.manifest)


@pytest.fixture
def everyone(service: RunningService, shape: Schema) -> Adapter:
    """Everyone's adapter, published: all ones."""
    ones = Adapter.ones(shape)
    service.registry.publish_global(ones)
    return ones


def part(on: Adapter, *delta: float) -> PersonalAdapter:
    """A user's own part with this delta, trained on that global adapter."""
    digest = encoding.digest(encoding.encode(on))
    return PersonalAdapter(on.schema, np.array(delta, dtype=np.float32), digest)


@pytest.fixture
def make_part() -> Callable[..., PersonalAdapter]:
    """See :func:`part`."""
    return part
