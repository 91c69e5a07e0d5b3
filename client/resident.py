"""The trainer's process as the agent keeps it: with the base that is wanted, held when it must."""

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedia3.adapters import manifest
from fedia3.adapters.manifest import Manifest
from fedia3.adapters.schema import Schema
from fedia3.client.device import DeviceFolder
from fedia3.client.node import SMALL
from fedia3.client.trainer_settings import TrainerSettings
from fedia3.client.trainer_socket import RemoteTrainer, TrainerStatus, place_socket
from fedia3.errors import Fedia3Error, Unreachable
from fedia3.processes import Part, Supervisor


@dataclass(frozen=True)
class LocalBase:
    """A base model on this machine, not loaded."""

    path: Path
    manifest: Manifest

    @classmethod
    def at(cls, path: Path) -> "LocalBase":
        """The one in a folder.

        Raises:
            NotFound, BadInput: it holds none that can be read.
        """
        return cls(path, manifest.read_manifest(path))

    @property
    def digest(self) -> str:
        """Its identity."""
        return self.manifest.digest

    @cached_property
    def schema(self) -> Schema:
        """The shape of its adapters."""
        return manifest.schema(self.manifest)


MakeSettings = Callable[[Path, Path], TrainerSettings]  # from the base's folder and the socket

TRAINER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    # oneDNN keeps the code it writes for each shape: 60 MB for texts of many lengths
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
}
TRAINER = (sys.executable, "-m", "fedia3.client.trainer_process")

logger = logging.getLogger(__name__)


class Resident:
    """The one trainer of a state folder."""

    def __init__(
        self,
        folder: DeviceFolder,
        make_settings: MakeSettings,
        threads: int,
        program: Sequence[str] = TRAINER,
    ) -> None:
        self.base: LocalBase | None = None
        self.status: TrainerStatus | None = None  # None: it is not there, or loading
        self.last: TrainerStatus | None = None  # what it said last
        self.socket = place_socket(folder.path)
        self.remote = RemoteTrainer(self.socket)
        self._make_settings = make_settings
        self._settings_file = folder.path / "trainer.json"
        part = Part(
            "trainer",
            (*program, str(self._settings_file)),
            folder.logs / "trainer.log",
            {**SMALL, **TRAINER_ENVIRONMENT, "OMP_NUM_THREADS": str(threads)},
            self._is_ready,
        )
        self._supervisor = Supervisor((part,), folder.path / "trainer-parts.json")
        self._is_cleaned = False

    @property
    def state(self) -> str:
        """``stopped``, ``starting``, ``running`` or, between two starts, ``waiting``."""
        return self._supervisor.status("trainer").state

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._supervisor.status("trainer").pid

    async def use(self, base: LocalBase) -> None:
        """Have the trainer run on this base; nothing happens where it does."""
        if self.base is not None and self.base.digest == base.digest:
            return
        await self.rest()
        self._make_settings(base.path, self.socket).write(self._settings_file)
        if self._is_cleaned:
            self._supervisor.start_part("trainer")
        else:
            await self._supervisor.start()  # ends what a killed agent left, too
            self._is_cleaned = True
        self.base = base
        logger.info(
            "the trainer starts on base model %s (%s)", base.manifest.name, base.digest[:12]
        )

    async def rest(self) -> None:
        """End the process; its memory goes back to the machine."""
        self.status = self.base = None
        await self._supervisor.stop_part("trainer", grace_s=5.0)

    async def look(self) -> None:
        """Ask how it is."""
        if self.state != "running":
            self.status = None
            return
        try:
            self.status = self.last = await asyncio.to_thread(self.remote.status)
        except Fedia3Error:
            self.status = None

    async def hold(self, held: bool) -> None:
        """Have it stop between two batches, or go on."""
        if self.status is not None and self.status.is_held != held:
            with suppress(Unreachable):  # it just ended
                await asyncio.to_thread(self.remote.hold, held)

    async def _is_ready(self) -> bool:
        try:
            await asyncio.to_thread(self.remote.status)
        except Fedia3Error:
            return False
        return True
