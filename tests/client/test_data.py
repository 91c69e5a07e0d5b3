"""What a row of people's data becomes, and what a bad one says."""

import json
import os
from pathlib import Path

import pytest

from fedia3.client.data import Dataset, Example, Message, plain_chat, read_jsonl
from fedia3.errors import BadData

REAL_DATA = Path(
    os.environ.get("FEDIA3_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")
)


def written(folder: Path, *rows: object, name: str = "data.jsonl") -> Path:
    """A file with one line a row; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file = folder / name
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def read_one(folder: Path, **row: object) -> Example:
    """The example of a single row of ann's."""
    dataset = read_jsonl(written(folder, {"user": "ann", **row}))
    return dataset.examples["ann"][0]


def learned(example: Example) -> list[str]:
    """The parts of the text the loss looks at."""
    return [example.text[first:last] for first, last in example.learn]


def texts(dataset: Dataset) -> dict[str, list[str]]:
    """What each user wrote, in order."""
    return {user: [example.text for example in found] for user, found in dataset.examples.items()}


def test_rows_are_gathered_by_user_in_file_order(tmp_path: Path) -> None:
    """
    Each user has their own rows, oldest first, and every row knows its line.
    """
    rows = [("ann", "one"), ("bob", "two"), ("ann", "three")]
    file = written(tmp_path, *[{"user": user, "text": text} for user, text in rows])
    dataset = read_jsonl(file)
    assert texts(dataset) == {"ann": ["one", "three"], "bob": ["two"]}
    assert [example.line for example in dataset.examples["ann"]] == [1, 3]


def test_plain_text_is_learned_whole(tmp_path: Path) -> None:
    """
    A text row has no prompt, and other columns do not matter.
    """
    example = read_one(tmp_path, text="good morning", day="2004-11-15", likes=3)
    assert (example.prompt, learned(example)) == ("", ["good morning"])


def test_prompt_and_completion_are_put_together_as_they_are(tmp_path: Path) -> None:
    """
    Only the completion is learned, and nothing is put between the two.
    """
    example = read_one(tmp_path, prompt="2 + 2 =", completion=" 4")
    assert example.text == "2 + 2 = 4"
    assert learned(example) == [" 4"] == [example.completion]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Add."}, "Add.\n\n"),
        ({"instruction": "Add.", "input": ""}, "Add.\n\n"),
        ({"instruction": "Add.", "input": None}, "Add.\n\n"),
        ({"instruction": "Add.", "input": "2, 2"}, "Add.\n2, 2\n\n"),
    ],
)
def test_an_instruction_is_followed_by_its_output(
    tmp_path: Path, row: dict[str, object], prompt: str
) -> None:
    """
    The output comes after an empty line; the input, where there is one, on a line of its own.
    """
    example = read_one(tmp_path, **row, output="4")
    assert (example.prompt, example.completion) == (prompt, "4")


@pytest.mark.parametrize(("label", "text"), [("funny", "funny"), (1, "1"), (True, "true")])
def test_a_label_is_answered_and_kept(tmp_path: Path, label: object, text: str) -> None:
    """
    A labelled text asks for its label, whatever JSON type the label has.
    """
    example = read_one(tmp_path, text="ha ha", label=label)
    assert (example.label, example.completion) == (text, text)
    assert example.item == "ha ha"


def test_a_null_column_is_as_good_as_absent(tmp_path: Path) -> None:
    """
    Exports of mixed data carry every column in every row.
    """
    example = read_one(tmp_path, text="hello", label=None, messages=None, prompt=None)
    assert example == Example("hello", ((0, 5),), line=1)


def test_a_chat_without_a_template_teaches_what_the_assistant_says() -> None:
    """
    Turns become lines; the learned spans are the assistant's words and the ends of their lines.
    """
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "so long")]
    example = plain_chat([Message(*turn) for turn in turns])
    assert example.text == "user: hi\nassistant: hello\nuser: bye\nassistant: so long"
    assert learned(example) == ["hello\n", "so long"]
    assert example.completion == "so long"


def test_turns_after_the_assistants_last_are_left_out(tmp_path: Path) -> None:
    """
    A closing question teaches nothing: nobody answered it.
    """
    roles = ["user", "assistant", "user"]
    example = read_one(tmp_path, messages=[{"role": role, "content": "x"} for role in roles])
    assert example.text == "user: x\nassistant: x"


def test_a_renderer_writes_the_chats(tmp_path: Path) -> None:
    """
    A model with a chat template brings its own way to write a chat down.
    """
    file = written(
        tmp_path, {"user": "ann", "messages": [{"role": "assistant", "content": "hello"}]}
    )
    dataset = read_jsonl(file, render=lambda turns: Example.whole(f"<{turns[0].content}>"))
    assert texts(dataset) == {"ann": ["<hello>"]}


def test_the_user_column_has_any_name_and_may_be_a_number(tmp_path: Path) -> None:
    """
    Whoever has numbered their users need not rename anything.
    """
    file = written(tmp_path, {"author_id": 7, "text": "hello"})
    assert texts(read_jsonl(file, user_field="author_id")) == {"7": ["hello"]}


def test_on_ones_own_device_no_user_column_is_needed(tmp_path: Path) -> None:
    """
    Every row belongs to the owner.
    """
    file = written(tmp_path, {"text": "one"}, {"text": "two", "user": "who"})
    assert texts(read_jsonl(file, owner="ann")) == {"ann": ["one", "two"]}


def test_a_missing_user_column_is_named_with_the_way_out(tmp_path: Path) -> None:
    """
    The message lists the columns there are and the option to set.
    """
    file = written(tmp_path, {"author": "ann", "text": "hello"})
    with pytest.raises(BadData, match=r"data.jsonl:1: .*'user'.*author, text.*--user-field"):
        read_jsonl(file)


def test_rows_are_ordered_by_a_column(tmp_path: Path) -> None:
    """
    Time orders them, and rows of one time stay as the file has them.
    """
    rows = [("b", 2), ("a", 1), ("c", 2)]
    file = written(tmp_path, *[{"user": "ann", "text": text, "at": at} for text, at in rows])
    assert texts(read_jsonl(file, order_field="at")) == {"ann": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"at": "2004"}, "got both for one user, in lines 1 and 2"),
        ({}, ":2: expected a number or a text in 'at' to order by, got nothing"),
    ],
)
def test_rows_that_cannot_be_ordered_are_named(
    tmp_path: Path, second: dict[str, object], message: str
) -> None:
    """
    Numbers and texts have no order between them; a row without the column has none at all.
    """
    row = {"user": "ann", "text": "hello"}
    with pytest.raises(BadData, match=message):
        read_jsonl(written(tmp_path, row | {"at": 1}, row | second), order_field="at")


def test_byte_order_marks_line_ends_and_blank_lines_do_not_matter(tmp_path: Path) -> None:
    """
    Files from other systems read alike, and lines are counted as an editor counts them.
    """
    row = b'{"user": "ann", "text": "hello"}'
    dataset = read_jsonl(written(tmp_path, b"\xef\xbb\xbf" + row + b"\r", b"", b"  \r", row))
    assert [example.line for example in dataset.examples["ann"]] == [1, 4]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    """
    JSON allows U+2028 in a text; only the line feed ends a row.
    """
    line = '{"user": "ann", "text": "one\u2028two"}'.encode()
    assert texts(read_jsonl(written(tmp_path, line))) == {"ann": ["one\u2028two"]}


def test_a_folder_is_read_file_by_file_in_name_order(tmp_path: Path) -> None:
    """
    What does not end in .jsonl is left alone.
    """
    for name, text in [("2.jsonl", "later"), ("1.jsonl", "sooner"), ("notes.txt", "never")]:
        written(tmp_path, {"user": "ann", "text": text}, name=name)
    assert texts(read_jsonl(tmp_path)) == {"ann": ["sooner", "later"]}


BAD_LINES = [
    (b'{"user": "ann"', "one JSON object"),
    (b'["ann", "hello"]', "got a list"),
    (b'"hello"', "got text"),
    (b"\xff\xfe", "UTF-8, got another byte at 0"),
    (b'{"user": "ann", "text": NaN}', "plain JSON"),
    (b"[" * 100_000, "plain JSON"),
    (b'{"user": "ann", "text": 1' + b"0" * 5000 + b"}", "plain JSON"),
    ({}, "got no columns"),
    ({"user": ["ann"], "text": "hello"}, "text in 'user', got a list"),
    ({"user": " ", "text": "hello"}, "text in 'user', got an empty one"),
    ({"user": "ann"}, "columns text, or .*got columns user"),
    ({"user": "ann", "prompt": "why?"}, "got columns prompt, user"),
    ({"user": "ann", "text": " \n"}, "text in 'text', got an empty one"),
    ({"user": "ann", "text": 5}, "text in 'text', got a number"),
    ({"user": "ann", "text": "a\x00b"}, "NUL"),
    ({"user": "ann", "text": "\ud800"}, "lone surrogate"),
    ({"user": "ann", "text": "hello", "label": 0.5}, "text in 'label', got a number"),
    ({"user": "ann", "prompt": "why?", "completion": ""}, "text in 'completion', got an empty"),
    ({"user": "ann", "messages": "hello"}, "a list in 'messages', got text"),
    ({"user": "ann", "messages": ["hello"]}, "objects in 'messages', got text"),
    ({"user": "ann", "messages": [{"content": "hi"}]}, "text in 'role', got nothing"),
    ({"user": "ann", "messages": [{"role": "user", "content": "hi"}]}, "assistant's turn"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES)
def test_the_first_bad_line_stops_the_reading(tmp_path: Path, bad: object, reason: str) -> None:
    """
    The error says which line of which file, what was expected and what was there.
    """
    file = written(tmp_path, {"user": "ann", "text": "hello"}, bad)
    with pytest.raises(BadData, match=rf"data.jsonl:2: expected .*{reason}"):
        read_jsonl(file)


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES)
def test_bad_lines_can_be_skipped_and_are_listed(tmp_path: Path, bad: object, reason: str) -> None:
    """
    The good lines around a bad one are kept, and the bad one is accounted for.
    """
    good = {"user": "ann", "text": "hello"}
    dataset = read_jsonl(written(tmp_path, good, bad, good), skip_bad_lines=True)
    assert texts(dataset) == {"ann": ["hello", "hello"]}
    assert [line.line for line in dataset.skipped] == [2]


def test_errors_do_not_repeat_what_somebody_wrote(tmp_path: Path) -> None:
    """
    Messages end up in logs and bug reports; people's words stay on their device.
    """
    file = written(tmp_path, b'{"user": "ann", "text": "my secret"', {"text": "my secret"})
    dataset = read_jsonl(
        written(tmp_path, file.read_bytes().strip(), {"user": "bob", "text": "hi"}),
        skip_bad_lines=True,
    )
    assert len(dataset.skipped) == 2
    assert not any("secret" in str(line) for line in dataset.skipped)


def test_nothing_usable_is_an_error_even_when_bad_lines_are_skipped(tmp_path: Path) -> None:
    """
    A wrong file is not an empty population.
    """
    file = written(tmp_path, {"user": "ann", "body": "hello"})
    with pytest.raises(BadData, match=r"none; the first bad line is .*data.jsonl:1: expected col"):
        read_jsonl(file, skip_bad_lines=True)


def test_a_path_without_data_is_named(tmp_path: Path) -> None:
    """
    No file, an empty folder and a packed file each say what was expected.
    """
    with pytest.raises(BadData, match="found nothing"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(BadData, match=r"\*.jsonl files in this folder, found none"):
        read_jsonl(tmp_path)
    with pytest.raises(BadData, match="unpack it first"):
        read_jsonl(written(tmp_path, b"", name="data.jsonl.gz"))


@pytest.mark.parametrize(
    ("file", "n_users"),
    [
        ("irc_authors/messages.jsonl", 114),
        ("nlu_eval_home/instruct.jsonl", 18),
        ("nlu_eval_home/utterances.jsonl", 18),
        ("shakespeare/speeches.jsonl", 1300),
    ],
)
def test_real_data_reads_without_a_bad_line(file: str, n_users: int) -> None:
    """
    The data sets that our figures come from are read whole.
    """
    if not (REAL_DATA / file).exists():
        pytest.skip(f"{file} is not under {REAL_DATA}; set FEDIA3_TEST_DATA")
    dataset = read_jsonl(REAL_DATA / file)
    assert (len(dataset.examples), dataset.skipped) == (n_users, ())
