"""A finished run: its report, its users' adapters, and their models' words."""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fedia3.adapters import manifest
from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.dial import Alpha
from fedia3.adapters.peft_folder import write_peft_folder_for
from fedia3.adapters.schema import Schema
from fedia3.coordinator.records import LATEST, AdapterRecord, Owner
from fedia3.coordinator.registry import Effective, Registry, Which
from fedia3.errors import NotFound, WrongBaseModel
from fedia3.simulations.report import Report
from fedia3.simulations.settings import RunFolder

if TYPE_CHECKING:
    from fedia3.client.generation import Sampling


@dataclass(frozen=True)
class Run:
    """A run folder, read. ``seed`` picks the federation of a run with several."""

    folder: RunFolder
    seed: int

    @classmethod
    def open(cls, path: Path | None = None, seed: int | None = None) -> "Run":
        """The run in ``path``, by default the newest below ``./fedia3-runs``; its first seed.

        Raises:
            NotFound: there is no such run, or it has no such seed.
        """
        folder = RunFolder(path) if path else RunFolder.latest()
        seeds = folder.settings().seeds
        seed = seeds[0] if seed is None else seed
        if not (folder.registry(seed) / "registry.db").exists():
            raise NotFound(
                f"{folder.path} has no federation of seed {seed} (its seeds: "
                f"{', '.join(map(str, seeds))}); finish it with `fedia3 simulate --resume "
                f"{folder.path}`"
            )
        return cls(folder, seed)

    @cached_property
    def report(self) -> Report:
        """What the run did for each user.

        Raises:
            NotFound: the run is not finished.
        """
        if not (self.folder.path / "report.json").exists():
            raise NotFound(
                f"{self.folder.path} is not finished: `fedia3 simulate --resume "
                f"{self.folder.path}` continues at its last round"
            )
        return Report.read(self.folder.path)

    @cached_property
    def base_folder(self) -> Path:
        """The base model the run was trained on.

        Raises:
            NotFound: it is not on this machine any more.
            WrongBaseModel: in its place lies another one.
        """
        digest, named = self.folder.base(), self.folder.settings().base
        try:
            return BaseStore().find(digest)
        except NotFound:
            found = BaseStore().find(named)
        if manifest.read_manifest(found).digest != digest:
            raise WrongBaseModel(
                f"the run was trained on base model {digest[:12]}, {named} is another one now"
            )
        return found

    @cached_property
    def schema(self) -> Schema:
        """The adapters' schema."""
        return manifest.schema(manifest.read_manifest(self.base_folder))

    def users(self) -> list[str]:
        """Everybody in the run, those with too little text to train included."""
        trained = {result.user for result in self.report.users}
        return sorted(trained | set(self.report.facts.too_small))

    def adapter(self, user: str, alpha: Alpha = 1.0, which: Which = LATEST) -> Effective:
        """What ``user`` is served; ``alpha`` 0 is the global adapter, 1 their own.

        Args:
            which: of everyone's adapters, by number, digest or alias.

        Raises:
            NotFound: the run has no such user, or ``which`` names none of everyone's adapters.
        """
        self._require(user)
        with self._registry() as registry:
            return registry.resolve(user, self.schema, alpha, which)

    def versions(self) -> list[AdapterRecord]:
        """Every stored version: everyone's by round, then each user's."""
        with self._registry() as registry:
            owners = [Owner.everyone(), *(Owner.user(user) for user in self.users())]
            return [
                record
                for owner in owners
                for record in reversed(registry.versions(owner, self.schema.base_digest))
            ]

    def save(self, user: str, out: Path, alpha: Alpha = 1.0, which: Which = LATEST) -> Effective:
        """Write what ``user`` is served as a Hugging Face PEFT folder; see :meth:`adapter`.

        Raises:
            NotFound: the run has no such user, or ``which`` names none of everyone's adapters.
            BadInput: ``out`` holds something else than an adapter.
        """
        served = self.adapter(user, alpha, which)
        base = manifest.read_manifest(self.base_folder)
        write_peft_folder_for(base, served.adapter, out, base_name=str(self.base_folder))
        return served

    def generate(
        self, user: str, prompt: str, sampling: "Sampling | None" = None, alpha: Alpha = 1.0
    ) -> str:
        """What ``user``'s model writes after ``prompt``.

        Raises:
            NotFound: the run has no such user.
        """
        from fedia3.adapters.base_model import load  # noqa: PLC0415  # torch: seconds
        from fedia3.client import generation  # noqa: PLC0415  # as above

        served = self.adapter(user, alpha)
        sampling = sampling or generation.Sampling()
        return generation.generate(load(self.base_folder), served.adapter, prompt, sampling)

    def _registry(self) -> Registry:
        return Registry.open(self.folder.registry(self.seed))

    def _require(self, user: str) -> None:
        users = self.users()
        if user not in users:
            near = get_close_matches(user, users, n=3) or users[:3]
            raise NotFound(
                f"the run {self.folder.path} has no user {user!r}; did you mean "
                f"{', '.join(near)}? `fedia3 adapters` lists all {len(users)}"
            )
