"""What we rely on in Flower, held against the installed one; and the real SuperLink."""

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from flwr.proto.control_pb2 import ListNodesResponse, RegisterNodeRequest, StartRunRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run as FlowerRun
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes

from fedia3.coordinator.answers import superlink_answers
from fedia3.coordinator.config import CoordinatorConfig
from fedia3.coordinator.superlink import (
    ControlLink,
    flower_environment,
    superexec_command,
    superlink_command,
)
from fedia3.errors import Conflict, NotFound, Unreachable
from fedia3.processes import Backoff, Part, Supervisor, environment
from fedia3.proto.app import thin_app
from fedia3.proto.fleet import OPERATIONS

NewCoordinator = Callable[[Path], CoordinatorConfig]


@pytest.mark.slow
@pytest.mark.parametrize("command", [superlink_command, superexec_command])
def test_flower_has_the_flags_we_give(
    command, new_coordinator: NewCoordinator, tmp_path: Path
) -> None:
    """
    Each option of our command lines is in the program's own help.
    """
    program, *words = command(new_coordinator(tmp_path))
    shown = subprocess.run(
        [program, "--help"], env=environment(), capture_output=True, text=True, check=True
    )
    for word in words:
        if word.startswith("--"):
            assert word in shown.stdout


def test_flowers_messages_have_the_fields_we_read() -> None:
    """
    Nodes by name, key and status; runs by status; a run's app and settings.
    """
    assert {"node_id", "name", "public_key", "status"} <= set(NodeInfo.DESCRIPTOR.fields_by_name)
    assert {"public_key", "name"} <= set(RegisterNodeRequest.DESCRIPTOR.fields_by_name)
    assert {"fab", "override_config"} <= set(StartRunRequest.DESCRIPTOR.fields_by_name)
    assert {"run_id", "status"} <= set(FlowerRun.DESCRIPTOR.fields_by_name)
    assert "nodes_info" in ListNodesResponse.DESCRIPTOR.fields_by_name
    assert len(OPERATIONS) == 10


def test_no_secret_is_in_a_command_line(new_coordinator: NewCoordinator, tmp_path: Path) -> None:
    """
    Whoever lists this machine's processes reads paths, no keys.
    """
    config = new_coordinator(tmp_path)
    secret = config.superexec_secret.read_text()
    words = [*superlink_command(config), *superexec_command(config)]
    assert not any(secret in word for word in words)
    assert not any(secret in value for value in flower_environment(config).values())


def test_the_thin_app_has_no_code() -> None:
    """
    Two files and Flower's own list of them; its hash is its bytes'.
    """
    import hashlib  # noqa: PLC0415  # only here
    import io  # noqa: PLC0415  # as above
    import zipfile  # noqa: PLC0415  # as above

    app = thin_app()
    names = zipfile.ZipFile(io.BytesIO(app.content)).namelist()
    assert sorted(names) == [".info/CONTENT", "LICENSE", "pyproject.toml"]
    assert hashlib.sha256(app.content).hexdigest() == app.digest


def test_a_superlink_that_is_down_is_unreachable(
    new_coordinator: NewCoordinator, tmp_path: Path
) -> None:
    """
    Every call says so.
    """
    config = new_coordinator(tmp_path)
    assert asyncio.run(superlink_answers(config)) is False
    with closing(ControlLink(config, timeout_s=1.0)) as link:
        with pytest.raises(Unreachable):
            link.nodes()
        with pytest.raises(Unreachable):
            link.register("a" * 32, b"key")


@dataclass(frozen=True)
class RunningFlower:
    """A SuperLink without a superexec: runs wait."""

    link: ControlLink
    config: CoordinatorConfig


@pytest.fixture(scope="module")
def flower(
    new_coordinator: NewCoordinator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningFlower]:
    """A real SuperLink; no test leaves anything behind that another minds."""
    config = new_coordinator(tmp_path_factory.mktemp("flower"))

    async def up() -> bool:
        return await superlink_answers(config)

    part = Part(
        "superlink", superlink_command(config), config.logs / "superlink.log",
        flower_environment(config), up, Backoff(), grace_s=2.0,
    )  # fmt: skip
    with asyncio.Runner() as runner:
        supervisor = Supervisor([part], config.parts_file)
        runner.run(supervisor.start())
        assert runner.run(supervisor.wait_ready(60))
        with closing(ControlLink(config)) as link:
            yield RunningFlower(link, config)
        runner.run(supervisor.stop())


def new_key() -> bytes:
    """A node's public key."""
    return public_key_to_bytes(generate_key_pairs()[1])


@pytest.mark.slow
def test_a_device_is_registered_once(flower: RunningFlower) -> None:
    """
    Doing it again changes nothing; the node bears the device's id and key.
    """
    key = new_key()
    flower.link.register("a" * 32, key)
    flower.link.register("a" * 32, key)
    (node,) = [n for n in flower.link.nodes() if n.name == "a" * 32]
    assert (node.public_key, node.online) == (key, False)


@pytest.mark.slow
def test_a_key_of_another_device_is_a_conflict(flower: RunningFlower) -> None:
    """
    One key, one device.
    """
    key = new_key()
    flower.link.register("b" * 32, key)
    with pytest.raises(Conflict):
        flower.link.register("c" * 32, key)


@pytest.mark.slow
def test_a_device_is_shut_out_once(flower: RunningFlower) -> None:
    """
    Doing it again changes nothing; its key does not come back.
    """
    key = new_key()
    flower.link.register("d" * 32, key)
    flower.link.unregister("d" * 32)
    flower.link.unregister("d" * 32)
    assert all(node.name != "d" * 32 for node in flower.link.nodes())
    with pytest.raises(Conflict):
        flower.link.register("d" * 32, key)


@pytest.mark.slow
def test_a_run_is_started_and_ended(flower: RunningFlower) -> None:
    """
    It waits for a superexec; ended, it stays so. A run that is not there is not found.
    """
    run_id = flower.link.start_run(thin_app(), rounds=3)
    assert flower.link.run(run_id).state == "pending"
    assert run_id in [run.run_id for run in flower.link.runs()]
    flower.link.stop_run(run_id)
    flower.link.stop_run(run_id)
    ended = flower.link.run(run_id)
    assert (ended.state, ended.ended_with) == ("finished", "stopped")
    with pytest.raises(NotFound):
        flower.link.run(12345)
