"""One coordinator for all of a file's inputs."""

from collections.abc import Iterator

import pytest

from .scene import Scene, a_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """See :class:`Scene`."""
    with a_scene(tmp_path_factory.mktemp("scene")) as running:
        yield running
