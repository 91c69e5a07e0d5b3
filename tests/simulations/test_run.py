"""A finished run: adapters as PEFT folders, text in a user's manner, and who is unknown."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.bank import IA3Bank
from fedia3.adapters.base_model import BaseModel, load, quiet
from fedia3.client.generation import Sampling, generate
from fedia3.coordinator.records import Owner
from fedia3.errors import BadInput, Corrupt, NotFound, WrongBaseModel
from fedia3.simulations.run import Run
from fedia3.simulations.settings import RunFolder
from fedia3.testing import tiny_base

TOKENS = torch.arange(3, 27).view(2, 12)  # two texts of twelve bytes
GREEDY = Sampling(max_new_tokens=8, temperature=0)


def copy_of(run: Run, folder: Path) -> Run:
    """The run in a folder that a test may change."""
    shutil.copytree(run.folder.path, folder)
    return Run.open(folder)


def test_a_saved_adapter_in_peft_answers_as_our_bank(
    finished: Run, toy_folder: Path, tmp_path: Path
):
    """
    PEFT loads the folder on the same base in float32: logits differ by less than 1e-5.
    """
    with quiet():
        from peft import PeftModel  # noqa: PLC0415  # seconds, and this test alone needs it
    served = finished.save("ann", tmp_path / "ann")
    assert served.personal is not None
    base = load(toy_folder)
    bank = IA3Bank(base.model, base.schema)
    bank.load([served.adapter.vector])
    with torch.no_grad():
        plain = base.model(input_ids=TOKENS).logits
        with bank.using(torch.tensor([0, 0])):
            ours = base.model(input_ids=TOKENS).logits
        bank.detach()
        theirs = PeftModel.from_pretrained(base.model, tmp_path / "ann")(input_ids=TOKENS).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-4  # ten times the tolerance: the adapter does act


def test_alpha_goes_from_the_global_adapter_to_the_users_own(finished: Run):
    """
    0 is everyone's to the bit, 1 the user's, one half lies in the middle.
    """
    everyone = finished.adapter("eve").adapter
    none, half, own = (finished.adapter("ann", alpha).adapter.vector for alpha in (0, 0.5, 1))
    assert np.array_equal(none, everyone.vector)
    assert not np.array_equal(own, none)
    np.testing.assert_allclose(half, (none + own) / 2, atol=1e-6)


def test_everybody_is_listed(finished: Run):
    """
    Those who trained and eve, who did not.
    """
    assert finished.users() == ["ann", "bob", "cyd", "dee", "eve"]


def test_versions_begin_with_everyones_by_round(finished: Run):
    """
    Rounds 0, 1 and 2, then at most one version of each user who trained.
    """
    versions = finished.versions()
    assert [(v.owner, v.version, v.round_num) for v in versions[:3]] == [
        (Owner.everyone(), 1, 0),
        (Owner.everyone(), 2, 1),
        (Owner.everyone(), 3, 2),
    ]
    served = [u.user for u in finished.report.users if u.choice == "personal"]
    assert [v.owner.name for v in versions[3:]] == served


def test_a_misspelt_user_is_told_who_is_near(finished: Run, tmp_path: Path):
    """
    "anne" is not there, ann is; nothing is written.
    """
    with pytest.raises(NotFound, match="no user 'anne'; did you mean ann"):
        finished.save("anne", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_user_like_nobody_is_told_some_names(finished: Run):
    """
    Nothing is near to "Zacharias": the first three names, and how to list all.
    """
    with pytest.raises(NotFound, match=r"ann, bob, cyd\? `fedia3 adapters` lists all 5"):
        finished.adapter("Zacharias")


def test_an_unfinished_run_says_how_to_finish_it(finished: Run, tmp_path: Path):
    """
    Without a report nobody is served.
    """
    run = copy_of(finished, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    with pytest.raises(NotFound, match="fedia3 simulate --resume"):
        run.adapter("ann")


def test_a_run_without_its_first_round_says_how_to_go_on(finished: Run, tmp_path: Path):
    """
    Killed before the registry was there.
    """
    (tmp_path / "run").mkdir()
    shutil.copy(finished.folder.path / "run.json", tmp_path / "run")
    with pytest.raises(NotFound, match=r"no federation of seed 0.*--resume"):
        Run.open(tmp_path / "run")


def test_a_folder_that_is_no_run_is_not_found(tmp_path: Path):
    """
    A wrong path is answered in words.
    """
    with pytest.raises(NotFound, match=r"run\.json"):
        Run.open(tmp_path)


def test_a_damaged_adapter_is_not_served(finished: Run, tmp_path: Path):
    """
    One byte of ann's stored part is another: its digest does not match.
    """
    run = copy_of(finished, tmp_path / "run")
    digest = run.adapter("ann").record.digest
    (blob,) = (p for p in run.folder.path.rglob("*") if p.is_file() and digest in str(p))
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(data)
    with pytest.raises(Corrupt):
        run.adapter("ann")


def test_a_folder_with_other_things_is_not_written_over(finished: Run, tmp_path: Path):
    """
    --out with somebody's own files in it.
    """
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput):
        finished.save("ann", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_without_its_base_model_is_not_found(finished: Run, tmp_path: Path):
    """
    The base folder was deleted after the run.
    """
    run = copy_of(finished, tmp_path / "run")
    facts = (run.folder.path / "run.json").read_text()
    gone = facts.replace(run.folder.settings().base, str(tmp_path / "gone"))
    (run.folder.path / "run.json").write_text(gone)
    with pytest.raises(NotFound):
        run.save("ann", tmp_path / "ann")


def test_another_model_in_the_bases_place_is_refused(finished: Run, tmp_path: Path):
    """
    Same shapes, other weights: an adapter would act, and mean nothing.
    """
    tiny_base(tmp_path / "other", seed=1)
    run = copy_of(finished, tmp_path / "run")
    facts = (run.folder.path / "run.json").read_text()
    moved = facts.replace(run.folder.settings().base, str(tmp_path / "other"))
    (run.folder.path / "run.json").write_text(moved)
    with pytest.raises(WrongBaseModel, match="is another one now"):
        run.generate("ann", "hi", GREEDY)


def test_a_user_writes_under_what_they_are_served(finished: Run, toy: BaseModel):
    """
    The same text as the base under ann's adapter; at alpha 0 that of the global one.
    """
    own, everyone = finished.adapter("ann").adapter, finished.adapter("eve").adapter
    assert finished.generate("ann", "aa", GREEDY) == generate(toy, own, "aa", GREEDY)
    at_zero = finished.generate("ann", "aa", GREEDY, alpha=0.0)
    assert at_zero == generate(toy, everyone, "aa", GREEDY)


def test_the_adapter_it_generates_with_is_the_users(finished: Run, monkeypatch: pytest.MonkeyPatch):
    """
    Whatever a tiny random model writes: what it is given is what the registry serves.
    """
    given: list[Adapter] = []

    def listen(base: BaseModel, adapter: Adapter, *rest: Any) -> str:
        given.append(adapter)
        return ""

    monkeypatch.setattr("fedia3.client.generation.generate", listen)
    finished.generate("ann", "hi")
    finished.generate("ann", "hi", alpha=0.0)
    assert given == [finished.adapter("ann").adapter, finished.adapter("eve").adapter]


def test_the_latest_run_is_opened_where_none_is_named(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """
    The only one below ./fedia3-runs.
    """
    monkeypatch.chdir(tmp_path)
    copy_of(finished, Path("fedia3-runs/mine"))
    assert Run.open() == replace(finished, folder=RunFolder(Path("fedia3-runs/mine")))
