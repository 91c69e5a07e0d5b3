"""coordinator.toml: what it may say, and what is said of what it may not."""

from pathlib import Path

import pytest

from fedia3.coordinator.config import CONFIG_VARIABLE, config_of, config_path, read_config
from fedia3.errors import BadSetting, NotFound

LEAST = '[coordinator]\nhosts = ["fl.example.org"]\nbase = "tiny"\n'


def test_two_keys_are_enough(tmp_path: Path) -> None:
    """
    Hosts and base have no default; everything else has.
    """
    config = config_of(LEAST, tmp_path)
    assert config.address == "fl.example.org:8443"
    assert config.fleet_address == "fl.example.org:8444"
    assert config.superlink_address == "127.0.0.1:8441"
    assert config.plan.quorum == 2


def test_every_section_reaches_the_plan(tmp_path: Path) -> None:
    """
    Rounds, training and limits are the plan of a round.
    """
    text = LEAST + "[rounds]\ncohort = 5\n[training]\nepochs = 3\n[limits]\nmax_norm = 7\n"
    plan = config_of(text, tmp_path).plan
    assert (plan.cohort_size, plan.training.epochs, plan.limits.max_norm) == (5, 3, 7.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LEAST + "[round]\n", "no section is called 'round'"),
        (LEAST + "[rounds]\nquorums = 1\n", r"no key in \[rounds\] is called 'quorums'.*quorum"),
        (LEAST + '[rounds]\nquorum = "1"\n', "rounds.quorum is a int, got '1'"),
        (LEAST + "[rounds]\nquorum = true\n", "rounds.quorum is a int, got True"),
        (LEAST + "[rounds]\nquorum = 3\n", "quorum lies between 1 and min_clients 2, got 3"),
        (LEAST + "[rounds]\ncohort = 1\n", "min_clients is at most cohort 1, got 2"),
        (LEAST + "[training]\nepochs = 0\n", "epochs is at least 1, got 0"),
        (LEAST + "rounds = 3\n", "no key in .coordinator. is called 'rounds'"),
        ("rounds = 3\n" + LEAST, "as a section, got rounds = 3"),
        ("[coordinator]\nhosts = []\nbase = 'x'\n", "hosts names at least one host"),
        ("[coordinator]\nhosts = 'a'\nbase = 'x'\n", "a list of strings"),
        ("[coordinator]\nhosts = ['a']\n", "lacks one of base"),
        ("", "no section .coordinator."),
        ("[coordinator\n", "is no TOML"),
        (LEAST + "grpc_port = 8444\n", "grpc_port, fleet_port and superlink_port differ"),
        (LEAST + "grpc_port = 0\n", "a port lies between 1 and 65535, got 0"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: str) -> None:
    """
    An unknown key, a wrong type or a value outside its range is named, with what would be right.
    """
    with pytest.raises(BadSetting, match=said):
        config_of(text, tmp_path)


def test_a_folder_stands_for_the_file_in_it(tmp_path: Path) -> None:
    """
    What the coordinator keeps lies beside its settings, wherever it is started.
    """
    (tmp_path / "coordinator.toml").write_text(LEAST)
    assert read_config(tmp_path) == read_config(tmp_path / "coordinator.toml")
    assert read_config(tmp_path).folder == tmp_path.resolve()


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    """
    The message names the command that writes it.
    """
    with pytest.raises(NotFound, match="fedia3 coordinator init"):
        read_config(tmp_path / "none.toml")


def test_the_environment_names_the_file_where_nothing_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Given, then the environment, then the working folder.
    """
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    assert config_path() == Path("coordinator.toml")
    monkeypatch.setenv(CONFIG_VARIABLE, "/etc/fedia3/coordinator.toml")
    assert config_path() == Path("/etc/fedia3/coordinator.toml")
    assert config_path(Path("mine.toml")) == Path("mine.toml")


@pytest.mark.parametrize(
    ("rounds", "length"), [("", 20), ("every_s = 60", 1), ("rounds_per_run = 3", 3)]
)
def test_a_run_holds_many_rounds_only_where_no_pause_lies_between(
    tmp_path: Path, rounds: str, length: int
) -> None:
    """
    A Flower run takes seconds to start, and one that waits for an hour holds a process for it.
    """
    assert config_of(f"{LEAST}[rounds]\n{rounds}\n", tmp_path).rounds.run_length == length


def test_the_environment_names_the_database_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A URL with a password need not stand in the file, and is not shown with the settings.
    """
    text = LEAST + '[registry]\ndatabase = "postgresql://fedia3@db/fedia3"\n'
    assert config_of(LEAST, tmp_path).database is None
    assert config_of(text, tmp_path).database == "postgresql://fedia3@db/fedia3"
    monkeypatch.setenv("FEDIA3_DATABASE_URL", "postgresql://fedia3:secret@db/other")
    config = config_of(text, tmp_path)
    assert config.database == "postgresql://fedia3:secret@db/other"
    assert "secret" not in repr(config)
