"""A whole coordinator as its operator has it: one command, real processes, real kills."""

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil
import pytest

from fedia3.coordinator.certificates import Issued, ends_at, make_server_certificate
from fedia3.coordinator.config import CoordinatorConfig
from fedia3.coordinator.operator import Operator
from fedia3.coordinator.serve import parts_of
from fedia3.errors import Fedia3Error
from fedia3.processes import read_statuses

NewCoordinator = Callable[[Path], CoordinatorConfig]
NAMES = ["superlink", "superexec", "proxy", "service"]
PATIENCE_S = 90.0

pytestmark = pytest.mark.slow


def eventually(holds: Callable[[], object], what: str) -> None:
    """Wait for something that takes seconds on an idle machine."""
    ends = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < ends, f"not within {PATIENCE_S:g} s: {what}"
        time.sleep(0.1)


class Served:
    """``fedia3 coordinator serve`` and what it says."""

    def __init__(self, config: CoordinatorConfig, before: str = "") -> None:
        self.config = config
        self.said = config.folder / f"said-{time.monotonic_ns()}"
        with self.said.open("ab") as out:
            self.process = psutil.Popen(
                [sys.executable, "-c", f"{before}\nfrom fedia3.cli import main; main()",
                 "coordinator", "serve", "--config", str(config.folder)],
                stderr=out, stdout=out,
            )  # fmt: skip

    def says(self, line: str) -> bool:
        return line in self.said.read_text()

    def pid(self, name: str) -> int:
        (pid,) = [s.pid for s in read_statuses(self.config.parts_file) if s.name == name]
        return pid or 0

    @property
    def all_run(self) -> bool:
        states = [s.state for s in read_statuses(self.config.parts_file)]
        return states == ["running"] * len(NAMES)

    def answers(self) -> bool:
        """Whether the operator gets an answer."""
        try:
            with Operator.open(self.config.operator, timeout_s=2.0) as operator:
                return operator.status().round_num is None
        except Fedia3Error:
            return False

    def kill_all(self) -> None:
        """Leave nothing running, whatever the test did."""
        groups = [s.pid for s in read_statuses(self.config.parts_file) if s.pid]
        self.process.kill()  # its parts die with it, what they started themselves may not
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.process.wait()


@contextmanager
def served(config: CoordinatorConfig, before: str = "") -> Iterator[Served]:
    """The coordinator, up; stopped the hard way if the test did not stop it.

    ``before`` is run in its process first.
    """
    coordinator = Served(config, before)
    try:
        eventually(lambda: coordinator.says("all parts are up"), "all parts up")
        yield coordinator
    finally:
        if coordinator.process.poll() is None:
            coordinator.kill_all()


def test_every_part_comes_back_by_itself(new_coordinator: NewCoordinator, tmp_path: Path) -> None:
    """
    Each is killed; the log says of what it died, and the operator's next call is answered.
    """
    with served(new_coordinator(tmp_path)) as coordinator:
        for name in NAMES:
            os.kill(before := coordinator.pid(name), signal.SIGKILL)
            eventually(
                lambda name=name, before=before: (
                    coordinator.all_run and coordinator.pid(name) != before
                ),
                f"{name} back",
            )
            assert coordinator.says(f"{name} ended with signal 9; starting it again in 0.5 s")
            eventually(coordinator.answers, "the service's answer")


def test_a_part_that_hangs_is_started_again(
    new_coordinator: NewCoordinator, tmp_path: Path
) -> None:
    """
    Its process lives and its port is open, but nobody answers: after a while it is killed.
    """
    soon = "import fedia3.coordinator.serve as serve; serve.HUNG_S = 8.0"
    with served(new_coordinator(tmp_path), soon) as coordinator:
        hung = {name: coordinator.pid(name) for name in ("superlink", "proxy", "service")}
        for pid in hung.values():
            os.kill(pid, signal.SIGSTOP)
        for name, pid in hung.items():
            eventually(
                lambda name=name, pid=pid: coordinator.all_run and coordinator.pid(name) != pid,
                f"{name} back",
            )
            assert coordinator.says(f"{name} lives, but gave no answer for 8 s; killing it")
        eventually(coordinator.answers, "the service's answer")


def certificate_at(port: int) -> bytes:
    """What the server on this port shows, DER; empty while nobody listens."""
    try:
        return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", port), timeout=5))
    except OSError:
        return b""


def test_a_certificate_that_ends_soon_is_replaced_while_everything_runs(
    new_coordinator: NewCoordinator, tmp_path: Path
) -> None:
    """
    Nobody restarts the coordinator: all its servers show the new one by themselves.
    """
    config = new_coordinator(tmp_path)
    fresh = ssl.PEM_cert_to_DER_cert(config.certificate.read_text().partition("\n-----BEGIN")[0])
    ports = (
        config.coordinator.grpc_port,
        config.coordinator.fleet_port,
        config.coordinator.superlink_port,
    )
    with served(config, "import fedia3.coordinator.serve as s; s.RENEWED_EVERY_S = 2.0") as served_:
        assert {certificate_at(port) for port in ports} == {fresh}
        authority = Issued(config.ca.read_bytes(), config.ca_key.read_bytes())
        old = make_server_certificate(
            authority, config.coordinator.hosts, datetime.now(UTC) - timedelta(days=380)
        )
        config.certificate_key.write_bytes(old.key)
        config.certificate.write_bytes(old.certificate)
        eventually(
            lambda: (
                not {certificate_at(port) for port in ports} & {fresh, b""}
                and served_.all_run
                and served_.answers()
            ),
            "a new certificate everywhere",
        )
        assert ends_at(config.certificate.read_bytes()) > datetime.now(UTC) + timedelta(days=300)


def test_sigterm_ends_everything_and_a_kill_leaves_nothing_in_the_way(
    new_coordinator: NewCoordinator, tmp_path: Path
) -> None:
    """
    Killed with -9, the coordinator starts again at once; told to stop, it stops and no part stays.
    """
    config = new_coordinator(tmp_path)
    with served(config) as coordinator:
        pids = [coordinator.pid(name) for name in NAMES]
        coordinator.process.kill()
        coordinator.process.wait()
    with served(config) as coordinator:
        assert not set(pids) & {coordinator.pid(name) for name in NAMES}
        pids = [coordinator.pid(name) for name in NAMES]
        coordinator.process.terminate()
        assert coordinator.process.wait(60) == 0
        assert coordinator.says("serve: stopped")
        assert not any(psutil.pid_exists(pid) for pid in pids)


def test_the_fleets_door_shows_nothing_of_flower(
    new_coordinator: NewCoordinator, tmp_path: Path
) -> None:
    """
    From outside: no control API, no registration, no documentation; a stranger's poll is refused.
    """
    config = new_coordinator(tmp_path)
    with served(config):
        verify = ssl.create_default_context(cafile=config.ca)
        with httpx.Client(base_url=f"https://{config.fleet_address}", verify=verify) as client:
            for path in ("/v1/control/start-run", "/v1/fleet/register-node", "/docs"):
                assert client.post(path, content=b"").status_code == 404
            assert client.post("/v1/fleet/pull-messages", content=b"").status_code == 401


def test_two_coordinators_do_not_serve_one_folder(
    new_coordinator: NewCoordinator, tmp_path: Path
) -> None:
    """
    The second says so and leaves with 5; the first goes on.
    """
    config = new_coordinator(tmp_path)
    with served(config) as coordinator:
        second = subprocess.run(
            [sys.executable, "-c", "from fedia3.cli import main; main()",
             "coordinator", "serve", "--config", str(config.folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert second.returncode == 5
        assert "already" in second.stderr
        assert coordinator.answers()


def test_a_taken_port_is_named_at_once(new_coordinator: NewCoordinator, tmp_path: Path) -> None:
    """
    Instead of a part that dies of it again and again.
    """
    config = new_coordinator(tmp_path / "first")
    other = new_coordinator(tmp_path / "second")
    text = other.file.read_text()
    other.file.write_text(
        text.replace(
            f"grpc_port = {other.coordinator.grpc_port}",
            f"grpc_port = {config.coordinator.grpc_port}",
        )
    )
    with served(config):
        refused = subprocess.run(
            [sys.executable, "-c", "from fedia3.cli import main; main()",
             "coordinator", "serve", "--config", str(other.folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert refused.returncode == 5
        assert f"127.0.0.1:{config.coordinator.grpc_port}" in refused.stderr


def test_the_parts_start_in_the_order_in_which_they_need_each_other(
    new_coordinator: NewCoordinator, tmp_path: Path
) -> None:
    """
    And stop the other way round: the service first, which says that it serves no more.
    """
    config = new_coordinator(tmp_path)
    assert [part.name for part in parts_of(config)] == NAMES
    assert json.loads(config.operator.read_text())["address"] == config.address
