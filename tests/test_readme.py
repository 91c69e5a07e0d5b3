"""What README, how-tos and changelog promise: paths, links, commands, rows of data."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import typer

from fedia3.cli import app
from fedia3.client.data import read_jsonl

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md", "docs/data.md", "docs/base-models.md", "docs/deploy.md", "docs/devices.md",
)  # fmt: skip
WRITTEN = (
    "README.md", "CHANGELOG.md", "benchmarks/README.md",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")),
)  # fmt: skip
MODULE = r"(proto|adapters|coordinator|client|simulations|src/fedia3)/\w+\.py"
UNITS = ("docs/deploy/coordinator.service", "docs/devices.md")


def blocks(page: str, language: str) -> list[str]:
    """The page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


def tree_paths() -> set[str]:
    """Every path in README's annotated tree, an entry's depth told by its indentation.

    Two spaces part an entry from its note; a line without them continues the note above.
    """
    (tree,) = [b for b in blocks("README.md", "text") if re.search(r"^\W*adapters/", b, re.M)]
    paths, above = set(), list[tuple[int, str]]()
    for line in tree.splitlines():
        if entry := re.match(r"([│├└─\s]*)([\w.][\w./-]*)(?:\s{2,}|$)", line):
            depth = len(entry[1])
            above = [(d, folder) for d, folder in above if d < depth]
            path = "".join([above[-1][1] if above else "", entry[2]])
            above.append((depth, path))
            paths.add(path)
    return paths


def commands(page: str) -> list[str]:
    """Every ``fedia3 …`` in the page's shell blocks."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("fedia3")]


def parse(command: str) -> None:
    """Read a command line as the program would, without running it."""
    words = shlex.split(command.partition(" > ")[0], comments=True)[1:]
    current: click.Command = typer.main.get_command(app)
    while isinstance(current, click.Group):
        assert words, f"{command!r} ends before a command"
        name = words.pop(0)
        assert name in current.commands, f"no command {name!r}; there are {list(current.commands)}"
        current = current.commands[name]
    current.make_context("fedia3", words)


def test_the_tree_names_what_is_there() -> None:
    """Each path in README's tree exists."""
    paths = tree_paths()
    assert "adapters/" in paths
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def tracked() -> set[str]:
    """Every file that git knows."""
    command = ["git", "-c", "safe.directory=*", "ls-files"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def test_the_tree_leaves_nothing_out() -> None:
    """Each file and folder that git tracks at the top stands in README's tree."""
    top = {path.split("/")[0] for path in tracked()}
    assert top - {path.split("/")[0] for path in tree_paths()} == set()


def test_the_tree_leaves_no_module_out() -> None:
    """Each module has its line; generated code has none."""
    modules = {path for path in tracked() if re.fullmatch(MODULE, path)}
    generated = {path for path in modules if re.search(r"__init__|_pb2", path)}
    assert modules - generated - tree_paths() == set()


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_exist(page: str) -> None:
    """Each command in a shell block is one the program takes, with options that it has."""
    found = commands(page)
    assert found
    for command in found:
        parse(command)


@pytest.mark.parametrize(
    "command", ["fedia3 simulat", "fedia3 simulate --date x", "fedia3 base import"]
)
def test_a_command_that_does_not_exist_is_noticed(command: str) -> None:
    """A wrong name, a wrong option and a missing argument do not parse."""
    with pytest.raises((AssertionError, click.UsageError)):
        parse(command)


@pytest.mark.parametrize("page", UNITS)
def test_a_service_manager_starts_a_command_that_exists(page: str) -> None:
    """What a systemd unit starts is a command line that the program takes."""
    (started,) = re.findall(r"^ExecStart=\S*/(fedia3 .*)$", (ROOT / page).read_text(), re.M)
    parse(started)


@pytest.mark.parametrize("page", WRITTEN)
def test_the_links_lead_somewhere(page: str) -> None:
    """Each relative link and picture is a file or folder of the project, or a heading in one."""
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not leads_somewhere(ROOT / page, target)] == []


def leads_somewhere(page: Path, target: str) -> bool:
    """Whether a relative link's file is there, and the heading in it that it names."""
    name, _, anchor = target.partition("#")
    path = page.parent / name if name else page
    if not anchor:
        return path.exists()
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_two_of_the_demo_users_make_a_deployment(tmp_path: Path) -> None:
    """What README's "Deploy" writes is text that two devices learn from."""
    (code,) = re.findall(
        r"^python - <<'END'\n([^`]*?)^END$", (ROOT / "README.md").read_text(), re.M
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for user in ("alice", "bob"):
        dataset = read_jsonl(tmp_path / f"{user}.jsonl", owner=user)
        assert len(dataset.examples[user]) == 40


def test_the_rows_of_the_data_page_can_be_read(tmp_path: Path) -> None:
    """Each of the five example rows is one that training takes."""
    (rows,) = blocks("docs/data.md", "jsonl")
    (tmp_path / "rows.jsonl").write_text(rows)
    dataset = read_jsonl(tmp_path / "rows.jsonl")
    assert len(dataset.examples["alice"]) == 5
    assert dataset.skipped == ()


def test_the_changelog_tells_of_this_version() -> None:
    """CHANGELOG.md has a heading for the version in pyproject.toml."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)
