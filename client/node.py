"""The device's Flower node: ``flower-supernode`` and our executor, kept running behind the gateway.

Both run no code but what is installed here; the executor finds the resident trainer by its socket.
The node is in Flower's ``process`` isolation with a secret, so that nobody else on this machine can
take a round's message in the executor's place.
"""

import os
import secrets
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fedia3.client.device import DeviceFolder, Enrolment
from fedia3.client.gateway import Gatekeeper, Gateway
from fedia3.client.trainer_socket import SOCKET_VARIABLE
from fedia3.private_files import write_private
from fedia3.processes import Backoff, Part, PartStatus, Supervisor, free_ports
from fedia3.proto import flower_process

AFTER_DEATH = Backoff(first_s=15.0, longest_s=30.0)  # until the old heartbeat's end it is refused
WAKE = signal.SIGURG  # an executor that is not ready for it ignores it


class Node:
    """The node of an enrolled device."""

    def __init__(
        self, folder: DeviceFolder, enrolment: Enrolment, trainer: Path, keeper: Gatekeeper
    ) -> None:
        self.enrolment, self.keeper = enrolment, keeper
        keeper.on_message = self._wake_executor
        self._gateway = Gateway(
            folder.path, enrolment.fleet_address, folder.ca(), keeper, folder.keys().node
        )
        self._supervisor = Supervisor(
            self._parts(folder, trainer), folder.path / "flower-parts.json"
        )

    async def start(self) -> None:
        """Join the fleet, as soon as it can be reached."""
        await self._gateway.start()
        await self._supervisor.start()

    async def stop(self) -> None:
        """Leave the fleet; what is under way is lost to this round."""
        await self._supervisor.stop(grace_s=5.0)
        await self._gateway.stop()

    def status(self) -> PartStatus:
        """How Flower's process is."""
        return self._supervisor.status("supernode")

    def _wake_executor(self) -> None:
        pid = self._supervisor.status("executor").pid
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, WAKE)

    def _parts(self, folder: DeviceFolder, trainer: Path) -> tuple[Part, Part]:
        address = f"127.0.0.1:{free_ports(1)[0]}"
        secret = folder.path / "superexec.secret"
        write_private(secret, secrets.token_hex(32).encode())
        env = flower_environment(folder.path / "flwr", trainer)
        supernode = (
            *("flower-supernode", "--superlink", self._gateway.address),
            *("--root-certificates", str(self._gateway.certificate)),
            *("--auth-supernode-private-key", str(folder.node_key_file)),
            *("--node-config", f'client="{self.enrolment.device_id}"'),
            *("--host", "127.0.0.1", "--port", address.rpartition(":")[2]),
            *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        )
        executor = (
            sys.executable,
            "-m",
            "fedia3.client.executor",
            address,
            str(secret),
            str(int(WAKE)),
        )
        return (
            Part("supernode", supernode, folder.logs / "supernode.log", env, None, AFTER_DEATH),
            Part("executor", executor, folder.logs / "executor.log", env),
        )


def flower_environment(home: Path, trainer: Path) -> Mapping[str, str]:
    """What Flower's processes are told; ``home`` is for Flower's own files."""
    return {**flower_process.environment(home), SOCKET_VARIABLE: str(trainer), **SMALL}


SMALL: Mapping[str, str] = {
    "MALLOC_ARENA_MAX": "2",  # glibc keeps freed memory for each thread otherwise
    "OPENBLAS_NUM_THREADS": "1",  # numpy's threads, which nobody here needs
}
