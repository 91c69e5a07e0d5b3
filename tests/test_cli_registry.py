"""``fedia3 registry`` as people type it, on a finished run's registry."""

import json
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedia3 import cli
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.arithmetic import interpolate, product, sum_of_deltas
from fedia3.adapters.bank import IA3Bank
from fedia3.adapters.base_model import load
from fedia3.adapters.dial import Dial
from fedia3.adapters.peft_folder import read_peft_folder, write_peft_folder
from fedia3.adapters.safetensors_header import PEFT_FILES, checked_header
from fedia3.adapters.schema import Schema
from fedia3.coordinator.records import AdapterDraft, Owner
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.setup import serving_alone
from fedia3.simulations.run import Run

Command = Callable[..., int]


@pytest.fixture
def fedia3(monkeypatch: pytest.MonkeyPatch) -> Command:
    """``fedia3 registry WORDS``; its exit code."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["fedia3", "registry", *map(str, words)])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.fixture
def at(finished: Run) -> Path:
    """The registry of the small run that all tests share; nothing here changes it."""
    return finished.folder.registry(finished.seed)


def test_owners_and_their_versions_are_listed(
    fedia3: Command, at: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    Everyone's first; versions newest first, as facts or a line each.
    """
    assert fedia3("owners", "--at", at, "--json") == 0
    listed = json.loads(capfd.readouterr().out)
    assert listed[0] == {"kind": "global", "name": ""}
    assert fedia3("versions", "--at", at, "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert [f["version"] for f in facts] == sorted((f["version"] for f in facts), reverse=True)
    assert fedia3("versions", "--at", at) == 0
    assert facts[0]["digest"][:12] in capfd.readouterr().out.splitlines()[0]


def test_no_registry_is_named_and_none_is_made(
    fedia3: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    4, not found, with what to name.
    """
    assert fedia3("owners", "--at", tmp_path) == 4
    assert "--at" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_who_has_nothing_is_said(
    fedia3: Command, at: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    4, and so for a base that nobody trained on.
    """
    assert fedia3("versions", "--user", "nobody", "--at", at) == 4
    assert "nobody" in capfd.readouterr().err
    assert fedia3("versions", "--base", "beef", "--at", at) == 4
    assert "beef" in capfd.readouterr().err


@pytest.fixture
def own(at: Path, tmp_path: Path) -> Path:
    """A copy of it, whose global versions there are at least two of."""
    return shutil.copytree(at, tmp_path / "registry")


def facts(capfd: pytest.CaptureFixture[str]) -> Any:
    """What the last command printed as JSON."""
    return json.loads(capfd.readouterr().out)


def test_an_alias_is_promoted_rolled_back_and_remembers(
    fedia3: Command, own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    History newest first; ``--on`` says where it pointed then.
    """
    assert fedia3("promote", "stable", 1, "--at", own, "--reason", "first [ok]") == 0
    assert fedia3("promote", "stable", 2, "--at", own, "--expected", 1) == 0
    assert fedia3("promote", "stable", 1, "--at", own, "--expected", 1) == 5
    assert "revision 2" in capfd.readouterr().err
    assert fedia3("rollback", "stable", "--at", own, "--json") == 0
    (moved,) = facts(capfd)
    assert (moved["version"], moved["rev"], moved["owner"]["kind"]) == (1, 3, "global")
    assert fedia3("history", "stable", "--at", own, "--json") == 0
    assert [move["version"] for move in facts(capfd)] == [1, 2, 1]
    assert fedia3("history", "stable", "--at", own) == 0
    assert "first [ok]" in capfd.readouterr().out
    assert fedia3("history", "stable", "--at", own, "--on", "2020-01-01") == 4
    assert fedia3("history", "stable", "--at", own, "--on", "2999-01-01") == 0
    capfd.readouterr()
    assert fedia3("aliases", "--at", own, "--json") == 0
    assert [(a["name"], a["version"]) for a in facts(capfd)] == [("stable", 1)]
    assert fedia3("promote", "stable", 0, "--at", own) == 0
    assert "dropped" in capfd.readouterr().out


def test_a_yanked_version_is_marked_and_comes_back(
    fedia3: Command, own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    The one before is the latest meanwhile.
    """
    assert fedia3("versions", "--at", own, "--json") == 0
    newest = facts(capfd)[0]["version"]
    assert fedia3("yank", newest, "--at", own) == 0
    assert f"v{newest - 1} now" in capfd.readouterr().out
    assert fedia3("versions", "--at", own) == 0
    assert capfd.readouterr().out.splitlines()[0].endswith("yanked")
    assert fedia3("yank", newest, "--undo", "--at", own) == 0
    assert f"v{newest} now" in capfd.readouterr().out
    assert fedia3("yank", 99, "--at", own) == 4


def test_a_registry_is_copied_once(
    fedia3: Command, at: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    The copy's versions are the registry's; 5, a conflict, for a second copy into the same place.
    """
    copied = tmp_path / "registry.db"
    assert fedia3("copy", "--at", at, "--to", f"sqlite:///{copied}", "--json") == 0
    assert json.loads(capfd.readouterr().out)["rows"] > 0
    listed = []
    for folder in (at, tmp_path):
        assert fedia3("versions", "--at", folder, "--json") == 0
        listed.append(capfd.readouterr().out)
    assert listed[0] == listed[1]
    assert fedia3("copy", "--at", at, "--to", f"sqlite:///{copied}") == 5
    assert "name one that is empty" in capfd.readouterr().err


def test_a_coordinators_registry_is_where_its_settings_say(
    fedia3: Command, at: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    With a database in the settings that one is read, whatever lies in the folder.
    """
    assert fedia3("copy", "--at", at, "--to", f"sqlite:///{tmp_path}/other.db") == 0
    (tmp_path / "coordinator.toml").write_text(
        '[coordinator]\nhosts = ["a"]\nbase = "tiny"\n'
        f'[registry]\ndatabase = "sqlite:///{tmp_path}/other.db"\n'
    )
    capfd.readouterr()
    assert fedia3("versions", "--at", tmp_path) == 0
    assert "v1 " in capfd.readouterr().out


def test_a_running_coordinators_registry_is_not_copied(
    fedia3: Command, at: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    What it writes meanwhile would be missing: 5, and the word to stop it.
    """
    shutil.copytree(at, tmp_path / "registry")
    (tmp_path / "coordinator.toml").write_text("")
    with serving_alone(tmp_path):
        assert fedia3("copy", "--at", tmp_path, "--to", f"sqlite:///{tmp_path}/other.db") == 5
    assert "stop it" in capfd.readouterr().err
    assert not (tmp_path / "other.db").exists()


def test_two_versions_are_compared_by_layer_and_kind(
    fedia3: Command, at: Path, finished: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    Facts for each of two layers' keys, values and feed-forward, a line each, and a picture.
    """
    base, picture = finished.base_folder, tmp_path / "moved.png"
    asked = ["diff", "everyone@1", "ann", "--base", base, "--at", at]
    assert fedia3(*asked, "--json", "--png", picture) == 0
    facts = json.loads(capfd.readouterr().out)
    assert (facts["from"]["version"], facts["to"]["owner"]["name"]) == (1, "ann")
    assert [(d["layer"], d["kind"]) for d in facts["differences"]] == [
        (f"model.layers.{layer}", kind) for layer in (0, 1) for kind in ("k", "v", "ff")
    ]
    own = finished.adapter("ann").adapter.vector - 1  # version 1 is the base: all ones
    distances = [d["distance"] for d in facts["differences"]]
    assert np.linalg.norm(distances) == pytest.approx(np.linalg.norm(own), rel=1e-5)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert fedia3(*asked) == 0
    assert "model.layers.1 ff" in capfd.readouterr().out


def test_versions_of_two_base_models_are_not_mixed(
    fedia3: Command, finished: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    Everyone's is for one, bob's for another; neither needs to be on this machine to be told apart.
    """
    schemas = [Schema(digest * 64, finished.schema.targets) for digest in "ab"]
    with Registry.open(tmp_path) as registry:
        registry.publish_global(Adapter.ones(schemas[0]))
        other = registry.publish_global(Adapter.ones(schemas[1]))
        part = np.zeros(schemas[1].n_params, np.float32)
        own = PersonalAdapter(schemas[1], part, other.digest)
        registry.publish_personal("bob", own, num_examples=1)
    assert fedia3("diff", "everyone", "bob", "--at", tmp_path) == 3
    assert "everyone has adapters for 2 base models" in capfd.readouterr().err
    with Registry.open(tmp_path / "one") as registry:
        registry.publish_global(Adapter.ones(schemas[0]))
        registry.store.publish(_draft_of(own), datetime(2026, 1, 1, tzinfo=UTC))
    assert fedia3("diff", "everyone", "bob", "--at", tmp_path / "one") == 3
    said = capfd.readouterr().err
    assert "version 1 of everyone is for base model aaaaaaaaaaaa" in said
    assert "version 1 of user 'bob' for bbbbbbbbbbbb" in said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["everyone", "ann@3rd"], 3, "cannot read '3rd'"),
        (["everyone", "ann@stable"], 4, "no alias 'stable'"),
        (["everyone", "ann@7"], 4, "no version 7"),
        (["everyone", "zoe"], 4, "zoe"),
        (["everyone", "ann", "--base", "nonesuch"], 4, "no base model 'nonesuch'"),
        (["everyone", "ann", "--base", "tiny"], 4, "no adapter for a base model"),
        (["everyone", "ann"], 4, "--base"),
        (["everyone", "ann", "--base", "TOY", "--png", "no/such/folder.png"], 3, "cannot draw"),
    ],
)
def test_what_cannot_be_compared_is_said(
    words: list[str],
    code: int,
    message: str,
    fedia3: Command,
    at: Path,
    toy_folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """
    No such version, nobody, no such base model, another one, one that is not on this machine; no
    folder for the picture.
    """
    words = [str(toy_folder) if word == "TOY" else word for word in words]
    assert fedia3("diff", *words, "--at", at) == code
    assert message in capfd.readouterr().err


@pytest.fixture
def copied(at: Path, tmp_path: Path) -> Path:
    """That registry, to publish into."""
    return Path(shutil.copytree(at, tmp_path / "registry"))


@pytest.mark.parametrize(
    ("options", "combined"),
    [
        (["--op", "product"], lambda a, b: product([a, b])),
        (["--op", "sum"], lambda a, b: sum_of_deltas([a, b], [1, 1])),
        (
            ["--op", "sum", "--alpha", "0.5", "--alpha", "k=1,v=2,ff=0"],
            lambda a, b: sum_of_deltas([a, b], [0.5, Dial((("k", 1), ("v", 2), ("ff", 0)))]),
        ),
        (["--op", "interpolate"], lambda a, b: interpolate(a, b, 0.5)),
        (
            ["--op", "interpolate", "--alpha", "layer:0=1,layer:1=0.2", "--space", "log"],
            lambda a, b: interpolate(a, b, Dial(((range(1), 1), (range(1, 2), 0.2))), "log"),
        ),
    ],
)
def test_versions_are_composed_into_a_folder(
    options: list[str],
    combined: Callable[[Adapter, Adapter], Adapter],
    fedia3: Command,
    at: Path,
    finished: Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """
    What the arithmetic says, in a PEFT folder that names what it was made of.
    """
    asked = ["compose", "everyone@2", "ann", *options, "--base", finished.base_folder, "--at", at]
    assert fedia3(*asked, "--out", tmp_path / "made", "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    with Registry.open(at) as registry:
        schema, users = finished.schema, (Owner.everyone(), Owner.user("ann"))
        records = [
            registry.store.find(owner, schema.base_digest, version)
            for owner, version in zip(users, (2, None), strict=True)
        ]
        expected = combined(*(registry.scales(record, schema) for record in records))
    assert read_peft_folder(tmp_path / "made", schema) == expected
    file = (tmp_path / "made" / "adapter_model.safetensors").read_bytes()
    made = json.loads(checked_header(file, PEFT_FILES).metadata["fedia3.composed"])
    assert made == {key: facts[key] for key in ("op", "of", "alpha", "space")}
    assert made["of"] == [record.digest for record in records]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["everyone", "ann", "--op", "product", "--alpha", "1"], "takes no --alpha"),
        (["everyone", "ann", "--op", "sum", "--alpha", "1"], "expected 2 weights"),
        (["everyone", "ann", "--op", "sum", "--space", "log"], "is for --op interpolate"),
        (["everyone", "--op", "interpolate"], "from one version to another"),
        (["everyone", "ann", "--op", "interpolate", "--alpha", "1", "--alpha", "0"], "2 of it"),
        (["everyone", "ann", "--op", "interpolate", "--alpha", "k=1"], "the dial 'k=1' names k"),
    ],
)
def test_what_cannot_be_composed_is_said(
    words: list[str],
    message: str,
    fedia3: Command,
    at: Path,
    toy_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """
    3, with the reason, and nothing is written.
    """
    out = tmp_path / "made"
    assert fedia3("compose", *words, "--base", toy_folder, "--at", at, "--out", out) == 3
    assert message in capfd.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("owner", ["everyone", "ann"])
def test_what_was_exported_is_imported_and_exported_as_the_same_bytes(
    owner: str,
    fedia3: Command,
    copied: Path,
    finished: Run,
    toy_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """
    Everyone's as everyone's and ann's as hers, though everyone's went on in between; each is a
    new version with the same scales, hers on the same global version.
    """
    here, folders = ["--base", toy_folder, "--at", copied], (tmp_path / "once", tmp_path / "again")
    assert fedia3("export", owner, "--out", folders[0], *here) == 0
    whose = ["--global"] if owner == "everyone" else ["--user", owner]
    with Registry.open(copied) as registry:
        # far enough that most of ann's scales could not be met to the bit from here
        moved = np.linspace(5, 7, finished.schema.n_params)
        registry.publish_global(Adapter(finished.schema, moved))
    capfd.readouterr()
    assert fedia3("import", folders[0], *whose, *here, "--json") == 0
    published = json.loads(capfd.readouterr().out)
    assert published["exact"] is True
    assert (
        fedia3("export", f"{owner}@{published['version']['version']}", "--out", folders[1], *here)
        == 0
    )
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert set(files[0]) == {"adapter_config.json", "adapter_model.safetensors"}
    with Registry.open(copied) as registry:
        owners = (Owner.everyone(), Owner.user("ann"))
        base = registry.base_of(owners[owner == "ann"])
        newest, before, *_ = registry.versions(owners[owner == "ann"], base)
    assert (newest.version, newest.parent) == (before.version + 1, before.digest)
    assert owner == "everyone" or newest.global_digest == before.global_digest


def test_a_version_of_another_registry_is_kept_relative_to_everyones_latest_here(
    fedia3: Command, at: Path, finished: Run, tmp_path: Path
) -> None:
    """
    Nobody here published the global version that the folder names.
    """
    here = ["--base", finished.base_folder, "--at"]
    assert fedia3("export", "ann", "--out", tmp_path / "ann", *here, at) == 0
    schema, elsewhere = finished.schema, tmp_path / "elsewhere"
    with Registry.open(elsewhere) as registry:
        latest = registry.publish_global(Adapter.ones(schema))
    assert fedia3("import", tmp_path / "ann", "--user", "ann", *here, elsewhere) == 0
    with Registry.open(elsewhere) as registry:
        served = registry.resolve("ann", schema)
    assert served.record.global_digest == latest.digest
    own = finished.adapter("ann").adapter.vector
    np.testing.assert_allclose(served.adapter.vector, own, rtol=0, atol=1e-7)


def test_an_own_adapter_is_imported_onto_everyones_latest(
    fedia3: Command, copied: Path, finished: Run, tmp_path: Path
) -> None:
    """
    eve, who never trained, is served what was published for her; at alpha 0 still everyone's.
    """
    schema = finished.schema
    scales = Adapter(schema, np.linspace(0.9, 1.1, schema.n_params))
    write_peft_folder(scales, tmp_path / "eve", base_name="toy", task_type="CAUSAL_LM")
    words = ["import", tmp_path / "eve", "--user", "eve", "--base", finished.base_folder]
    assert fedia3(*words, "--at", copied) == 0
    with Registry.open(copied) as registry:
        served = registry.resolve("eve", schema)
        assert served.adapter == scales
        assert registry.resolve("eve", schema, 0.0).adapter == finished.adapter("ann", 0.0).adapter


def test_rounding_far_from_everyones_is_said(
    fedia3: Command,
    copied: Path,
    finished: Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """
    Scales of about a millionth have bits that everyone's plus a difference has not.
    """
    schema = finished.schema
    scales = Adapter(schema, np.linspace(1e-6, 2e-6, schema.n_params))
    write_peft_folder(scales, tmp_path / "far", base_name="toy", task_type="CAUSAL_LM")
    words = ["import", tmp_path / "far", "--user", "eve", "--base", finished.base_folder]
    assert fedia3(*words, "--at", copied) == 0
    assert "rounded in their last place" in capfd.readouterr().out
    with Registry.open(copied) as registry:
        served = registry.resolve("eve", schema).adapter.vector
    np.testing.assert_allclose(served, scales.vector, rtol=0, atol=6e-8)


def _renamed(tensors: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("base_model.model."): value for key, value in tensors.items()}


def _without_first(tensors: dict[str, Any]) -> dict[str, Any]:
    return dict(list(tensors.items())[1:])


def _with_another(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {"base_model.model.lm_head.ia3_l": np.ones((3, 1), np.float32)}


def _turned(tensors: dict[str, Any]) -> dict[str, Any]:
    return {key: np.ascontiguousarray(value.T) for key, value in tensors.items()}


def _with_nan(tensors: dict[str, Any]) -> dict[str, Any]:
    return {key: np.full_like(value, np.nan) for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_renamed, "another prefix"),
        (_without_first, "1 tensors are missing"),
        (_with_another, "1 tensors are in no target"),
        (_turned, "expected shape"),
        (_with_nan, "not finite"),
    ],
)
@pytest.mark.parametrize("whose", [["--global"], ["--user", "ann"]], ids=["global", "user"])
def test_a_folder_that_does_not_fit_is_refused_to_the_last_key(
    damage: Callable[[dict[str, Any]], dict[str, Any]],
    message: str,
    whose: list[str],
    fedia3: Command,
    copied: Path,
    toy_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """
    Each fault has its words, and nothing is published.
    """
    here = ["--base", toy_folder, "--at", copied]
    assert fedia3("export", "ann", "--out", tmp_path / "ann", *here) == 0
    file = tmp_path / "ann" / "adapter_model.safetensors"
    save_file(damage(load_file(file)), file)
    owner = Owner.everyone() if whose == ["--global"] else Owner.user("ann")
    with Registry.open(copied) as registry:
        before = registry.versions(owner, registry.base_of(owner))
    assert fedia3("import", tmp_path / "ann", *whose, *here) == 3
    assert message in capfd.readouterr().err
    with Registry.open(copied) as registry:
        assert registry.versions(owner, registry.base_of(owner)) == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["import", "none"], 3, "--user NAME or --global"),
        (["import", "none", "--user", "ann", "--global"], 3, "--user NAME or --global"),
        (["import", "none", "--global"], 3, "cannot read none/adapter_config.json"),
        (["export", "ann", "--out", "o", "--dtype", "float16"], 3, "--dtype is for --merged"),
        (["export", "ann@9", "--out", "o"], 4, "no version 9"),
    ],
)
def test_mistakes_in_moving_folders_are_said(
    words: list[str],
    code: int,
    message: str,
    fedia3: Command,
    at: Path,
    toy_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """
    Whose it is, where it lies, what it should become.
    """
    monkeypatch.chdir(tmp_path)
    assert fedia3(*words, "--base", toy_folder, "--at", at) == code
    assert message in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_merged_model_answers_as_the_adapter_does(
    fedia3: Command, at: Path, finished: Run, tmp_path: Path
) -> None:
    """
    Plain transformers, a folder without fedia3 in it: ann's likeliest next token is the same.
    """
    out = tmp_path / "merged"
    words = ["export", "ann", "--merged", "--dtype", "float16", "--out", out]
    assert fedia3(*words, "--base", finished.base_folder, "--at", at) == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16).float()
    tokens = AutoTokenizer.from_pretrained(out)("aaab aa", return_tensors="pt").input_ids
    with torch.no_grad():
        merged = model(tokens).logits
    base = load(finished.base_folder)
    bank = IA3Bank(base.model, base.schema)
    bank.load([finished.adapter("ann").adapter.vector])
    with torch.no_grad(), bank.using(torch.tensor([0])):
        served = base.model(tokens).logits
    with torch.no_grad():
        bare = base.model(tokens).logits
    assert (merged - served).abs().max() < 0.1 * (bare - served).abs().max()


def _draft_of(part: PersonalAdapter) -> AdapterDraft:
    """A user's version as a store takes it, its bytes elsewhere."""
    return AdapterDraft(
        owner=Owner.user("bob"), form="personal", digest="d" * 64,
        schema_digest=part.schema.digest, base=part.schema.base_digest, round_num=0,
        num_examples=1, global_digest=part.global_digest,
    )  # fmt: skip
