import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "bitsandbytes")


def loaded_by(*modules: str) -> set[str]:
    """The names of all modules that a new interpreter has loaded after importing these."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(process.stdout.split())


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """The project's import contracts, checked on the sources under ``root/src``."""
    code = "import sys; from importlinter.cli import lint_imports_command as go; go()"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache", "--config", str(ROOT / "pyproject.toml")],
        cwd=root, env={"PYTHONPATH": str(root / "src")}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_the_import_contracts_hold():
    """One way between the folders; flwr and SQLAlchemy only where they belong."""
    checked = lint_imports(ROOT)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("coordinator/cohort.py", "import flwr.app", "only the wire edges touch flwr"),
        ("coordinator/cohort.py", "import sqlalchemy", "only the SQL stores touch SQLAlchemy"),
        ("client/flower.py", "import fedia3.coordinator.gate", "imports run one way"),
    ],
)
def test_the_import_contracts_can_be_broken(tmp_path, module, line, contract):
    """A forbidden import in a copy of the sources is found."""
    copy = tmp_path / "src"
    shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__", "bases"))
    path = copy / "fedia3" / module
    path.write_text(path.read_text() + f"\n{line}\n")
    checked = lint_imports(tmp_path)
    assert checked.returncode == 1
    broken = [text for text in checked.stdout.splitlines() if " BROKEN" in text]
    assert [text.startswith(contract) for text in broken] == [True]


def test_the_coordinator_runs_rounds_without_torch():
    """Rounds, registry and the Flower edge leave the model's libraries unloaded."""
    loaded = loaded_by(
        "fedia3.coordinator.rounds", "fedia3.coordinator.registry", "fedia3.coordinator.flower"
    )
    assert "flwr" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_services_need_no_model_and_no_flower():
    """What answers devices starts fast: neither torch nor Flower, and a database once opened."""
    loaded = loaded_by("fedia3.coordinator.services.server", "fedia3.coordinator.directory")
    assert loaded.isdisjoint({"flwr", "sqlalchemy", *HEAVY})


def test_rounds_without_flower_load_neither_flower_nor_a_database():
    """The loop itself knows no transport and no SQL."""
    assert loaded_by("fedia3.coordinator.rounds").isdisjoint({"flwr", "sqlalchemy", *HEAVY})


@pytest.mark.parametrize("module", ["agent", "flower", "executor"])
def test_a_device_is_thin_around_its_trainer(module):
    """What runs all day, and what answers messages, loads neither torch nor the coordinator."""
    loaded = loaded_by(f"fedia3.client.{module}")
    assert "flwr" in loaded
    assert loaded.isdisjoint(HEAVY)
    assert not any(name.startswith("fedia3.coordinator") for name in loaded)
