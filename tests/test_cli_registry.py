"""``fedia3 registry`` as people type it, on a finished run's registry."""

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from fedia3 import cli
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.schema import Schema
from fedia3.coordinator.records import AdapterDraft, Owner
from fedia3.coordinator.registry import Registry
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
        (["everyone", "ann@stable"], 3, "cannot read 'stable'"),
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


def _draft_of(part: PersonalAdapter) -> AdapterDraft:
    """A user's version as a store takes it, its bytes elsewhere."""
    return AdapterDraft(
        owner=Owner.user("bob"), form="personal", digest="d" * 64,
        schema_digest=part.schema.digest, base=part.schema.base_digest, round_num=0,
        num_examples=1, global_digest=part.global_digest,
    )  # fmt: skip
