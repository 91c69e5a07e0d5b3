"""Real tiny child processes, kept running and stopped whole."""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from fedia3.errors import Conflict, NotFound
from fedia3.processes import (
    MARK,
    Backoff,
    Part,
    Supervisor,
    birth,
    end_leftovers,
    free_ports,
    read_statuses,
)

AT_ONCE = Backoff(first_s=0.01, longest_s=0.02)
SLEEPS = (sys.executable, "-S", "-c", "import time; time.sleep(600)")
HAS_A_CHILD = (
    sys.executable,
    "-S",
    "-c",
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True)\ntime.sleep(600)",
)


def part(tmp_path: Path, *command: str, name: str = "sleeper", **options: object) -> Part:
    """A part that sleeps, or runs ``command``."""
    options = {"backoff": AT_ONCE, **options}
    return Part(name, command or SLEEPS, tmp_path / f"{name}.log", **options)  # type: ignore[arg-type]


async def until(holds: Callable[[], object], within_s: float = 20.0) -> None:
    """Wait for something to hold."""
    ends = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < ends, "waited in vain"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def supervised(tmp_path: Path, *parts: Part) -> AsyncIterator[Supervisor]:
    """The parts, kept running until the block is left."""
    supervisor = Supervisor(parts, tmp_path / "parts.json")
    await supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.stop(grace_s=5)


def first_line(path: Path) -> str:
    """The beginning of what a part printed, empty before it has."""
    return path.read_text().partition("\n")[0] if path.exists() else ""


def is_alive(pid: int) -> bool:
    """Zombies are dead: nobody may have fetched an orphan's status yet."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_killed_part_is_started_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """
    A part that dies comes back with a new pid; one log line says of what it died and when it
    comes back.
    """

    async def scenario() -> None:
        async with supervised(tmp_path, part(tmp_path)) as supervisor:
            assert await supervisor.wait_ready(20)
            pid = supervisor.status("sleeper").pid
            assert pid
            os.kill(pid, signal.SIGKILL)
            await until(lambda: supervisor.status("sleeper").restarts == 1)
            await until(lambda: supervisor.status("sleeper").state == "running")
            assert supervisor.status("sleeper").pid != pid

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    assert "sleeper ended with signal 9; starting it again in 0.01 s" in caplog.messages


def test_the_status_file_says_how_each_part_is(tmp_path: Path) -> None:
    """
    The file names state, pid, restarts and the last exit, while it runs and after.
    """

    async def scenario() -> None:
        exits = part(tmp_path, sys.executable, "-S", "-c", "raise SystemExit(7)", name="brief")
        async with supervised(tmp_path, part(tmp_path), exits) as supervisor:
            assert await supervisor.wait_ready(20, only=["sleeper"])
            await until(lambda: supervisor.status("brief").restarts >= 2)
            assert read_statuses(tmp_path / "parts.json") == supervisor.statuses()
        sleeper, brief = read_statuses(tmp_path / "parts.json")
        assert (sleeper.state, sleeper.pid, sleeper.restarts) == ("stopped", None, 0)
        assert brief.last_exit == "status 7"

    asyncio.run(scenario())


def test_pauses_double_up_to_the_longest() -> None:
    """
    0.5, 1, 2, 4 and then 4 s: whoever dies again and again is left alone for longer.
    """
    backoff = Backoff(first_s=0.5, longest_s=4)
    assert [backoff.pause_s(deaths) for deaths in (1, 2, 3, 4, 5, 5000)] == [0.5, 1, 2, 4, 4, 4]


def test_a_first_pause_above_the_longest_holds() -> None:
    """
    A part's least pause is kept: a Flower node may not come back within 15 s.
    """
    assert Backoff(first_s=15, longest_s=10).pause_s(1) == 15


def test_a_healthy_life_makes_the_next_death_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """
    With every life counted as healthy the pause stays at its first length.
    """

    async def scenario() -> None:
        backoff = Backoff(first_s=0.01, longest_s=10, healthy_s=0)
        dies = part(tmp_path, sys.executable, "-S", "-c", "", backoff=backoff)
        async with supervised(tmp_path, dies) as supervisor:
            await until(lambda: supervisor.status("sleeper").restarts >= 4)

    asyncio.run(scenario())
    assert {m for m in caplog.messages if "ended" in m} == {
        "sleeper ended with status 0; starting it again in 0.01 s"
    }


def test_a_program_that_is_not_there_is_tried_again(tmp_path: Path) -> None:
    """
    A missing program is one more way to end, not the end of the supervisor.
    """

    async def scenario() -> None:
        async with supervised(tmp_path, part(tmp_path, "/no/such/program")) as supervisor:
            await until(lambda: supervisor.status("sleeper").restarts >= 2)
            assert "/no/such/program" in supervisor.status("sleeper").last_exit

    asyncio.run(scenario())


def test_a_part_is_up_when_its_check_says_so(tmp_path: Path) -> None:
    """
    Until the check holds the part is starting.
    """
    answers = iter([False, False, True])

    async def ready() -> bool:
        return next(answers)

    async def scenario() -> None:
        async with supervised(tmp_path, part(tmp_path, ready=ready)) as supervisor:
            await until(lambda: supervisor.status("sleeper").pid)
            assert supervisor.status("sleeper").state == "starting"
            assert await supervisor.wait_ready(20)

    asyncio.run(scenario())


def test_a_part_that_answers_no_more_is_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """
    It lives, but its check fails for too long: it is killed, and the log says why.
    """
    answers = True

    async def ready() -> bool:
        return answers

    async def scenario() -> None:
        nonlocal answers
        async with supervised(tmp_path, part(tmp_path, ready=ready, hung_s=0.1)) as supervisor:
            assert await supervisor.wait_ready(20)
            before = supervisor.status("sleeper").pid or 0
            answers = False
            await until(lambda: supervisor.status("sleeper").restarts)
            answers = True
            assert await supervisor.wait_ready(20)
            assert not is_alive(before)
            assert supervisor.status("sleeper").last_exit == "no answer for 0.1 s"

    asyncio.run(scenario())
    assert "sleeper lives, but gave no answer for 0.1 s; killing it" in caplog.messages


def test_a_check_that_fails_now_and_then_ends_nothing(tmp_path: Path) -> None:
    """
    Only silence without a break counts.
    """
    asked = 0

    async def ready() -> bool:
        nonlocal asked
        asked += 1
        return asked % 3 == 0

    async def scenario() -> None:
        async with supervised(tmp_path, part(tmp_path, ready=ready, hung_s=60)) as supervisor:
            assert await supervisor.wait_ready(20)
            assert supervisor.status("sleeper").restarts == 0

    asyncio.run(scenario())


def test_a_check_that_hangs_or_breaks_is_no_answer(tmp_path: Path) -> None:
    """
    The part is ended as if the check had said no.
    """

    async def breaks() -> bool:
        raise FileNotFoundError("ca.pem")

    async def hangs() -> bool:
        await asyncio.sleep(600)
        return True

    async def scenario() -> None:
        parts = [
            part(tmp_path, name=check.__name__, ready=check, hung_s=0.1)
            for check in (breaks, hangs)
        ]
        async with supervised(tmp_path, *parts) as supervisor:
            await until(lambda: all(status.restarts for status in supervisor.statuses()))

    asyncio.run(scenario())


def test_a_part_that_was_ended_for_a_reason_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Whoever finds that a part does its work no more may have it started again.
    """

    async def scenario() -> None:
        async with supervised(tmp_path, part(tmp_path)) as supervisor:
            assert await supervisor.wait_ready(20)
            supervisor.kill_part("sleeper", "it starts no runs")
            await until(lambda: supervisor.status("sleeper").restarts)
            assert supervisor.status("sleeper").last_exit == "it starts no runs"

    asyncio.run(scenario())
    assert "sleeper: it starts no runs; killing it" in caplog.messages


def test_a_stop_that_was_given_up_is_taken_up_by_the_next(tmp_path: Path) -> None:
    """
    What was asked to end and not waited for is not forgotten.
    """
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('x', flush=True)\n"

    async def scenario() -> None:
        stubborn = part(tmp_path, sys.executable, "-S", "-c", deaf + "time.sleep(600)")
        supervisor = Supervisor([stubborn], tmp_path / "parts.json")
        await supervisor.start()
        await until(lambda: first_line(tmp_path / "sleeper.log"))
        pid = supervisor.status("sleeper").pid or 0
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(supervisor.stop_part("sleeper", grace_s=600), 0.1)
        await supervisor.stop(grace_s=0.05)
        assert not is_alive(pid)

    asyncio.run(scenario())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system has no such clock")
def test_a_process_is_the_same_after_the_clock_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The system tells when it was booted by the clock of now, so that this moves with it.
    """
    before, told = birth(os.getpid()), psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: told + 3600)
    assert birth(os.getpid()) == before
    assert birth(2**22 + 1) is None


def test_stopping_ends_the_whole_group(tmp_path: Path) -> None:
    """
    What a part started itself goes with it.
    """

    async def scenario() -> int:
        async with supervised(tmp_path, part(tmp_path, *HAS_A_CHILD)):
            await until(lambda: first_line(tmp_path / "sleeper.log"))
            return int(first_line(tmp_path / "sleeper.log"))

    child = asyncio.run(scenario())
    assert not is_alive(child)


def test_a_parts_death_takes_its_children_along(tmp_path: Path) -> None:
    """
    A killed part's child does not live on beside the new part's.
    """

    async def scenario() -> None:
        async with supervised(tmp_path, part(tmp_path, *HAS_A_CHILD)) as supervisor:
            await until(lambda: first_line(tmp_path / "sleeper.log"))
            child = int(first_line(tmp_path / "sleeper.log"))
            os.kill(supervisor.status("sleeper").pid or 0, signal.SIGKILL)
            await until(lambda: not is_alive(child))

    asyncio.run(scenario())


def test_a_part_that_ignores_sigterm_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """
    When its grace is over it is killed, and the log says so.
    """
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('x', flush=True)\n"

    async def scenario() -> None:
        stubborn = part(tmp_path, sys.executable, "-S", "-c", deaf + "time.sleep(600)")
        supervisor = Supervisor([stubborn], tmp_path / "parts.json")
        await supervisor.start()
        await until(lambda: first_line(tmp_path / "sleeper.log"))
        pid = supervisor.status("sleeper").pid or 0
        await supervisor.stop(grace_s=0.05)
        assert not is_alive(pid)

    asyncio.run(scenario())
    assert "sleeper did not stop within 0.05 s; killing it" in caplog.messages


def test_one_part_is_stopped_and_started_alone(tmp_path: Path) -> None:
    """
    A stopped part stays stopped while the others run, until somebody starts it.
    """

    async def scenario() -> None:
        parts = [part(tmp_path, name="left"), part(tmp_path, name="right")]
        async with supervised(tmp_path, *parts) as supervisor:
            assert await supervisor.wait_ready(20)
            await supervisor.stop_part("left", grace_s=5)
            states = [status.state for status in supervisor.statuses()]
            assert states == ["stopped", "running"]
            supervisor.start_part("left")
            assert await supervisor.wait_ready(20)

    asyncio.run(scenario())


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    """
    Asking for a part that does not exist says which ones do.
    """
    supervisor = Supervisor([part(tmp_path)], tmp_path / "parts.json")
    with pytest.raises(NotFound, match="sleeper"):
        supervisor.start_part("nobody")


def test_programs_beside_python_come_first(tmp_path: Path) -> None:
    """
    Flower finds its own programs through PATH.
    """

    async def scenario() -> None:
        show = "import os; print(os.environ['PATH'].split(':')[0], flush=True)"
        command = (sys.executable, "-S", "-c", show)
        async with supervised(tmp_path, part(tmp_path, *command)):
            await until(lambda: first_line(tmp_path / "sleeper.log"))

    asyncio.run(scenario())
    assert first_line(tmp_path / "sleeper.log") == str(Path(sys.executable).parent)


def test_parts_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    """
    kill -9 of the supervisor leaves nothing, or what it left is ended at the next start: also the
    children that the part had started itself.
    """
    program = f"""
import asyncio, pathlib
from fedia3.processes import Part, Supervisor
async def main():
    folder = pathlib.Path({str(tmp_path)!r})
    part = Part("sleeper", {HAS_A_CHILD!r}, folder / "sleeper.log")
    await Supervisor([part], folder / "parts.json").start()
    await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program]) as supervisor:

        async def scenario() -> None:
            await until(lambda: first_line(tmp_path / "sleeper.log"))
            await until(lambda: read_statuses(tmp_path / "parts.json"))
            (status,) = read_statuses(tmp_path / "parts.json")
            child = int(first_line(tmp_path / "sleeper.log"))
            supervisor.kill()
            supervisor.wait()
            if sys.platform == "linux":
                await until(lambda: not is_alive(status.pid or 0))
            end_leftovers(tmp_path / "parts.json")
            await until(lambda: not is_alive(child))

        asyncio.run(scenario())


def test_a_program_that_speaks_grpc_starts_parts_that_live(tmp_path: Path) -> None:
    """
    gRPC's fork handlers would run in the child before its program, and end one of seven.
    """
    program = f"""
import asyncio, collections, contextlib, pathlib, sys
from fedia3.cli import main
with contextlib.suppress(SystemExit):
    sys.argv = ["fedia3", "--version"]
    main()
import grpc
from fedia3.processes import Part, _spawn
async def talk(port):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{{port}}") as channel:
        while True:
            with contextlib.suppress(grpc.RpcError):
                await channel.unary_unary("/no/such")(b"")
async def spawn():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    talks = asyncio.create_task(talk(port))
    ends = collections.Counter()
    part = Part("quick", ("true",), pathlib.Path({str(tmp_path / "log")!r}))
    for _ in range(200):
        child = await _spawn(part, "mark")
        ends[await asyncio.wait_for(child.wait(), 20)] += 1
    talks.cancel()
    print(dict(ends))
asyncio.run(spawn())
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GRPC_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["{0: 200}"], done.stdout + done.stderr


def test_a_recycled_pid_is_left_alone(tmp_path: Path) -> None:
    """
    A process that has the number of a dead part, but was made at another time, is somebody else.
    """
    stranger = subprocess.Popen(SLEEPS, start_new_session=True)
    try:
        entry = {"name": "old", "state": "running", "pid": stranger.pid, "started": "1"}
        (tmp_path / "parts.json").write_text(json.dumps({"mark": "m", "parts": [entry]}))
        assert end_leftovers(tmp_path / "parts.json") == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_part_left_behind_is_ended_and_named(tmp_path: Path) -> None:
    """
    The process that the file names, started when it says, is ended before a new one starts.
    """
    left = subprocess.Popen(SLEEPS, start_new_session=True, env={**os.environ, MARK: "m"})
    try:
        entry = {"name": "old", "state": "running", "pid": left.pid, "started": birth(left.pid)}
        (tmp_path / "parts.json").write_text(json.dumps({"mark": "m", "parts": [entry]}))
        (line,) = end_leftovers(tmp_path / "parts.json")
        assert line == f"ended process {left.pid} that an earlier old left"
        assert not is_alive(left.pid)
    finally:
        left.kill()
        left.wait()


def test_a_damaged_status_file_is_no_status(tmp_path: Path) -> None:
    """
    Half a file, or none, names nobody.
    """
    (tmp_path / "parts.json").write_text('{"mark": "m", "parts": [')
    assert read_statuses(tmp_path / "parts.json") == ()
    assert read_statuses(tmp_path / "none.json") == ()


def test_free_ports_are_none_that_connections_are_given() -> None:
    """
    Each can be listened on, and the system will not hand it out before that.
    """
    ports = free_ports(50)
    assert len(set(ports)) == 50
    lots = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if lots.exists():
        assert max(ports) < int(lots.read_text().split()[0])
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_a_port_that_somebody_has_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Of two ports the taken one is not given; three of them there are not.
    """
    first, second = free_ports(2)
    monkeypatch.setattr("fedia3.processes.OWN_PORTS", (first, second))
    with socket.create_server(("127.0.0.1", first)):
        assert free_ports(1) == [second]
        with pytest.raises(Conflict, match="3 ports"):
            free_ports(3)
