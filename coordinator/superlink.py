"""Flower's SuperLink as a part of the coordinator: how it is started, and what it is told.

Its control API asks nobody who they are, so it listens on this machine alone. Its database is a
queue: which devices there are stands in our directory, and is told to it again whenever it forgot.
"""

import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run as FlowerRun
from flwr.proto.transport_pb2 import Scalar
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError

from fedia3.coordinator.config import CONFIG_VARIABLE, CoordinatorConfig
from fedia3.errors import Conflict, Fedia3Error, NotFound, Unreachable
from fedia3.proto import flower_process
from fedia3.proto.app import App

CALL_S = 10.0  # for an answer of the SuperLink
NEWEST_RUNS = 100
KNOWN_S = 5.0  # how long a list of nodes is believed


@dataclass(frozen=True)
class Node:
    """A device as the SuperLink knows it."""

    node_id: int
    name: str  # the device's id
    public_key: bytes
    online: bool


@dataclass(frozen=True)
class Run:
    """One Flower run."""

    run_id: int
    state: str  # "pending", "starting", "running", "finished"
    ended_with: str = ""  # "completed", "failed" and what Flower says of it


def flower_environment(config: CoordinatorConfig) -> dict[str, str]:
    """What Flower's processes are started with, beside this process's environment."""
    return {
        **flower_process.environment(config.flower),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1.5",  # a run starts once in many rounds
        CONFIG_VARIABLE: str(config.file),
    }


def queue_file(config: CoordinatorConfig) -> Path:
    """The SuperLink's database: a queue, whose loss costs the round under way."""
    return config.flower / "superlink.db"


def forget_queue(config: CoordinatorConfig) -> None:
    """Have a SuperLink that is stopped begin anew; the scheduler tells it of every device again."""
    for file in config.flower.glob(f"{queue_file(config).name}*"):
        file.unlink()


def superlink_command(config: CoordinatorConfig) -> tuple[str, ...]:
    """The SuperLink: on this machine alone, over TLS, for registered nodes, with a memory."""
    return (
        "flower-superlink",
        "--host", "127.0.0.1",
        "--port", str(config.coordinator.superlink_port),
        "--ssl-ca-certfile", str(config.ca),
        "--ssl-certfile", str(config.certificate),
        "--ssl-keyfile", str(config.certificate_key),
        "--database", str(queue_file(config)),
        "--enable-supernode-auth",
        "--isolation", "process",
        "--superexec-auth-secret-file", str(config.superexec_secret),
        "--disable-runtime-dependency-installation",
    )  # fmt: skip


def superexec_command(config: CoordinatorConfig) -> tuple[str, ...]:
    """The superexec, which starts a process for every run."""
    return (
        "flower-superexec",
        "--runtime-api-address", config.superlink_address,
        "--root-certificates", str(config.ca),
        "--superexec-auth-secret-file", str(config.superexec_secret),
    )  # fmt: skip


class ControlLink:
    """What the coordinator tells its SuperLink.

    Any call may raise ``Unreachable``: the SuperLink is down or starting. Flower's client would go
    through a proxy that the environment names: :func:`flower_environment` rules that out.
    """

    def __init__(self, config: CoordinatorConfig, timeout_s: float = CALL_S) -> None:
        self._client = ControlHttpClient(
            f"https://{config.superlink_address}",
            verify=ssl.create_default_context(cafile=config.ca),
            timeout=timeout_s,
        )
        self._known: set[tuple[str, bytes]] = set()
        self._known_until = 0.0

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def register(self, device_id: str, node_key: bytes) -> None:
        """Let the device with this key take part; doing it again changes nothing.

        Raises:
            Conflict: the key is another device's, or one that was unregistered.
        """
        if (device_id, node_key) in self._registered():
            return
        with _translated():
            try:
                self._client.RegisterNode(RegisterNodeRequest(public_key=node_key, name=device_id))
            except httpx.HTTPStatusError as error:
                if _code(error) != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                    raise
                self._known_until = 0.0
                if (device_id, node_key) not in self._registered():
                    raise Conflict(
                        f"the SuperLink knows the key of device {device_id} under another name or "
                        "as unregistered; let the device enrol anew"
                    ) from error

    def _registered(self) -> set[tuple[str, bytes]]:
        """Names and keys, as they were a moment ago: a whole fleet may ask one after the other."""
        if time.monotonic() >= self._known_until:
            self._known = {(node.name, node.public_key) for node in self.nodes()}
            self._known_until = time.monotonic() + KNOWN_S
        return self._known

    def unregister(self, device_id: str) -> None:
        """Shut a device out; one that the SuperLink does not know is out already."""
        self._known_until = 0.0
        for node in self.nodes():
            if node.name == device_id:
                with _translated():
                    self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))

    def nodes(self) -> tuple[Node, ...]:
        """Every registered node."""
        with _translated():
            answer = self._client.ListNodes(ListNodesRequest())
        return tuple(_node(info) for info in answer.nodes_info if info.status != "unregistered")

    def start_run(self, app: App, rounds: int) -> int:
        """Start a run of ``rounds`` rounds; its id.

        Raises:
            Fedia3Error: the SuperLink would not.
        """
        request = StartRunRequest(
            fab=Fab(hash_str=app.digest, content=app.content),
            override_config={"rounds": Scalar(sint64=rounds)},
        )
        with _translated():
            run_id = int(self._client.StartRun(request).run_id)
        if not run_id:
            raise Fedia3Error("the SuperLink would not start a run; its log says why")
        return run_id

    def stop_run(self, run_id: int) -> None:
        """End a run; one that is over already stays over."""
        with _translated():
            try:
                self._client.StopRun(StopRunRequest(run_id=run_id))
            except httpx.HTTPStatusError as error:
                over = (ApiErrorCode.RUN_ALREADY_FINISHED, ApiErrorCode.RUN_ID_NOT_FOUND)
                if _code(error) not in over:
                    raise

    def run(self, run_id: int) -> Run:
        """How a run is.

        Raises:
            NotFound: the SuperLink knows no such run.
        """
        with _translated():
            try:
                runs = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
            except httpx.HTTPStatusError as error:
                if _code(error) != ApiErrorCode.RUN_ID_NOT_FOUND:
                    raise
                raise NotFound(f"the SuperLink knows no run {run_id}") from error
        return _run(runs[run_id])

    def runs(self) -> tuple[Run, ...]:
        """The newest hundred runs."""
        with _translated():
            answer = self._client.ListRuns(ListRunsRequest(limit=NEWEST_RUNS))
        return tuple(_run(run) for run in answer.run_dict.values())


@contextmanager
def _translated() -> Iterator[None]:
    """Flower's and httpx's errors as ours."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        if error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise Unreachable(f"the SuperLink failed ({error.response.status_code})") from error
        said = FlowerError.from_json(error.response.text)
        what = said.message if said else error.response.text[:200]
        raise Fedia3Error(f"the SuperLink refused: {what}") from error
    except httpx.HTTPError as error:
        raise Unreachable(f"the SuperLink does not answer ({type(error).__name__})") from error


def _code(error: httpx.HTTPStatusError) -> int | None:
    said = FlowerError.from_json(error.response.text)
    return int(said.code) if said else None


def _node(info: NodeInfo) -> Node:
    return Node(info.node_id, info.name, info.public_key, online=info.status == "online")


def _run(run: FlowerRun) -> Run:
    status = run.status
    ended_with = ": ".join(filter(None, (status.sub_status, status.details)))
    return Run(run.run_id, status.status, ended_with)
