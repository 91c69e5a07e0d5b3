"""A device's own text: read, split, encoded, and noticed when it changes."""

import json
import os
from pathlib import Path

import pytest

from fedia3.adapters.base_model import BaseModel
from fedia3.client.data import files_stamp
from fedia3.client.examples import OwnText, encode_sides, read_own
from fedia3.client.splits import SplitPlan


def written(path: Path, count: int, *more: str) -> Path:
    """A file of ``count`` texts, ``hi 0`` on, and whatever lines come behind."""
    rows = [json.dumps({"text": f"hi {n}"}) for n in range(count)]
    path.write_text("".join(f"{row}\n" for row in (*rows, *more)))
    return path


def read(path: Path, toy: BaseModel) -> OwnText:
    """The text in ``path`` as a device reads it."""
    return read_own(path, SplitPlan(), toy)


def test_all_rows_are_the_owners(toy: BaseModel, tmp_path: Path):
    """
    Rows need no user column; of ten texts seven train, one decides and two judge.
    """
    text = read(written(tmp_path / "chat.jsonl", 10), toy)
    assert text.sides is not None
    encoded = encode_sides(text.sides, toy, max_length=32)
    assert [len(side) for side in (encoded.train, encoded.validation, encoded.test)] == [7, 1, 2]
    assert (text.texts, text.too_little) == (10, None)


def test_a_half_written_line_is_left_out_and_named(toy: BaseModel, tmp_path: Path):
    """
    The last line of a file that somebody is writing spoils nothing.
    """
    text = read(written(tmp_path / "chat.jsonl", 10, '{"text": "hi'), toy)
    assert text.sides is not None
    assert [line.line for line in text.skipped] == [11]


def test_too_little_text_is_said_and_no_error(toy: BaseModel, tmp_path: Path):
    """
    Three texts, no file, and a folder without files are states of a device, not its end.
    """
    few = read(written(tmp_path / "chat.jsonl", 3), toy)
    assert few.too_little == (
        "expected at least 10 texts, different enough to hold some out, got 3"
    )
    assert few.sides is None
    assert "found nothing" in str(read(tmp_path / "absent.jsonl", toy).too_little)
    (tmp_path / "empty").mkdir()
    assert "found none" in str(read(tmp_path / "empty", toy).too_little)


def test_a_file_that_cannot_be_opened_is_said(toy: BaseModel, tmp_path: Path):
    """
    A link that leads in a circle, as one that its owner may not read.
    """
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "a.jsonl")
    text = read(tmp_path, toy)
    assert text.too_little is not None
    assert text.sides is None


def test_other_text_has_another_digest(toy: BaseModel, tmp_path: Path):
    """
    The digest follows what is read: the same lines in another file have the same.
    """
    ten = read(written(tmp_path / "a.jsonl", 10), toy).digest
    assert read(written(tmp_path / "b.jsonl", 10), toy).digest == ten
    assert read(written(tmp_path / "a.jsonl", 11), toy).digest != ten


@pytest.mark.parametrize("change", ["new file", "longer", "touched"])
def test_a_stamp_notices_what_could_be_new_text(tmp_path: Path, change: str):
    """
    A new file, a longer one and a rewritten one give another stamp; looking again does not.
    """
    file = written(tmp_path / "a.jsonl", 3)
    before = files_stamp(tmp_path)
    assert files_stamp(tmp_path) == before
    if change == "new file":
        written(tmp_path / "b.jsonl", 1)
    elif change == "longer":
        written(file, 4)
    else:
        os.utime(file, ns=(1, 1))
    assert files_stamp(tmp_path) not in {before, ""}


def test_nothing_has_the_empty_stamp(tmp_path: Path):
    """
    A folder without files, and no folder at all.
    """
    assert files_stamp(tmp_path) == files_stamp(tmp_path / "absent") == ""
