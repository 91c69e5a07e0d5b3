"""Reads people's text: JSON lines in the shapes people have, as examples a model can learn from.

Five kinds of row are understood, each row by its own columns, the first that fits:

========================================  ===================================================
columns                                   what the loss looks at
========================================  ===================================================
``messages`` (role, content)              what the assistant says
``prompt``, ``completion``                the completion; both are put together as they are
``instruction``, ``input``?, ``output``   the output, after an empty line
``text``, ``label``                       the label, after an empty line
``text``                                  everything
========================================  ===================================================

Other columns are ignored, and a column holding null is as good as absent.
Error messages name files, lines and columns, never what somebody wrote: they end up in logs.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedia3.errors import BadData

SEPARATOR = "\n\n"  # between an instruction or a labelled text and its answer

BOM = b"\xef\xbb\xbf"  # what some editors put before UTF-8

Span = tuple[int, int]  # characters, first and one past the last


@dataclass(frozen=True)
class Example:
    """One thing somebody wrote, and which part of it the loss looks at.

    A model reads ``text`` up to ``prompt_end`` and answers with the rest; text without a prompt
    has ``prompt_end`` 0.
    """

    text: str
    learn: tuple[Span, ...]  # ascending, not empty, apart from each other
    prompt_end: int = 0  # characters
    label: str | None = None
    special: tuple[Span, ...] = ()  # control tokens a chat template wrote; never the user's text
    line: int = 0  # in its file, from 1; 0 = from no file

    @classmethod
    def whole(cls, text: str) -> "Example":
        """Plain text, all of it learned."""
        return cls(text, learn=((0, len(text)),))

    @classmethod
    def answer(cls, prompt: str, completion: str, label: str | None = None) -> "Example":
        """A prompt that is read and a completion that is learned."""
        text = prompt + completion
        return cls(text, ((len(prompt), len(text)),), prompt_end=len(prompt), label=label)

    @property
    def prompt(self) -> str:
        """What the model is given; empty for plain text."""
        return self.text[: self.prompt_end]

    @property
    def completion(self) -> str:
        """What the model should answer, the last turn of a chat; the whole plain text."""
        return self.text[self.prompt_end : self.learn[-1][1]]

    @property
    def item(self) -> str:
        """What was asked or labelled: two examples of one item must not be split apart."""
        return self.prompt.removesuffix(SEPARATOR) or self.text


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


Renderer = Callable[[Sequence[Message]], Example]
"""Writes a chat, which ends with an assistant's turn, as one text.

Raises BadData, without file and line, for a chat it cannot write.
"""


@dataclass(frozen=True)
class BadLine:
    """A line that was left out, and why."""

    file: Path
    line: int  # from 1
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Dataset:
    """Everybody's examples, and the lines that could not be used."""

    examples: Mapping[str, tuple[Example, ...]]  # by user, oldest first
    skipped: tuple[BadLine, ...] = ()


def plain_chat(messages: Sequence[Message]) -> Example:
    """A chat as ``role: content`` lines, for models without a chat template."""
    text, learn, start = "", [], 0
    for message in messages:
        text += f"{message.role}: "
        start = len(text)
        text += f"{message.content}\n"
        if message.role == "assistant":
            learn.append((start, len(text)))  # with its line end: where to stop is learned too
    # The last line end goes: the end of the text says the same.
    learn[-1] = (start, len(text) - 1)
    return Example(text[:-1], tuple(learn), prompt_end=start)


def read_jsonl(
    path: Path,
    user_field: str = "user",
    *,
    owner: str | None = None,
    order_field: str | None = None,
    skip_bad_lines: bool = False,
    render: Renderer | None = None,
) -> Dataset:
    """Read a ``.jsonl`` file, or all of a folder's in name order.

    Args:
        path: the file or folder, UTF-8.
        user_field: the column that says who wrote a row.
        owner: on somebody's own device: all rows are theirs, and no user column is looked for.
        order_field: the column to order each user's rows by, numbers or text that sorts by time
            (ISO dates of one time zone); without it the files' order counts.
        skip_bad_lines: leave bad lines out and list them, instead of stopping at the first.
        render: writes chats, see ``fedia3.client.tokens.chat_renderer``; ``plain_chat`` if None.

    Raises:
        BadData: a line cannot be used (``file:line: expected …, got …``), or there is no file, or
            no usable line in it.
    """
    found: dict[str, list[tuple[float | str, Example]]] = {}
    skipped: list[BadLine] = []
    for file, number, raw in _lines(Path(path)):
        try:
            row = _row(raw)
            user = _user(row, user_field) if owner is None else owner
            order = 0 if order_field is None else _order(row, order_field)
            example = replace(_example(row, render or plain_chat), line=number)
        except BadData as error:
            skipped.append(BadLine(file, number, str(error)))
            if not skip_bad_lines:
                raise BadData(str(skipped[0])) from error
        else:
            found.setdefault(user, []).append((order, example))
    if not found:
        first = f"; the first bad line is {skipped[0]}" if skipped else ""
        raise BadData(f"{path}: expected at least one usable line, found none{first}")
    examples = {user: _in_order(rows, order_field) for user, rows in found.items()}
    return Dataset(examples, tuple(skipped))


def files_stamp(path: Path) -> str:
    """Names, sizes and times of the files that :func:`read_jsonl` would read, as one sha256.

    Another stamp means: look again. Empty where there is nothing to read.
    """
    try:
        facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in _files(Path(path))]
    except (BadData, OSError):  # gone, or going
        return ""
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _lines(path: Path) -> Iterator[tuple[Path, int, bytes]]:
    """Lines that are not blank, one at a time: a file may be larger than memory."""
    for file in _files(path):
        with file.open("rb") as stream:  # bytes: one line that is not UTF-8 spoils no other
            for number, raw in enumerate(stream, start=1):
                line = raw.removeprefix(BOM).strip()  # any line's: files get concatenated
                if line:
                    yield file, number, line


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.glob("*.jsonl") if file.is_file())
        if not files:
            raise BadData(f"{path}: expected *.jsonl files in this folder, found none")
        return files
    if not path.is_file():
        raise BadData(f"{path}: expected a .jsonl file or a folder of them, found nothing")
    if path.suffix == ".gz":
        raise BadData(f"{path}: expected plain JSON lines, got a .gz file; unpack it first")
    return [path]


def _row(raw: bytes) -> dict[str, object]:
    """One line's columns, without those that hold null."""
    try:
        row = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise BadData(f"expected UTF-8, got another byte at {error.start}") from error
    except json.JSONDecodeError as error:
        raise BadData(f"expected one JSON object, got {error.msg} at {error.colno}") from error
    except (ValueError, RecursionError) as error:  # NaN, numbers of 5000 digits, deep nesting
        raise BadData("expected plain JSON, got a number or a nesting beyond it") from error
    if not isinstance(row, dict):
        raise BadData(f"expected one JSON object a line, got {_kind(row)}")
    return {column: value for column, value in row.items() if value is not None}


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _user(row: Mapping[str, object], field: str) -> str:
    if field not in row:
        raise BadData(
            f"expected a column {field!r} that says who wrote this, got {_columns(row)}; "
            "name yours with --user-field"
        )
    user = row[field]
    if isinstance(user, int | float) and not isinstance(user, bool):
        return str(user)
    return _text(row, field)


def _order(row: Mapping[str, object], field: str) -> float | str:
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadData(f"expected a number or a text in {field!r} to order by, got {_kind(value)}")
    return value


def _in_order(rows: list[tuple[float | str, Example]], field: str | None) -> tuple[Example, ...]:
    kinds = {isinstance(order, str) for order, _ in rows}
    if len(kinds) > 1:
        lines = [next(e.line for o, e in rows if isinstance(o, str) is kind) for kind in kinds]
        raise BadData(
            f"expected numbers or texts in {field!r} to order by, got both for one user, "
            f"in lines {min(lines)} and {max(lines)}"
        )
    # Python sorts stably: rows of one time stay as the file has them.
    return tuple(example for _, example in sorted(rows, key=lambda row: row[0]))


def _example(row: Mapping[str, object], render: Renderer) -> Example:
    """A row as an example, by the columns it has."""
    if "messages" in row:
        return render(_messages(row["messages"]))
    if {"prompt", "completion"} <= row.keys():
        return Example.answer(_text(row, "prompt", blank=True), _text(row, "completion"))
    if {"instruction", "output"} <= row.keys():
        asked = _text(row, "instruction", blank=True)
        given = _text(row, "input", blank=True) if "input" in row else ""
        prompt = f"{asked}\n{given}" if given else asked
        return Example.answer(prompt + SEPARATOR, _text(row, "output"))
    if {"text", "label"} <= row.keys():
        label = _label(row)
        return Example.answer(_text(row, "text") + SEPARATOR, label, label=label)
    if "text" in row:
        return Example.whole(_text(row, "text"))
    raise BadData(
        "expected columns text, or text and label, or prompt and completion, or instruction and "
        f"output, or messages, got {_columns(row)}"
    )


def _messages(value: object) -> list[Message]:
    """A chat's turns up to the assistant's last: what follows it teaches nothing."""
    if not isinstance(value, list):
        raise BadData(f"expected a list in 'messages', got {_kind(value)}")
    messages = [_message(turn) for turn in value]
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if not messages:
        raise BadData("expected an assistant's turn in 'messages' to learn from, got none")
    return messages


def _message(turn: object) -> Message:
    if not isinstance(turn, dict):
        raise BadData(f"expected objects in 'messages', got {_kind(turn)}")
    role = _text(turn, "role")
    return Message(role, _text(turn, "content", blank=role != "assistant"))


def _label(row: Mapping[str, object]) -> str:
    label = row["label"]
    if isinstance(label, bool):
        return "true" if label else "false"
    return str(label) if isinstance(label, int) else _text(row, "label")


def _text(row: Mapping[str, object], column: str, *, blank: bool = False) -> str:
    """A column's text that every later step can hold: tokenizer, database, message."""
    value = row.get(column)
    if not isinstance(value, str):
        raise BadData(f"expected text in {column!r}, got {_kind(value)}")
    if not blank and not value.strip():
        raise BadData(f"expected text in {column!r}, got an empty one")
    if "\x00" in value:
        raise BadData(f"expected text in {column!r}, got a NUL character in it")
    if not _encodable(value):
        raise BadData(f"expected text in {column!r}, got half a character (a lone surrogate)")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _columns(row: Mapping[str, object]) -> str:
    return "columns " + ", ".join(sorted(row)) if row else "no columns"


def _kind(value: object) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None:
        return "nothing"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")
