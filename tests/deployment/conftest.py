from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Deployment


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """An empty deployment; whatever it started is ended."""
    made = Deployment(tmp_path)
    yield made
    made.close()
