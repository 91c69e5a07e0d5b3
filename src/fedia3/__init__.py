"""Federated on-device personalization of language models with IA3 vectors.

    import fedia3

    run = fedia3.simulate(fedia3.Settings(data="chats.jsonl", user_field="author", rounds=10))
    print(run.report.to_text())
    print(run.generate("alice", "hi"))
    run.save("alice", Path("alice"))  # a Hugging Face PEFT folder

    with fedia3.Coordinator.from_state() as home:  # on an enrolled device
        home.save(Path("mine"))

Names are imported when they are used: ``import fedia3`` costs nothing.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedia3.adapters.update import TrainingPlan
    from fedia3.client.coordinator import Coordinator
    from fedia3.client.splits import SplitPlan
    from fedia3.simulations.run import Run
    from fedia3.simulations.settings import Settings
    from fedia3.simulations.simulation import Watcher

__version__ = "0.1.0"
__all__ = ["Coordinator", "Run", "Settings", "SplitPlan", "TrainingPlan", "__version__", "simulate"]

_HOMES = {
    "Coordinator": "fedia3.client.coordinator",
    "Run": "fedia3.simulations.run",
    "Settings": "fedia3.simulations.settings",
    "SplitPlan": "fedia3.client.splits",
    "TrainingPlan": "fedia3.adapters.update",
}


def simulate(
    settings: "Settings | None" = None,
    folder: str | Path | None = None,
    watcher: "Watcher | None" = None,
) -> "Run":
    """Train a federation on this machine; the finished run.

    Args:
        settings: what to do, by default the embedded demo users on the shipped tiny base.
        folder: where to keep the run, by default ``./fedia3-runs/DATE``. A folder that holds a
            run continues it: then ``settings`` must be left out or be those it was started with.
        watcher: is told of every round; see :class:`fedia3.progress.TerminalProgress`.

    Raises:
        BadInput: the data cannot be read, or a setting is out of range.
        NotFound: no such base model or file.
    """
    from fedia3.simulations.run import Run  # noqa: PLC0415  # torch: seconds
    from fedia3.simulations.settings import RunFolder, Settings  # noqa: PLC0415  # as above
    from fedia3.simulations.simulation import simulate as run  # noqa: PLC0415  # as above

    path = Path(folder) if folder else None
    if path and (path / "run.json").exists():
        kept = RunFolder(path)
        settings = settings or kept.settings()
    else:
        kept, settings = RunFolder.new(path), settings or Settings()
    run(settings, kept, watcher)
    return Run.open(kept.path)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedia3' has no attribute {name!r}")
