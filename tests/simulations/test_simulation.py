"""The whole loop on a toy base: rounds, personal parts, report, interruption."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedia3.adapters.base_model import fastest_dtype, load
from fedia3.client.personalization import Personalized, personalize
from fedia3.client.tasks import task_for
from fedia3.client.trainer import ResidentTrainer, evaluate_rows
from fedia3.coordinator.records import Owner
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.rounds import RoundResult
from fedia3.errors import BadData, BadSetting, NotFound, WrongBaseModel
from fedia3.simulations import simulation
from fedia3.simulations.population import prepare, read_people
from fedia3.simulations.report import Report
from fedia3.simulations.run import Run
from fedia3.simulations.settings import RunFolder, Settings
from fedia3.simulations.simulation import Unwatched, partners, simulate
from fedia3.testing import tiny_base

USERS = ["ann", "bob", "cyd", "dee"]


class Stop(Exception):
    """Somebody pressed Ctrl-C."""


class Stopper(Unwatched):
    """Stops the run behind a round, or at the first step behind the rounds."""

    def __init__(self, after_round: int | None = None, at: str = "nothing") -> None:
        self.after_round, self.at = after_round, at

    def round_committed(self, result: RoundResult) -> None:
        if result.state.round_num == self.after_round:
            raise Stop

    def worked(self, what: str, done: int, total: int) -> None:
        if what == self.at:
            raise Stop


class Listener(Unwatched):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def seed_started(self, seed: int, people: Any, base: Any) -> None:
        self.told.append(f"seed {seed}")

    def round_started(self, round_num: int, cohort: Sequence[str]) -> None:
        self.told.append(f"round {round_num} of {len(cohort)}")

    def worked(self, what: str, done: int, total: int) -> None:
        self.told.append(f"{what} {done}/{total}")


def facts_of(report: Report) -> dict[str, Any]:
    """Everything but what the clock and the machine add."""
    content = json.loads(report.to_json())
    del content["facts"]["seconds"], content["facts"]["peak_memory"]
    return content


def everything(run: Run) -> dict[str, Any]:
    """Every version's bytes and lineage, every round's record, the server state."""
    versions = [asdict(record) for record in run.versions()]
    for version in versions:
        del version["created_at"]
    with Registry.open(run.folder.registry(run.seed)) as registry:
        rounds = [asdict(record) for record in registry.rounds()]
        state = registry.server_state()
    for record in rounds:
        del record["committed_at"]
    return {"versions": versions, "rounds": rounds, "state": state}


def test_everybody_is_reported_once(finished: Run):
    """
    Four users of nine training and two test texts each, in name order.
    """
    users = finished.report.users
    assert [u.user for u in users] == USERS
    assert {(u.train_examples, u.test_examples) for u in users} == {(9, 2)}


def test_the_facts_are_what_was_asked_for(finished: Run):
    """
    Two rounds of three clients; an adapter of 192 scales is 768 bytes each way.
    """
    facts = finished.report.facts
    assert (facts.rounds, facts.cohort, facts.users, facts.seeds) == (2, 3, 4, (0,))
    assert (facts.adapter_params, facts.bytes_down, facts.bytes_up) == (192, 768, 768)
    assert (facts.data, facts.base, facts.rejected) == ("chats.jsonl", "toy", 0)
    assert 0 < facts.grad_norm[0] <= facts.grad_norm[1]


def test_every_round_is_in_the_registry(finished: Run):
    """
    Round 0 is the untrained adapter, then two rounds of three contributions.
    """
    with Registry.open(finished.folder.registry(0)) as registry:
        rounds = registry.rounds()
    assert [(r.round_num, len(r.contributions)) for r in rounds] == [(0, 0), (1, 3), (2, 3)]


def test_training_helps_its_own_user(finished: Run):
    """
    On four people who each repeat their own word, their own part beats the base for all.
    """
    assert all(u.personal < u.base for u in finished.report.users)


def test_who_has_too_little_text_is_named_and_served_the_global(finished: Run):
    """
    eve's three texts train nothing; fetching her adapter gives everyone's.
    """
    assert finished.report.facts.too_small == {"eve": 3}
    assert "eve (3)" in (finished.folder.path / "report.txt").read_text()
    served = finished.adapter("eve")
    assert served.personal is None
    assert served.adapter == finished.adapter("ann", alpha=0.0).adapter


def test_users_of_the_pretraining_text_are_reported_apart(finished: Run):
    """
    The toy base has seen ann.
    """
    assert [u.user for u in finished.report.users if u.seen_in_pretraining] == ["ann"]
    text = finished.report.to_text()
    assert "users new to the base (3)" in text
    assert "users the base's pretraining saw (1)" in text


def test_only_what_the_gate_serves_is_published(
    small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """
    bob's part is worse on his validation text: no version is his, and he is served the global.
    """

    def bob_loses(trainer: Any, users: Sequence[str], *rest: Any) -> Mapping[str, Personalized]:
        results = dict(personalize(trainer, users, *rest))
        better = {u: replace(r, personal_loss=r.global_loss - 1) for u, r in results.items()}
        return better | {"bob": replace(results["bob"], personal_loss=99.0)}

    monkeypatch.setattr(simulation, "personalize", bob_loses)
    folder = RunFolder(tmp_path / "run")
    report = simulate(small, folder)
    run = Run.open(folder.path)
    assert {u.user: u.choice for u in report.users} == {
        "ann": "personal", "bob": "global", "cyd": "personal", "dee": "personal",
    }  # fmt: skip
    assert [r.owner.name for r in run.versions() if r.owner.kind == "user"] == ["ann", "cyd", "dee"]
    assert run.adapter("bob").personal is None
    assert run.adapter("bob").adapter == run.adapter("eve").adapter != run.adapter("ann").adapter
    bob = report.users[1]
    assert bob.served == bob.global_


def test_what_is_reported_is_what_is_served(finished: Run, toy_folder: Path, small: Settings):
    """
    The adapter that the registry serves scores the reported test loss on the user's test split.
    """
    base = load(toy_folder, dtype=fastest_dtype())
    people = prepare(read_people(small, base), small, 0, base)
    trainer = ResidentTrainer(
        base.model, base.schema, task_for(base.model, base.pad_id), people.clients
    )
    results = evaluate_rows(
        base.model,
        trainer.bank,
        trainer.task,
        [finished.adapter(user).adapter.vector for user in USERS],
        [people.clients[user].test for user in USERS],
    )
    reported = [u.served for u in finished.report.users]
    # packs of another mix of adapters round otherwise in bfloat16
    assert [r.loss for r in results] == pytest.approx(reported, abs=1e-3)


def test_the_watcher_hears_of_every_step(small: Settings, tmp_path: Path):
    """
    The seed, two rounds of three clients, four users through each step.
    """
    listener = Listener()
    simulate(small, RunFolder(tmp_path / "run"), listener)
    assert listener.told == [
        "seed 0",
        "round 1 of 3",
        "round 2 of 3",
        "personalizing 4/4",
        "testing base 4/4",
        "testing global 4/4",
        "testing personal 4/4",
        "testing another user's 4/4",
    ]


def test_a_finished_run_resumed_reports_the_same(finished: Run, small: Settings, tmp_path: Path):
    """
    Nothing is trained in rounds again, no version is added, no figure changes.
    """
    folder = RunFolder(tmp_path / "run")
    simulate(small, folder)
    before = everything(Run.open(folder.path))
    listener = Listener()
    again = simulate(small, folder, listener)
    assert not [told for told in listener.told if told.startswith("round")]
    assert everything(Run.open(folder.path)) == before
    assert facts_of(again) == facts_of(finished.report)


@pytest.mark.parametrize(
    "stopper",
    [
        Stopper(after_round=1),
        Stopper(after_round=2),
        Stopper(at="personalizing"),
        Stopper(at="testing personal"),
    ],
    ids=["round 1", "round 2", "personalizing", "testing"],
)
def test_a_stopped_run_ends_as_one_that_was_not(
    stopper: Stopper, small: Settings, finished: Run, tmp_path: Path
):
    """
    Resumed, every version's bytes, the rounds' records, the server state and the report are the
    same.
    """
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(Stop):
        simulate(small, folder, stopper)
    with pytest.raises(NotFound, match="is not finished"):
        _ = Run.open(folder.path).report
    report = simulate(folder.settings(), folder)
    assert facts_of(report) == facts_of(finished.report)
    assert everything(Run.open(folder.path)) == everything(finished)


def test_every_seed_is_a_federation_of_its_own(small: Settings, finished: Run, tmp_path: Path):
    """
    Two seeds: each user twice in the report, two registries; seed 0 is the one-seed run.
    """
    folder = RunFolder(tmp_path / "run")
    report = simulate(replace(small, seeds=(0, 1)), folder)
    assert [(u.seed, u.user) for u in report.users] == [(s, u) for s in (0, 1) for u in USERS]
    first, second = Run.open(folder.path), Run.open(folder.path, seed=1)
    assert everything(first) == everything(finished)
    assert second.adapter("eve").adapter != first.adapter("eve").adapter
    assert "seeds 0, 1" in report.to_text()
    with pytest.raises(NotFound, match=r"no federation of seed 2 \(its seeds: 0, 1\)"):
        Run.open(folder.path, seed=2)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"rounds": 3}, "settings"), ({"seeds": (1,)}, "settings")],
)
def test_other_settings_do_not_continue_a_run(
    finished: Run, small: Settings, change: dict[str, Any], named: str
):
    """
    The folder was started with other settings; its report stays.
    """
    before = (finished.folder.path / "report.json").read_bytes()
    with pytest.raises(BadSetting, match=f"started with other {named}"):
        simulate(replace(small, **change), finished.folder)
    assert (finished.folder.path / "report.json").read_bytes() == before


def moved_run(small: Settings, folder: Path, **change: Any) -> RunFolder:
    """A run that was begun and stopped in round 1."""
    run = RunFolder(folder)
    with pytest.raises(Stop):
        simulate(replace(small, **change), run, Stopper(after_round=1))
    return run


def test_changed_text_does_not_continue_a_run(small: Settings, tmp_path: Path):
    """
    A line was added to the file between stop and resume.
    """
    copy = tmp_path / "chats.jsonl"
    copy.write_text(Path(small.data or "").read_text())
    run = moved_run(small, tmp_path / "run", data=str(copy))
    with copy.open("a") as stream:
        stream.write('{"user": "ann", "text": "one more"}\n')
    with pytest.raises(BadSetting, match="started with other data"):
        simulate(run.settings(), run)


def test_another_base_does_not_continue_a_run(small: Settings, tmp_path: Path):
    """
    In the base folder's place lies another model.
    """
    tiny_base(tmp_path / "base", seed=1)
    run = moved_run(small, tmp_path / "run", base=str(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base")
    tiny_base(tmp_path / "base", seed=2)
    with pytest.raises(BadSetting, match="started with other base"):
        simulate(run.settings(), run)
    with pytest.raises(WrongBaseModel, match="is another one now"):
        _ = Run.open(run.path).base_folder


def labelled_rows(path: Path) -> Path:
    """Two users with ten yes and no each, alternating at the end: 7 train, 1 decides, 2 judge."""
    labels = [*["yes"] * 7, "no", "yes", "no"]
    rows = [
        {"user": user, "text": f"{user} {n}", "label": label}
        for user in ("ann", "bob")
        for n, label in enumerate(labels)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_are_judged_by_exact_share_beside_the_majority(small: Settings, tmp_path: Path):
    """
    Of two test labels one is the training majority, so that scores 50 %.
    """
    data = labelled_rows(tmp_path / "labels.jsonl")
    report = simulate(replace(small, data=str(data)), RunFolder(tmp_path / "run"))
    assert [u.majority for u in report.users] == [0.5, 0.5]
    assert all(u.exact_served in (0.0, 0.5, 1.0) for u in report.users)
    assert "most common training label: 50.0%" in report.to_text()


def test_a_classifier_is_personalized_too(small: Settings, tmp_path: Path):
    """
    A random BERT with two labels goes the whole way; one guess a text is two test "tokens".
    """
    tiny_base(tmp_path / "bert", "bert", id2label={0: "no", 1: "yes"})
    data = labelled_rows(tmp_path / "labels.jsonl")
    settings = replace(small, data=str(data), base=str(tmp_path / "bert"))
    report = simulate(settings, RunFolder(tmp_path / "run"))
    assert {u.test_tokens for u in report.users} == {2}
    assert all(u.exact_base in (0.0, 0.5, 1.0) for u in report.users)


def test_skipped_lines_are_counted(small: Settings, tmp_path: Path):
    """
    Two malformed lines are left out on request, and the report says so.
    """
    path = tmp_path / "chats.jsonl"
    path.write_text(Path(small.data or "").read_text() + "{\n[]\n")
    with pytest.raises(BadData, match=r"chats\.jsonl:52: expected one JSON object"):
        simulate(replace(small, data=str(path)), RunFolder(tmp_path / "run"))
    report = simulate(
        replace(small, data=str(path), skip_bad_lines=True, rounds=1), RunFolder(tmp_path / "run")
    )
    assert report.facts.skipped_lines == 2
    assert "2 malformed lines were skipped" in report.to_text()


def test_a_run_that_cannot_start_leaves_no_folder(small: Settings, tmp_path: Path):
    """
    One user is too few: nothing was written, and no broken run is the latest.
    """
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(f'{{"user": "ann", "text": "hi {n}"}}\n' for n in range(12)))
    with pytest.raises(BadData, match="at least 2 users"):
        simulate(replace(small, data=str(path)), RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_published_part_names_the_global_it_was_trained_on(finished: Run):
    """
    The last round's version, and the validation losses that let it through.
    """
    last = max(
        (r for r in finished.versions() if r.owner == Owner.everyone()), key=lambda r: r.version
    )
    own = [r for r in finished.versions() if r.owner.kind == "user"]
    assert own
    for record in own:
        assert record.global_digest == last.digest
        assert record.metrics["validation_personal"] < record.metrics["validation_global"]


def test_the_control_gives_everybody_somebody_elses_adapter() -> None:
    """A circle drawn by the seed: nobody meets their own, nobody's is used twice."""
    drawn = partners(5, seed=1)
    assert sorted(drawn) == [0, 1, 2, 3, 4]
    assert all(partner != user for user, partner in enumerate(drawn))
    assert partners(50, seed=1) != partners(50, seed=2)
