"""What README's "Deploy" section promises, as a user types it: real processes, real text."""

import json
import signal
from pathlib import Path

import pytest
from harness import Deployment, RunningDevice, eventually, fedia3

from fedia3.simulations.demo import demo_population

pytestmark = pytest.mark.slow

ROWS = demo_population(2, 40)
ALICE, BOB = sorted({row["user"] for row in ROWS})


def texts_of(user: str, folder: Path) -> Path:
    """A demo user's texts as a device has them: no user column."""
    path = folder / f"{user}.jsonl"
    texts = [json.dumps({"text": row["text"]}) for row in ROWS if row["user"] == user]
    path.write_text("\n".join(texts) + "\n")
    return path


def fetch(device: RunningDevice, out: Path, user: str | None = None, code: int = 0) -> str:
    """``fedia3 fetch`` from another shell; what it said."""
    done = fedia3(
        "fetch", "--user", user or device.user, "--state", str(device.state), "--out", str(out),
        "--json", home=device.home, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_a_coordinator_and_two_devices_from_an_empty_folder(deployment: Deployment, tmp_path: Path):
    """
    Init, serve, invites, two devices with real text, rounds; a third shell fetches; the coordinator
    is killed and started again, the rounds go on behind the last one; a device is revoked.
    """
    coordinator = deployment.coordinator(
        "tiny", {"min_clients": 1, "quorum": 1, "deadline_s": 60.0, "cohort": 2}, {"max_steps": 2}
    )
    coordinator.serve()
    for user, options in ((ALICE, ["--share-personal"]), (BOB, [])):
        device = deployment.device(user, texts_of(user, tmp_path))
        code = coordinator.invite(user)
        device.enroll(coordinator.address, code, coordinator.folder / "ca.pem")
        device.run(*options)
    alice, bob = deployment.devices
    coordinator.wait_for_round(2)

    eventually(lambda: alice.cli("status").get("shared_version"), "alice's part is shared")
    for device in (alice, bob):
        out = tmp_path / f"fetched-{device.user}"
        assert json.loads(fetch(device, out))["user"] == device.user
        assert (out / "adapter_model.safetensors").exists()
    said = fetch(bob, tmp_path / "stolen", user=ALICE, code=4)
    assert "adapter" in said or "user" in said
    assert not (tmp_path / "stolen").exists()

    before = coordinator.round_num()
    coordinator.kill()
    coordinator.serve()
    coordinator.wait_for_round(before + 2)

    coordinator.cli("revoke", bob.device_id)
    after = coordinator.round_num()
    coordinator.wait_for_round(after + 3)
    last = eventually(coordinator.last_cohort, "the last round's cohort")
    assert last == [alice.device_id]

    assert coordinator.process is not None
    coordinator.process.send_signal(signal.SIGTERM)
    assert coordinator.process.wait(30) == 0
