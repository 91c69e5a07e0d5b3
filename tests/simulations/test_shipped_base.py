"""The shipped base is worth shipping: it can be personalized, measurably."""

from pathlib import Path

import pytest

import fedia3


@pytest.mark.slow
def test_the_shipped_base_learns_each_demo_users_manner(tmp_path: Path):
    """
    A small federation of demo users: each own adapter beats base, global and another one.
    """
    settings = fedia3.Settings(demo_users=6, demo_texts=40, rounds=2, cohort=4)
    run = fedia3.simulate(settings, tmp_path / "run")
    for user in run.report.users:
        assert user.personal < min(user.base, user.global_, user.wrong_user)
    assert run.generate("alice", "hi").strip()
    run.save("alice", tmp_path / "alice")
    assert (tmp_path / "alice" / "adapter_model.safetensors").exists()
