"""Made once for all tests: a toy base model, a few people's chats, and a finished small run."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedia3.adapters.update import TrainingPlan
from fedia3.client.splits import SplitPlan
from fedia3.simulations.run import Run
from fedia3.simulations.settings import RunFolder, Settings
from fedia3.testing import tiny_base

if TYPE_CHECKING:
    from fedia3.adapters.base_model import BaseModel

WORDS = {"ann": "aaab", "bob": "xyzz", "cyd": "0123", "dee": "....?"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the failure drill's last test is."""
    parser.addoption("--kills", type=int, default=200, help="random kills of the failure drill")
    parser.addoption("--kill-seed", type=int, default=0, help="draws whom they hit, and when")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes long last: what is broken mostly shows before."""
    items.sort(key=lambda item: bool({"slow", "drill"} & {m.name for m in item.iter_markers()}))


@pytest.fixture(scope="session", autouse=True)
def nobodys_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test sees or touches the base models or the database of whoever runs it."""
    os.environ.pop("FEDIA3_DATABASE_URL", None)
    yield from _at_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module", autouse=True)
def home(nobodys_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What one file's tests download, those of another do not find."""
    yield from _at_home(tmp_path_factory.mktemp("home"))


def _at_home(folder: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDIA3_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 4-bit Llama that reads bytes and has seen ann's text; no test changes it."""
    folder = tmp_path_factory.mktemp("toy")
    tiny_base(folder, pretrained_on=["ann"])
    return folder


@pytest.fixture(scope="session")
def toy(toy_folder: Path) -> "BaseModel":
    """That base, loaded in float32."""
    from fedia3.adapters.base_model import load  # noqa: PLC0415  # only where a model is needed

    return load(toy_folder)


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four users with 12 texts each, and eve with 3."""
    rows = [
        {"user": user, "text": f"{word} {word} {number}"}
        for user, word in WORDS.items()
        for number in range(12)
    ]
    rows += [{"user": "eve", "text": f"hello {number}"} for number in range(3)]
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def small(toy_folder: Path, chats: Path) -> Settings:
    """Two rounds of three clients, short texts; about two seconds."""
    return Settings(
        data=str(chats),
        base=str(toy_folder),
        rounds=2,
        cohort=3,
        split=SplitPlan(min_examples=10),
        training=TrainingPlan(max_length=32),
        personal=TrainingPlan(max_length=32, epochs=2, patience=2),
    )


@pytest.fixture(scope="session")
def finished(small: Settings, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """That run, finished; no test changes it."""
    from fedia3.simulations.simulation import simulate  # noqa: PLC0415  # as above

    folder = RunFolder.new(tmp_path_factory.mktemp("run") / "finished")
    simulate(small, folder)
    return Run.open(folder.path)
