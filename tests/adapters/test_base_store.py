import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedia3.adapters import base_model
from fedia3.adapters.base_store import BaseStore, default_home
from fedia3.adapters.manifest import Manifest, Origin, manifest_of, write_manifest
from fedia3.adapters.schema import Target
from fedia3.errors import BadInput, BadTargets, NotFound


def make_base(folder: Path, *, name: str, weights: bytes = b"1") -> Manifest:
    """A base model of one small file, whose adapters have two scales."""
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(weights)
    manifest = manifest_of(
        folder,
        name=name,
        created_from=Origin("ToyForCausalLM"),
        targets=(Target("block.k_proj", "k", 2),),
    )
    write_manifest(folder, manifest)
    return manifest


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BaseStore:
    """One shipped base called tiny; a "source" is quantized by copying its text into weights."""

    def quantize(source: str, out: Path, *, name: str, **_: object) -> Manifest:
        return make_base(out, name=name, weights=source.encode())

    monkeypatch.setattr(base_model, "quantize", quantize)
    make_base(tmp_path / "shipped" / "tiny", name="tiny")
    return BaseStore(tmp_path / "home", shipped=tmp_path / "shipped")


def test_a_new_home_lists_the_shipped_base(store: BaseStore, tmp_path: Path):
    """
    Nothing is imported yet, the home folder does not even exist.
    """
    (entry,) = store.list()
    assert (entry.name, entry.shipped, entry.size) == ("tiny", True, 1)
    assert (entry.architecture, entry.n_params) == ("ToyForCausalLM", 2)
    assert not (tmp_path / "home").exists()


def test_an_import_lies_under_its_digest(store: BaseStore, tmp_path: Path):
    """
    The folder's name is the base model's identity, and nothing else is left behind.
    """
    entry = store.import_base("weights", "mine")
    assert entry.path == tmp_path / "home" / "bases" / entry.digest
    assert list(entry.path.parent.iterdir()) == [entry.path]
    assert store.list()[1:] == (entry,)


def test_a_base_is_found_by_name_digest_and_path(store: BaseStore):
    """
    A digest's first eight digits are enough.
    """
    entry = store.import_base("weights", "mine")
    for wanted in ("mine", entry.digest, entry.digest[:8], str(entry.path), entry.path):
        assert store.find(wanted) == entry.path


def test_a_name_means_its_newest_import(store: BaseStore):
    """
    The older base keeps its digest, for the adapters that were made on it.
    """
    old = store.import_base("one", "mine")
    new = store.import_base("two", "mine")
    os.utime(old.path, (1, 1))
    assert store.find("mine") == new.path
    assert store.find(old.digest) == old.path


def test_importing_the_same_bytes_again_makes_them_newest(store: BaseStore):
    """
    One, two, then one again: the name means one, and there are still two imports.
    """
    one, two = store.import_base("one", "mine"), store.import_base("two", "mine")
    for age, entry in enumerate((two, one)):
        os.utime(entry.path, (time.time() - 60 - age,) * 2)
    store.import_base("one", "mine")
    assert store.find("mine") == one.path
    assert len(store.list()) == 3


def test_an_import_comes_before_a_shipped_base_of_its_name(store: BaseStore):
    """
    Who imports a base called tiny wants to use it.
    """
    entry = store.import_base("weights", "tiny")
    assert store.find("tiny") == entry.path


def test_a_digests_beginning_that_fits_several_bases_is_refused(store: BaseStore, tmp_path: Path):
    """
    Of some hundred bases two share their first four digits; both are named.
    """
    toy = make_base(tmp_path / "shipped" / "toy", name="toy")
    by_beginning: dict[str, set[str]] = {}
    for number in range(2000):
        named = replace(toy, name=f"base-{number}")
        twins = by_beginning.setdefault(named.digest[:4], set())
        twins.add(named.name)
        if len(twins) == 2:
            break
    for name in twins:
        make_base(tmp_path / "shipped" / name, name=name)
    with pytest.raises(BadInput, match="fits several") as refused:
        store.find(named.digest[:4])
    assert all(name in str(refused.value) for name in twins)


def test_an_unknown_base_is_answered_with_what_there_is(store: BaseStore):
    """
    The error lists names and digests.
    """
    (tiny,) = store.list()
    with pytest.raises(NotFound, match=rf"'tinny'; there are: tiny \({tiny.digest[:12]}\)"):
        store.find("tinny")


def test_a_path_without_a_base_is_not_found(store: BaseStore, tmp_path: Path):
    """
    A path is never taken for a name.
    """
    with pytest.raises(NotFound, match="not a fedia3 base model"):
        store.find(str(tmp_path / "tiny"))


def test_a_damaged_import_hides_only_itself(store: BaseStore):
    """
    Others stay usable when one manifest cannot be read.
    """
    entry = store.import_base("weights", "mine")
    (entry.path / "fedia3.json").write_text("{")
    assert [e.name for e in store.list()] == ["tiny"]


def test_a_failed_import_leaves_nothing(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """
    Half a base model is neither listed nor left on the disk.
    """

    def fail(source: str, out: Path, **_: object) -> Manifest:
        make_base(out, name="half")
        raise BadTargets("nothing to scale")

    monkeypatch.setattr(base_model, "quantize", fail)
    with pytest.raises(BadTargets):
        store.import_base("weights", "half")
    assert list((tmp_path / "home" / "bases").iterdir()) == []


def test_a_bad_name_is_refused_before_any_work(store: BaseStore, tmp_path: Path):
    """
    A name that is no path and no folder's name never reaches the disk.
    """
    with pytest.raises(BadInput, match="name"):
        store.import_base("weights", "../mine")
    assert not (tmp_path / "home").exists()


def test_a_home_that_cannot_be_written_still_finds_shipped_bases(tmp_path: Path):
    """
    Here the home is a file; listing works, importing says what to do.
    """
    make_base(tmp_path / "shipped" / "tiny", name="tiny")
    (tmp_path / "home").write_text("")
    store = BaseStore(tmp_path / "home", shipped=tmp_path / "shipped")
    assert store.find("tiny") == tmp_path / "shipped" / "tiny"
    with pytest.raises(BadInput, match="set FEDIA3_HOME"):
        store.import_base("weights", "mine")


def test_the_environment_names_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """
    FEDIA3_HOME comes before the system's data folder.
    """
    monkeypatch.setenv("FEDIA3_HOME", str(tmp_path))
    assert default_home() == tmp_path
