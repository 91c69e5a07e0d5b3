"""The command line: facts on stdout, words on stderr, and what it leaves with."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import typer

from fedia3 import __version__, cli
from fedia3.adapters.adapter import Adapter
from fedia3.adapters.base_model import quiet
from fedia3.adapters.peft_folder import read_peft_folder
from fedia3.simulations.run import Run
from fedia3.simulations.settings import RunFolder, Settings
from fedia3.testing import byte_tokenizer, tiny_model

Command = Callable[..., int]


@pytest.fixture
def fedia3(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command line in this process; its exit code."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["fedia3", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


def small_run(toy_folder: Path, data: Path, out: Path, *more: object) -> list[object]:
    """``fedia3 simulate`` of one round, without --json."""
    return [
        "simulate", "--base", toy_folder, "--data", data, "--out", out, "--rounds", 1,
        "--cohort", 3, "--max-length", 32, "--personal-epochs", 1, *more,
    ]  # fmt: skip


def test_simulate_prints_facts_and_nothing_else(
    fedia3: Command,
    toy_folder: Path,
    chats: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    """
    All of stdout is one JSON document, report.json and where it lies; stderr is empty.
    """
    assert fedia3(*small_run(toy_folder, chats, tmp_path / "run", "--json")) == 0
    said = capfd.readouterr()
    facts = json.loads(said.out)
    assert Path(facts.pop("folder")) == tmp_path / "run"
    assert facts == json.loads((tmp_path / "run" / "report.json").read_text())
    assert said.err == ""


def test_simulate_tells_people_what_to_type_next(
    fedia3: Command,
    toy_folder: Path,
    chats: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    """
    The report's head on stdout, then two commands that name user and run; rounds on stderr.
    """
    assert fedia3(*small_run(toy_folder, chats, tmp_path / "run")) == 0
    said = capfd.readouterr()
    assert "fedia3 report — chats.jsonl on base toy" in said.out
    user = next(u.user for u in Run.open(tmp_path / "run").report.users if u.choice == "personal")
    assert f"fedia3 generate --user {user} --run {tmp_path / 'run'}" in said.out
    assert f"fedia3 fetch --user {user} --run {tmp_path / 'run'} --out ./{user}" in said.out
    assert re.search(r"round 1 +3 of 3 clients", said.err)


def test_the_options_reach_the_settings(
    fedia3: Command,
    toy_folder: Path,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """
    Each option that was given is in what the run was asked to do; paths are whole.
    """
    asked: list[Settings] = []

    class Enough(Exception):
        """Nothing is trained here."""

    def listen(settings: Settings, folder: RunFolder, watcher: object) -> None:
        asked.append(settings)
        raise Enough

    monkeypatch.setattr("fedia3.simulations.simulation.simulate", listen)
    monkeypatch.chdir(chats.parent)
    options = {
        "--user-field": "who", "--order-field": "when", "--rounds": 3, "--cohort": 5, "--seeds": 2,
        "--epochs": 4, "--max-steps": 6, "--learning-rate": 0.02, "--personal-epochs": 7,
        "--personal-learning-rate": 0.04, "--batch-size": 9, "--max-length": 99,
        "--min-examples": 11, "--max-examples": 44, "--split": "item",
    }  # fmt: skip
    given = [word for pair in options.items() for word in pair]
    base = f"../{toy_folder.relative_to(chats.parent.parent)}"
    with pytest.raises(Enough):
        fedia3("simulate", "--data", chats.name, "--base", base, "--skip-bad-lines", *given)
    (s,) = asked
    assert (s.data, s.base) == (str(chats), str(toy_folder.resolve()))
    assert (s.user_field, s.order_field, s.skip_bad_lines) == ("who", "when", True)
    assert (s.rounds, s.cohort, s.seeds) == (3, 5, (0, 1))
    assert (s.split.by, s.split.min_examples, s.split.max_examples) == ("item", 11, 44)
    assert (s.training.epochs, s.training.max_steps, s.training.learning_rate) == (4, 6, 0.02)
    assert (s.personal.epochs, s.personal.patience, s.personal.learning_rate) == (7, 2, 0.04)
    assert {(p.batch_size, p.max_length) for p in (s.training, s.personal)} == {(9, 99)}


def test_without_options_the_python_defaults_hold(
    fedia3: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """
    `fedia3 simulate` and `fedia3.simulate()` do the same.
    """
    asked: list[Settings] = []

    def listen(settings: Settings, folder: RunFolder, watcher: object) -> None:
        asked.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("fedia3.simulations.simulation.simulate", listen)
    monkeypatch.chdir(tmp_path)
    assert fedia3("simulate") == 130
    assert asked == [Settings()]


def test_fetch_writes_a_peft_folder_and_says_what_it_is(
    fedia3: Command, finished: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """
    ann's own part, on everyone's third version.
    """
    run = finished.folder.path
    assert fedia3("fetch", "--user", "ann", "--run", run, "--out", tmp_path / "a", "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert (facts["choice"], facts["global"]["version"]) == ("personal", 3)
    assert facts["personal"]["owner"] == str(finished.adapter("ann").record.owner)
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_fetch_dials_by_kind_and_by_layer(fedia3: Command, finished: Run, tmp_path: Path):
    """
    ann's own keys on everyone's values and feed-forward; her own second layer on everyone's first.
    """

    def fetched(alpha: str) -> Adapter:
        folder = tmp_path / alpha
        run = finished.folder.path
        assert fedia3("fetch", "-u", "ann", "--run", run, "-o", folder, "--alpha", alpha) == 0
        return read_peft_folder(folder, finished.schema)

    everyones, own = (finished.adapter("ann", alpha).adapter for alpha in (0, 1))
    keys, second = fetched("k=1,v=0,ff=0"), fetched("layer:0=0,layer:1=1")
    for target in finished.schema.targets:
        from_keys, from_second = target.kind == "k", target.layer == ("model.layers", 1)
        for found, is_own in ((keys, from_keys), (second, from_second)):
            expected = (own if is_own else everyones).scales(target.key)
            assert np.array_equal(found.scales(target.key), expected)
        assert not np.array_equal(own.scales(target.key), everyones.scales(target.key))


def test_fetch_says_who_is_served_the_global(
    fedia3: Command, finished: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """
    eve has no part of her own, in JSON and in words.
    """
    arguments = ["fetch", "-u", "eve", "--run", finished.folder.path, "-o", tmp_path / "eve"]
    assert fedia3(*arguments, "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert (facts["choice"], facts["personal"]) == ("global", None)
    assert fedia3(*arguments) == 0
    assert "eve is served global version 3" in capfd.readouterr().out


def test_an_unknown_user_is_not_found(
    fedia3: Command, finished: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """
    Exit code 4, a near name on stderr, nothing on stdout.
    """
    arguments = ["--user", "anne", "--run", finished.folder.path, "--out", tmp_path / "x"]
    assert fedia3("fetch", *arguments, "--json") == 4
    said = capfd.readouterr()
    assert said.out == ""
    assert "did you mean ann" in said.err


def test_generate_prints_the_completion(
    fedia3: Command, finished: Run, capfd: pytest.CaptureFixture[str]
):
    """
    Greedy and as JSON: the same as from Python, the prompt apart.
    """
    from fedia3.client.generation import Sampling  # noqa: PLC0415  # torch

    arguments = ["generate", "aa", "-u", "ann", "--run", finished.folder.path]
    options = ["--temperature", 0, "--max-new-tokens", 5, "--json"]
    assert fedia3(*arguments, *options) == 0
    expected = finished.generate("ann", "aa", Sampling(max_new_tokens=5, temperature=0))
    facts = json.loads(capfd.readouterr().out)
    assert facts == {"user": "ann", "prompt": "aa", "completion": expected}


def test_generate_in_words_repeats_the_prompt_once(
    fedia3: Command,
    finished: Run,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """
    Brackets in either are text, not rich's markup.
    """
    monkeypatch.setattr(Run, "generate", lambda *_: " [/b] you")
    assert fedia3("generate", "[b] hi", "-u", "ann", "--run", finished.folder.path) == 0
    assert capfd.readouterr().out == "[b] hi [/b] you\n"


def test_adapters_lists_every_version(
    fedia3: Command, finished: Run, capfd: pytest.CaptureFixture[str]
):
    """
    As JSON the records by owner and version; in words also who has none.
    """
    assert fedia3("adapters", "--run", finished.folder.path, "--json") == 0
    listed = json.loads(capfd.readouterr().out)
    known = [(str(r.owner), r.version, r.digest) for r in finished.versions()]
    assert [(r["owner"], r["version"], r["digest"]) for r in listed] == known
    assert fedia3("adapters", "--run", finished.folder.path) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == len(known) + 1
    assert lines[-1].startswith("served the global adapter: ") and "eve" in lines[-1]


def test_base_import_and_list(
    fedia3: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    """
    An imported model is printed with its digest and stands in the list.
    """
    monkeypatch.setenv("FEDIA3_HOME", str(tmp_path / "home"))
    with quiet():
        tiny_model("llama", vocab_size=259).save_pretrained(tmp_path / "source")
        byte_tokenizer().save_pretrained(tmp_path / "source")
    capfd.readouterr()
    assert fedia3("base", "import", tmp_path / "source", "--name", "mine", "--json") == 0
    said = capfd.readouterr()
    entry = json.loads(said.out)
    assert (entry["name"], entry["n_params"], entry["shipped"]) == ("mine", 192, False)
    assert said.err == ""
    assert fedia3("base", "list", "--json") == 0
    listed = {e["name"]: e["digest"] for e in json.loads(capfd.readouterr().out)}
    assert listed["mine"] == entry["digest"]
    assert fedia3("base", "list") == 0
    assert f"mine                 {entry['digest'][:12]}" in capfd.readouterr().out


def test_a_malformed_line_is_named_by_file_and_line(
    fedia3: Command,
    toy_folder: Path,
    chats: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    """
    Bad input leaves with 3; what somebody wrote is not repeated; no folder is left.
    """
    data = tmp_path / "chats.jsonl"
    data.write_text(chats.read_text() + '{"user": "ann", "text": "secr\n')
    assert fedia3(*small_run(toy_folder, data, tmp_path / "run", "--json")) == 3
    said = capfd.readouterr()
    assert f"error: {data}:52: expected one JSON object" in said.err
    assert (said.out, "secr" in said.err) == ("", False)
    assert not (tmp_path / "run").exists()


def test_skipped_lines_are_counted(
    fedia3: Command,
    toy_folder: Path,
    chats: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    """
    --skip-bad-lines goes on without the one bad line and says so.
    """
    data = tmp_path / "chats.jsonl"
    data.write_text(chats.read_text() + "{\n")
    command = small_run(toy_folder, data, tmp_path / "run", "--skip-bad-lines", "--json")
    assert fedia3(*command) == 0
    assert json.loads(capfd.readouterr().out)["facts"]["skipped_lines"] == 1


@pytest.mark.parametrize(
    ("users", "expected"),
    [(["ann"] * 12, "at least 2 users"), (["ann"] * 3, "at least 10 examples"), ([], "usable")],
)
def test_too_few_people_are_bad_input(
    users: list[str],
    expected: str,
    fedia3: Command,
    toy_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    """
    One user, nobody with enough text, nobody at all.
    """
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(f'{{"user": "{u}", "text": "hi {n}"}}\n' for n, u in enumerate(users)))
    assert fedia3(*small_run(toy_folder, data, tmp_path / "run")) == 3
    assert expected in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["simulate", "--nonsense"], 2),
        (["simulate", "--rounds", "many"], 2),
        (["fetch", "--user", "ann"], 2),
        (["fetch", "--user", "ann", "--out", "o", "--alpha", "k=1,q=2"], 3),
        (["generate", "hi", "--user", "ann", "--alpha", "half"], 3),
        (["simulate", "--rounds", "0"], 3),
        (["simulate", "--seeds", "0"], 3),
        (["simulate", "--learning-rate", "7"], 3),
        (["simulate", "--base", "no-such-base"], 4),
        (["simulate", "--resume", "nowhere"], 4),
        (["adapters"], 4),
        (["adapters", "--run", "nowhere"], 4),
        (["base", "import", "./nowhere"], 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_mistakes_have_exit_codes(
    arguments: list[str],
    code: int,
    fedia3: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    """
    2 mistyped, 3 bad input, 4 not found; a word on stderr, never a traceback, nothing written.
    """
    monkeypatch.chdir(tmp_path)
    assert fedia3(*arguments) == code
    said = capfd.readouterr()
    assert said.out == ""
    assert "rror" in said.err and "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_report_leaves_with_6(
    fedia3: Command, finished: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """
    Half a report.json is neither served from nor taken for an unfinished run.
    """
    shutil.copytree(finished.folder.path, tmp_path / "run")
    (tmp_path / "run" / "report.json").write_text("{")
    assert fedia3("adapters", "--run", tmp_path / "run") == 6
    assert "report.json is not a fedia3 report" in capfd.readouterr().err


def test_version(fedia3: Command, capfd: pytest.CaptureFixture[str]):
    """
    One line, the version.
    """
    assert fedia3("--version") == 0
    assert capfd.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (["simulate"], ["--data", "--user-field", "--base", "--rounds", "--resume", "--json"]),
        (["fetch"], ["--user", "--out", "--alpha", "--run", "--seed", "--json"]),
        (["generate"], ["--user", "--temperature", "--max-new-tokens", "--alpha", "--json"]),
        (["adapters"], ["--run", "--seed", "--json"]),
        (["base", "import"], ["--name", "--target", "--feedforward", "--json"]),
        (["base", "list"], ["--json"]),
        (
            [],
            [
                "simulate",
                "fetch",
                "generate",
                "adapters",
                "base",
                "coordinator",
                "client",
                "Exit codes",
            ],
        ),
    ],
    ids=" ".join,
)
def test_help_mentions_what_there_is(
    command: list[str], options: list[str], fedia3: Command, capfd: pytest.CaptureFixture[str]
):
    """
    Every command's help names its options.
    """
    assert fedia3(*command, "--help") == 0
    text = capfd.readouterr().out
    assert [option for option in options if option not in text] == []


def all_commands() -> dict[str, click.Command]:
    """Every command and group of commands, by the words after ``fedia3``."""

    def below(words: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield words, command
        if isinstance(command, click.Group):
            for name, each in command.commands.items():
                yield from below(f"{words} {name}".strip(), each)

    return dict(below("", typer.main.get_command(cli.app)))


@pytest.mark.parametrize("words", all_commands())
def test_help_says_what_everything_is_for(words: str):
    """
    Each command, argument and option has words of its own, which its help shows.
    """
    command = all_commands()[words]
    assert command.help
    assert [p.name for p in command.params if not getattr(p, "help", None)] == []


HEAVY = {"torch", "transformers", "bitsandbytes", "flwr", "grpc", "sqlalchemy", "alembic",
         "matplotlib"}  # fmt: skip
LIGHT_CODE = """
import sys
from fedia3 import cli
sys.argv = ["fedia3", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as end:
    assert not end.code, end.code
print("\\n" + " ".join(sorted(sys.modules)))
"""


@pytest.mark.parametrize("words", [*(f"{w} --help" for w in all_commands()), "--version"])
def test_help_imports_nothing_heavy(words: str):
    """
    Help answers at once because it loads no model, no server and no database.
    """
    done = subprocess.run(
        [sys.executable, "-c", LIGHT_CODE, *words.split()],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "typer" in loaded
    assert loaded & HEAVY == set()


def test_resuming_another_runs_data_is_bad_input(
    fedia3: Command,
    small: Settings,
    finished: Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    """
    The file that a run read has one line more now.
    """
    data = tmp_path / "chats.jsonl"
    data.write_text(Path(small.data or "").read_text() + '{"user": "ann", "text": "new"}\n')
    run = RunFolder(tmp_path / "run")
    run.begin(
        replace(small, data=str(data)), base=finished.folder.base(), data="0" * 64, compute=""
    )
    assert fedia3("simulate", "--resume", run.path) == 3
    assert "was started with other data" in capfd.readouterr().err


def test_json_facts_have_no_times_that_json_lacks(finished: Run):
    """
    A record's time of creation is ISO text.
    """
    facts: dict[str, Any] = cli._record_facts(finished.versions()[0])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*\+00:00", facts["created_at"])
