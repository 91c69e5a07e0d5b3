"""The resident trainer: a round, the owner's own part, new text, and what goes wrong."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.base_model import BaseModel
from fedia3.adapters.update import TrainingPlan, TrainRequest
from fedia3.client.splits import SplitPlan
from fedia3.client.tasks import CausalLM
from fedia3.client.trainer_process import DeviceTrainer, Paced, Spent
from fedia3.client.trainer_settings import TrainerSettings
from fedia3.client.trainer_socket import Frame, FrameServer, RemoteTrainer
from fedia3.errors import BadInput, TrainerFailed, Unreachable

PLAN = TrainingPlan(max_length=32, epochs=2)
ONES_DIGEST = "0" * 64


def write_texts(path: Path, count: int) -> None:
    """``count`` texts of one user."""
    path.write_text("".join(json.dumps({"text": f"aab aab {n}"}) + "\n" for n in range(count)))


@pytest.fixture
def device(toy: BaseModel, toy_folder: Path, tmp_path: Path) -> Iterator[DeviceTrainer]:
    """A trainer with twelve texts."""
    write_texts(tmp_path / "chat.jsonl", 12)
    settings = TrainerSettings(toy_folder, tmp_path / "chat.jsonl", tmp_path / "trainer.sock")
    device = DeviceTrainer(toy, settings)
    yield device
    device.resident.bank.detach()


@pytest.fixture
def remote(device: DeviceTrainer) -> Iterator[RemoteTrainer]:
    """The same, asked over its socket."""
    path = device.settings.socket
    with FrameServer(path, device.answer, lambda f: f.header["do"] != "train", device.failed) as s:
        Thread(target=s.serve_forever, kwargs={"poll_interval": 0.05}).start()
        try:
            yield RemoteTrainer(path)
        finally:
            s.shutdown()


def request(toy: BaseModel, client: str = "c" * 32, **changes: object) -> TrainRequest:
    """Round 3, from the base as it is."""
    fields = {
        "client": client, "round_num": 3, "round_seed": 7, "schema_digest": toy.schema.digest,
        "vector": Adapter.ones(toy.schema).vector, "plan": PLAN,
    }  # fmt: skip
    return TrainRequest(**{**fields, **changes})  # type: ignore[arg-type]  # any field


def test_a_round_trained_over_the_socket_is_the_round(
    toy: BaseModel, device: DeviceTrainer, remote: RemoteTrainer
):
    """
    The delta of the trainer itself comes back, whatever the coordinator calls this device.
    """
    asked = request(toy)
    update = remote.train(asked)
    device._use(PLAN.max_length)
    here = device.resident.train(request(toy, client="owner", round_seed=asked.seed))
    assert np.abs(update.delta).max() > 0
    np.testing.assert_array_equal(update.delta, here.delta)
    assert (update.num_examples, update.metrics) == (here.num_examples, here.metrics)
    status = remote.status()
    assert (status.rounds, status.last_round, status.doing) == (1, 3, None)


def test_the_owners_part_comes_with_the_gates_decision(toy: BaseModel, remote: RemoteTrainer):
    """
    The losses say what the choice rests on; text that decided nothing is measured apart.
    """
    part = remote.personalize(Adapter.ones(toy.schema).vector, ONES_DIGEST, PLAN, seed=1)
    assert part.delta.shape == (toy.schema.n_params,)
    assert part.choice == ("personal" if part.personal_loss < part.global_loss else "global")
    assert part.test["base"] == part.test["global"]  # the global is the base here
    assert part.data_digest == remote.status().data_digest


def test_new_text_is_seen_after_a_reload(device: DeviceTrainer, remote: RemoteTrainer):
    """
    Not before: a training uses one state of the text.
    """
    before = remote.status()
    write_texts(device.settings.data, 15)
    assert remote.status() == before
    after = remote.reload()
    assert (after.texts, after.data_digest != before.data_digest) == (15, True)


def test_too_little_text_is_answered_by_its_class_and_the_trainer_lives(
    toy: BaseModel, device: DeviceTrainer, remote: RemoteTrainer
):
    """
    Nothing about the text goes where Flower could see it; the status says more to the owner.
    """
    write_texts(device.settings.data, 2)
    assert "got 2" in str(remote.reload().too_little)
    with pytest.raises(TrainerFailed) as failure:
        remote.train(request(toy))
    assert failure.value.kind == "BadData"
    assert remote.status().last_failure == "BadData"
    write_texts(device.settings.data, 12)
    remote.reload()
    assert remote.train(request(toy)).num_examples > 0


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"schema_digest": "f" * 64}, "WrongBaseModel"),
        ({"vector": np.ones(3, dtype=np.float32)}, "BadAdapter"),
    ],
)
def test_a_request_that_does_not_fit_is_answered_by_its_class(
    toy: BaseModel, remote: RemoteTrainer, changes: dict[str, object], kind: str
):
    """
    Another schema, another length; the trainer lives.
    """
    with pytest.raises(TrainerFailed) as failure:
        remote.train(request(toy, **changes))
    assert failure.value.kind == kind
    assert remote.train(request(toy)).num_examples > 0


@pytest.mark.parametrize("header", [{}, {"do": "steal"}, {"do": "train"}, {"do": "hold"}])
def test_a_request_that_is_none_is_refused(device: DeviceTrainer, header: dict[str, object]):
    """
    Unknown work, and work that lacks a part.
    """
    with pytest.raises(BadInput):
        device.answer(Frame(header))


def test_a_held_trainer_stops_between_batches_and_goes_on(toy: BaseModel, remote: RemoteTrainer):
    """
    A round asked for while held is answered once it may go on, and the status is told meanwhile.
    """
    remote.hold(True)
    done: list[int] = []
    training = Thread(target=lambda: done.append(remote.train(request(toy)).num_examples))
    training.start()
    while (status := remote.status()).doing is None:
        time.sleep(0.01)
    assert (status.is_held, status.doing, done) == (True, "training round 3", [])
    remote.hold(False)
    training.join(60)
    assert done == [9]  # three of the twelve are held out


def test_a_quarter_of_two_processors_is_half_of_one():
    """
    A batch that took one second of processor time is followed by a second of rest.
    """
    times = iter([Spent(0, 0), Spent(1, 1), Spent(2, 1), Spent(12, 1.5), Spent(12, 1.5)])
    rests: list[float] = []
    paced = Paced(CausalLM(0), 0.5, clock=lambda: next(times), sleep=rests.append)
    paced._rest()
    paced._rest()  # ten idle seconds later: nothing is owed
    assert rests == [1.0]


@pytest.mark.parametrize(("share", "cores", "threads"), [(1, 2, 2), (0.5, 2, 1), (0.6, 2, 2)])
def test_threads_suffice_for_the_share(
    monkeypatch: pytest.MonkeyPatch, share: float, cores: int, threads: int
):
    """
    Half of two processors is one thread; a little more takes two, which then rest.
    """
    monkeypatch.setattr("fedia3.client.trainer_settings.cores", lambda: cores)
    assert TrainerSettings(Path(), Path(), Path(), cpu_share=share).threads == threads


def test_settings_are_read_as_they_were_written(tmp_path: Path):
    """
    Paths and the split come back as what they were.
    """
    settings = TrainerSettings(
        Path("b"), Path("d"), Path("s"), "date", SplitPlan(by="seed"), cpu_share=0.5
    )
    settings.write(tmp_path / "trainer.json")
    assert TrainerSettings.read(tmp_path / "trainer.json") == settings


@pytest.mark.slow
def test_the_process_serves_and_leaves_on_sigterm(toy: BaseModel, toy_folder: Path, tmp_path: Path):
    """
    A round in a process of its own; SIGTERM ends it and takes the socket away.
    """
    write_texts(tmp_path / "chat.jsonl", 12)
    socket = tmp_path / "trainer.sock"
    TrainerSettings(toy_folder, tmp_path / "chat.jsonl", socket).write(tmp_path / "trainer.json")
    command = (sys.executable, "-m", "fedia3.client.trainer_process", tmp_path / "trainer.json")
    with subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL) as process:
        try:
            trainer = RemoteTrainer(socket)
            while process.poll() is None:
                try:
                    trainer.status()
                    break
                except Unreachable:
                    time.sleep(0.1)
            assert trainer.train(request(toy)).num_examples == 9
            process.terminate()
            assert process.wait(30) == 0
            assert not socket.exists()
        finally:
            process.kill()
