"""What a run is asked to do, and the folder that remembers it."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fedia3.adapters.update import TrainingPlan
from fedia3.client.splits import SplitPlan
from fedia3.errors import BadSetting, Corrupt, NotFound
from fedia3.simulations.settings import RunFolder, Settings

SETTINGS = Settings(
    data="chats.jsonl",
    rounds=3,
    seeds=(0, 7),
    split=SplitPlan(by="item", max_examples=50),
    training=TrainingPlan(max_steps=4),
)


def begun(path: Path) -> RunFolder:
    """A folder whose run.json is written."""
    folder = RunFolder.new(path)
    folder.begin(SETTINGS, base="ba5e", data="da7a", compute="float32")
    return folder


@pytest.mark.parametrize("field", ["rounds", "cohort"])
def test_a_run_has_rounds_and_clients(field: str):
    """
    0 of either is refused by name.
    """
    with pytest.raises(BadSetting, match=f"{field} is at least 1, got 0"):
        replace(Settings(), **{field: 0})


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_are_different_and_at_least_one(seeds: tuple[int, ...]):
    """
    The same seed twice would be the same federation twice.
    """
    with pytest.raises(BadSetting, match="different numbers, at least one"):
        Settings(seeds=seeds)


def test_settings_survive_json():
    """
    What run.json keeps is what was asked for, tuples and plans included.
    """
    assert Settings.from_fields(json.loads(json.dumps(asdict(SETTINGS)))) == SETTINGS


def test_a_begun_folder_remembers(tmp_path: Path):
    """
    Settings and base read back from run.json.
    """
    folder = begun(tmp_path / "run")
    assert folder.settings() == SETTINGS
    assert folder.base() == "ba5e"


def test_a_new_folder_writes_nothing_yet(tmp_path: Path):
    """
    A run that fails on its data leaves no folder behind.
    """
    RunFolder.new(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_beginning_again_changes_nothing(tmp_path: Path):
    """
    A resumed run is begun with the same facts.
    """
    folder = begun(tmp_path / "run")
    before = (folder.path / "run.json").read_bytes()
    folder.begin(SETTINGS, base="ba5e", data="da7a", compute="float32")
    assert (folder.path / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"base": "0ther"}, "other base;"),
        ({"data": "0ther"}, "other data;"),
        ({"settings": replace(SETTINGS, rounds=4)}, "other settings;"),
        ({"base": "0ther", "data": "0ther"}, "other base and data;"),
        ({"compute": "bfloat16"}, "other compute; compute: float32 then, bfloat16 now;"),
    ],
)
def test_a_run_does_not_go_on_with_something_else(
    tmp_path: Path, changed: dict[str, object], named: str
):
    """
    The message names what is not as it was; run.json stays.
    """
    folder = begun(tmp_path / "run")
    facts = {
        "settings": SETTINGS,
        "base": "ba5e",
        "data": "da7a",
        "compute": "float32",
        **changed,
    }
    with pytest.raises(BadSetting, match=named):
        folder.begin(facts.pop("settings"), **facts)
    assert folder.base() == "ba5e"


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path):
    """
    An earlier run is not written over; the message says how to continue it.
    """
    folder = begun(tmp_path / "run")
    with pytest.raises(BadSetting, match="--resume"):
        RunFolder.new(folder.path)


def test_a_crash_before_the_first_byte_does_not_block_the_folder(tmp_path: Path):
    """
    Only the draft of run.json is there: nothing to resume, so the folder counts as new.
    """
    (tmp_path / "run.json.draft").write_text("{")
    RunFolder.new(tmp_path).begin(SETTINGS, base="ba5e", data="da7a", compute="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


def test_a_file_is_no_folder(tmp_path: Path):
    """
    --out with a file's name is refused in words.
    """
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(BadSetting, match="expected a folder"):
        RunFolder.new(tmp_path / "notes")


def test_a_folder_without_a_run_is_not_found(tmp_path: Path):
    """
    --resume with a wrong path.
    """
    with pytest.raises(NotFound, match=r"no run\.json"):
        RunFolder(tmp_path).settings()


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"settings": {}, "base": "", "data": ""}', '{"settings": 1, "base": ""}'],
)
def test_a_damaged_run_json_is_corrupt(tmp_path: Path, text: str):
    """
    Half a file, other JSON and missing fields are told apart from no run.
    """
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(Corrupt, match=r"run\.json"):
        RunFolder(tmp_path).settings()


def test_the_latest_run_is_the_one_begun_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """
    By time, not by name: --out may have named one of them.
    """
    monkeypatch.chdir(tmp_path)
    for seconds, name in ((100, "zebra"), (200, "2026-01-01-000000")):
        folder = begun(Path("fedia3-runs") / name)
        os.utime(folder.path / "run.json", (seconds, seconds))
    assert RunFolder.latest().path.name == "2026-01-01-000000"


def test_without_a_run_there_is_no_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """
    The message says how to start one.
    """
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match="fedia3 simulate"):
        RunFolder.latest()
