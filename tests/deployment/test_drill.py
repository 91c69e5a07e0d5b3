"""The failure drill: real processes, real kills. After each: nothing lost, nothing counted twice,
the service back without a person, and a log line that says what happened.

``--kills N`` sets how many random kills the last test makes (200; 1,000 is the full drill):

    pytest tests/deployment/test_drill.py -m drill -k random --kills 1000
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ledger
import psutil
import pytest
from harness import (
    Deployment,
    RunningCoordinator,
    RunningDevice,
    eventually,
    light_deployment,
    named,
)

from fedia3.testing import CuttingProxy

pytestmark = pytest.mark.drill

USERS = ("ann", "bob", "cyd")
SUPERVISED = {  # part: a word of its command line
    "superlink": "flower-superlink",
    "superexec": "flower-superexec",
    "proxy": "parts proxy",
    "service": "parts service",
}
ON_DEVICE = {
    "supernode": "flower-supernode",
    "executor": "fedia3.client.executor",
    "trainer": "light_trainer.py",
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A coordinator and three light devices, rounds under way; ann's device publishes."""
    made = light_deployment(tmp_path_factory.mktemp("drill"), USERS)
    try:
        for device in made.devices:
            device.run_light()
        made.coordinators[0].wait_for_round(2)
        yield made
    finally:
        made.close()


@pytest.fixture
def publisher(running: Deployment) -> Iterator[ledger.Publisher]:
    """Publishes all through a test; at its end the registry is looked through."""
    coordinator, ann = running.coordinators[0], running.devices[0]
    with ledger.Publisher(ann.state) as publishing:
        eventually(lambda: publishing.acknowledged, "a publish is acknowledged")
        yield publishing
    ACKNOWLEDGED.update(publishing.acknowledged)
    ledger.check(coordinator.folder / "registry", ACKNOWLEDGED, ann.user)


ACKNOWLEDGED: dict[str, int] = {}  # by every test of this module


def kill(process: psutil.Process) -> None:
    """Without a word of warning."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def more_rounds(coordinator: RunningCoordinator, publisher: ledger.Publisher) -> None:
    """Rounds and publishes go on."""
    rounds, published = coordinator.round_num(), len(publisher.acknowledged)
    coordinator.wait_for_round(rounds + 2, within_s=180)
    eventually(lambda: len(publisher.acknowledged) > published, "publishing goes on")


@pytest.mark.parametrize("part", SUPERVISED)
def test_a_killed_part_of_the_coordinator_comes_back(running, publisher, part):
    """Its supervisor starts it again and says so; rounds and publishes go on."""
    coordinator = running.coordinators[0]
    said = len(coordinator.log.read_text())
    kill(named(coordinator.process, SUPERVISED[part])[0])
    more_rounds(coordinator, publisher)
    assert f"{part} ended with signal 9; starting it again" in coordinator.log.read_text()[said:]


def test_a_killed_server_app_is_replaced(running, publisher):
    """A new run starts behind the last committed round, without waiting for anybody."""
    coordinator = running.coordinators[0]
    said = len(coordinator.log.read_text())
    app = eventually(lambda: named(coordinator.process, "flwr-serverapp"), "a run is under way")
    kill(app[0])
    more_rounds(coordinator, publisher)
    assert "run" in coordinator.log.read_text()[said:]


def test_a_killed_supervisor_leaves_nothing_behind(running, publisher):
    """Its parts die with it or are ended by the next; the next goes on."""
    coordinator = running.coordinators[0]
    assert coordinator.process is not None
    parts = coordinator.process.children(recursive=True)
    coordinator.kill()
    coordinator.serve()
    _, alive = psutil.wait_procs(parts, timeout=10)
    assert [" ".join(p.cmdline())[:80] for p in alive] == []
    more_rounds(coordinator, publisher)


@pytest.mark.parametrize("part", ON_DEVICE)
def test_a_killed_part_of_a_device_comes_back(running, publisher, part):
    """The agent starts it again and says so; the device takes part in rounds again."""
    coordinator, device = running.coordinators[0], running.devices[1]
    log = device.state / "logs" / "agent.log"
    said = len(log.read_text())
    kill(eventually(lambda: named(device.process, ON_DEVICE[part]), f"{part} runs")[0])
    more_rounds(coordinator, publisher)
    assert f"{part} ended with signal 9; starting it again" in log.read_text()[said:]
    wait_until_asked(coordinator, device)


def test_a_killed_agent_leaves_nothing_behind(running, publisher):
    """Started again, as a service manager does, it takes part again."""
    coordinator, device = running.coordinators[0], running.devices[2]
    assert device.process is not None
    parts = device.process.children(recursive=True)
    kill(device.process)
    device.process.wait(10)
    device.run_light()
    _, alive = psutil.wait_procs(parts, timeout=20)
    assert [" ".join(p.cmdline())[:80] for p in alive] == []
    more_rounds(coordinator, publisher)
    wait_until_asked(coordinator, device)


def wait_until_asked(coordinator: RunningCoordinator, device: RunningDevice) -> None:
    """A round that is committed from now on has an accepted update of the device."""
    before = coordinator.round_num()
    eventually(
        lambda: (
            coordinator.round_num() > before and device.device_id in coordinator.last_accepted()
        ),
        f"{device.user}'s device is part of a round",
        within_s=240,
    )


def test_a_device_that_stalls_costs_the_others_a_deadline(running, publisher):
    """A stopped device is missing from rounds, which go on; once it goes on it is back."""
    coordinator, device = running.coordinators[0], running.devices[1]
    executor = eventually(lambda: named(device.process, ON_DEVICE["executor"]), "it runs")[0]
    executor.suspend()
    try:
        rounds = coordinator.round_num()
        coordinator.wait_for_round(rounds + 2, within_s=180)
        assert device.device_id not in coordinator.last_accepted()
        log = (coordinator.folder / "logs" / "rounds.log").read_text()
        assert f"{device.device_id} is missing" in log
    finally:
        executor.resume()
    wait_until_asked(coordinator, device)


def test_a_cut_network_heals(running, publisher):
    """
    All of a device's connections are reset, then nothing passes for a while, then it drips; the
    others' rounds go on, and the device is back without anybody touching it.
    """
    coordinator, device = running.coordinators[0], running.devices[2]
    device.stop()
    fleet = CuttingProxy(f"127.0.0.1:{coordinator.ports[1]}")
    services = CuttingProxy(coordinator.address)
    with fleet, services:
        device.route(services.address, fleet.address)
        device.run_light()
        wait_until_asked(coordinator, device)
        for network in (fleet, services):
            network.cut()
            network.stall()
        more_rounds(coordinator, publisher)
        eventually(
            lambda: "does not answer" in device.cli("status")["line"],
            "the device says that nobody answers",
        )
        for network in (fleet, services):
            network.cut()
            network.flow()
        wait_until_asked(coordinator, device)
        device.stop()
    device.route(coordinator.address, f"127.0.0.1:{coordinator.ports[1]}")
    device.run_light()
    wait_until_asked(coordinator, device)


def can_mount() -> bool:
    """Whether this test may make a small file system."""
    return os.geteuid() == 0 and sys.platform == "linux" and shutil.which("mount") is not None


@pytest.mark.skipif(not can_mount(), reason="needs root on Linux, to mount a small file system")
def test_a_full_disk_stops_writes_and_nothing_else(tmp_path):
    """
    With the coordinator's disk full, no round and no publish is acknowledged, reads go on and every
    part stays up; with room again both go on without a restart.
    """
    small = tmp_path / "coordinator"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(small)], check=True)
    made = None
    try:
        made = light_deployment(tmp_path, ("ann",))
        coordinator, (device,) = made.coordinators[0], made.devices
        device.run_light()
        coordinator.wait_for_round(1)
        with ledger.Publisher(device.state) as publishing:
            eventually(lambda: publishing.acknowledged, "a publish is acknowledged")
            filler = small / "filler"
            fill(filler)
            eventually(lambda: "StorageFailed" in " ".join(publishing.refused), "a clear refusal")
            assert coordinator.cli("devices")  # reads go on
            stood = coordinator.round_num()
            time.sleep(10)
            assert coordinator.round_num() <= stood + 1  # one that was being written may fit
            filler.unlink()
            more_rounds(coordinator, publishing)
        ledger.check(coordinator.folder / "registry", publishing.acknowledged, device.user)
    finally:
        if made is not None:
            made.close()
        subprocess.run(["umount", "-l", str(small)], check=True)


def fill(path: Path) -> None:
    """Until nothing more fits."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * (1 << 14)):
            pass
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0"):
            pass


can_step = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)


@can_step
@pytest.mark.parametrize("step_s", [3600, -3600])
def test_a_wrong_clock_does_not_shut_a_device_out(tmp_path, step_s):
    """A device whose clock is an hour off publishes and takes part in rounds."""
    made = light_deployment(tmp_path, ("ann",))
    try:
        coordinator, (device,) = made.coordinators[0], made.devices
        device.env.update(stepping(tmp_path, step_s))
        device.run_light(share=True)
        wait_until_asked(coordinator, device)
        eventually(lambda: device.cli("status").get("shared_version"), "its part is shared")
    finally:
        made.close()


@can_step
def test_a_clock_that_steps_under_the_coordinator(tmp_path):
    """Its clock leaps an hour ahead and back while rounds run; they go on, and nothing is lost."""
    made = light_deployment(tmp_path, ("ann", "bob"), coordinator_env=stepping(tmp_path, 0))
    try:
        coordinator, device = made.coordinators[0], made.devices[0]
        for each in made.devices:
            each.run_light()
        coordinator.wait_for_round(2)
        with ledger.Publisher(device.state) as publishing:
            for step_s in (3600, 0):
                stepping(tmp_path, step_s)
                more_rounds(coordinator, publishing)
        ledger.check(coordinator.folder / "registry", publishing.acknowledged, device.user)
    finally:
        made.close()


def stepping(folder: Path, step_s: int) -> dict[str, str]:
    """The environment of programs whose wall clock is off by ``step_s``; again, it steps."""
    source, library = Path(__file__).with_name("stepping_clock.c"), folder / "clock.so"
    clock = folder / "clock"
    clock.write_text(str(step_s))
    if not library.exists():
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "STEPPED_CLOCK": str(clock)}


def test_random_kills_during_live_rounds(running, publisher, request):
    """Any process of the coordinator or of a device, at any moment, again and again."""
    coordinator = running.coordinators[0]
    lots = random.Random(request.config.getoption("--kill-seed"))
    first = coordinator.round_num()
    for number in range(request.config.getoption("--kills")):
        time.sleep(lots.uniform(0.3, 3.5))
        kill_any(running, lots)
        if number % 50 == 49:  # the loop cannot be passed by a federation that stands still
            more_rounds(coordinator, publisher)
            ledger.check(
                coordinator.folder / "registry", {**ACKNOWLEDGED, **publisher.acknowledged}, "ann"
            )
    more_rounds(coordinator, publisher)
    for device in running.devices:
        wait_until_asked(coordinator, device)
    print(f"rounds {first} to {coordinator.round_num()}, {len(publisher.acknowledged)} publishes")


def kill_any(running: Deployment, lots: random.Random) -> None:
    """One process, each kind as likely as another; supervisors are started again by hand."""
    coordinator, device = running.coordinators[0], lots.choice(running.devices)
    kind = lots.choice([*SUPERVISED, "flwr-serverapp", *ON_DEVICE, "supervisor", "agent"])
    if kind == "supervisor":
        coordinator.kill()
        coordinator.serve(wait=False)
    elif kind == "agent":
        assert device.process is not None
        kill(device.process)
        device.process.wait(10)
        device.run_light()
    else:
        owner = device if kind in ON_DEVICE else coordinator
        words = {**SUPERVISED, **ON_DEVICE}
        for process in named(owner.process, words.get(kind, kind))[:1]:
            kill(process)
