"""``fedia3 client enroll`` and ``fedia3 fetch`` against a running coordinator."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.manifest import schema
from fedia3.adapters.peft_folder import read_peft_folder
from fedia3.cli import app
from fedia3.client.coordinator import Coordinator
from fedia3.client.device import DeviceFolder
from fedia3.errors import BadSetting, NotFound
from fedia3.simulations.run import Run
from fedia3.testing_service import RunningService, running_service


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    """A coordinator with a global adapter of twos; its CA and a service's token as files."""
    with running_service(tmp_path / "coordinator", in_memory=True) as running:
        shape = schema(running.manifest)
        running.registry.publish_global(Adapter(shape, np.full(5, 2, np.float32)), round_num=3)
        (tmp_path / "ca.pem").write_bytes(running.ca)
        (tmp_path / "token").write_text(running.service_token() + "\n")
        yield running


def run(*words: object, typed: str | None = None) -> str:
    """What the command prints; its error, if it raises one."""
    result = CliRunner().invoke(app, [str(word) for word in words], input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def enrolled(service: RunningService, folder: Path, user: str = "ann") -> DeviceFolder:
    """A device by the command."""
    ca = folder.parent / "ca.pem"
    run("client", "enroll", service.address, service.invite(user), "--ca", ca, "--state", folder)
    return DeviceFolder(folder)


def publish_part(service: RunningService, state: DeviceFolder) -> None:
    """Ann's own part of halves on the newest global."""
    with Coordinator.from_state(state) as home:
        part = PersonalAdapter(
            schema(service.manifest), np.full(5, 0.5, np.float32), home.resolve().digest
        )
        home.publish(part, num_examples=7)


def test_enrolling_says_what_to_type_next(service: RunningService, tmp_path: Path):
    """
    The user's name and the next command, with the folder if it is not the usual one.
    """
    said = run(
        "client", "enroll", service.address, service.invite("ann"), "--ca", tmp_path / "ca.pem",
        "--state", tmp_path / "state", "--name", "phone",
    )  # fmt: skip
    assert "phone is a device of ann now" in said
    assert f"fedia3 client run --data FILE_OR_FOLDER --state {tmp_path / 'state'}" in said


def test_a_code_left_out_is_asked_for(service: RunningService, tmp_path: Path):
    """
    Typed at the prompt it does not stay in the shell's history, nor on the screen.
    """
    code = service.invite("ann")
    said = run(
        "client", "enroll", service.address, "--ca", tmp_path / "ca.pem",
        "--state", tmp_path / "state", "--json", typed=f"{code}\n",
    )  # fmt: skip
    assert json.loads(said)["user"] == "ann"
    assert code not in said


def test_a_device_fetches_its_own(service: RunningService, tmp_path: Path):
    """
    Two and a half: the global of twos with ann's half on it, as a folder that PEFT reads.
    """
    state = enrolled(service, tmp_path / "state")
    publish_part(service, state)
    said = json.loads(
        run("fetch", "--user", "ann", "--state", state.path, "--out", tmp_path / "peft", "--json")
    )
    assert (said["choice"], said["global"]["version"], said["personal"]["owner"]) == (
        "personal", 1, "ann",
    )  # fmt: skip
    adapter = read_peft_folder(tmp_path / "peft", schema(service.manifest))
    assert np.array_equal(adapter.vector, np.full(5, 2.5, np.float32))


def test_an_enrolled_machine_needs_no_options(
    service: RunningService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """
    The folder in fedia3's home is found; without a part of one's own, the global is served.
    """
    monkeypatch.setenv("FEDIA3_HOME", str(tmp_path / "home"))
    run("client", "enroll", service.address, service.invite("ann"), "--ca", tmp_path / "ca.pem")
    said = run("fetch", "--user", "ann", "--out", tmp_path / "peft")
    assert "ann is served global version 1" in said


def test_a_service_fetches_for_anybody(
    service: RunningService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """
    With address, CA and a file that holds the token, for who has an own part and who has none.
    """
    monkeypatch.setenv("FEDIA3_HOME", str(tmp_path / "home"))
    publish_part(service, enrolled(service, tmp_path / "state"))
    options = (
        "--coordinator", service.address, "--ca", tmp_path / "ca.pem",
        "--token-file", tmp_path / "token", "--json",
    )  # fmt: skip
    for user, choice in (("ann", "personal"), ("bob", "global")):
        said = run("fetch", "--user", user, "--out", tmp_path / user, *options)
        assert json.loads(said)["choice"] == choice


def test_another_user_is_not_found(service: RunningService, tmp_path: Path):
    """
    Ann's device fetches nothing of bob's, and nothing is written.
    """
    state = enrolled(service, tmp_path / "state")
    with pytest.raises(NotFound, match="belongs to 'ann'"):
        run("fetch", "--user", "bob", "--state", state.path, "--out", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_without_a_coordinator_the_last_good_one_is_told(tmp_path: Path):
    """
    Offline, the folder is written all the same, and says why it may be old.
    """
    with running_service(tmp_path / "coordinator", in_memory=True) as service:
        shape = schema(service.manifest)
        service.registry.publish_global(Adapter(shape, np.full(5, 2, np.float32)))
        (tmp_path / "ca.pem").write_bytes(service.ca)
        state = enrolled(service, tmp_path / "state")
        run("fetch", "--user", "ann", "--state", state.path, "--out", tmp_path / "first")
    with Coordinator.from_state(state, timeout_s=0.3) as home:
        assert home.save(tmp_path / "second").fallback is not None
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_an_adapter_comes_from_one_place(tmp_path: Path):
    """
    A run and a coordinator at once is a mistake, and a coordinator without a token is one too.
    """
    with pytest.raises(BadSetting, match="--run and --coordinator"):
        run("fetch", "--user", "a", "--out", "x", "--run", tmp_path, "--coordinator", "home:1")
    with pytest.raises(BadSetting, match="--token-file"):
        run("fetch", "--user", "a", "--out", "x", "--coordinator", "home:1")


def test_a_run_is_fetched_from_as_before(
    finished: Run, service: RunningService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """
    Also on an enrolled machine, `--run` means the run.
    """
    monkeypatch.setenv("FEDIA3_HOME", str(tmp_path / "home"))
    run("client", "enroll", service.address, service.invite("ann"), "--ca", tmp_path / "ca.pem")
    said = run(
        "fetch",
        "--user",
        "ann",
        "--run",
        finished.folder.path,
        "--out",
        tmp_path / "peft",
        "--json",
    )
    assert json.loads(said)["global"]["round_num"] == 2
