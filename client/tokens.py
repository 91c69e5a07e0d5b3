"""Turns examples into token ids, with labels only where the loss looks.

What somebody wrote is always encoded as plain text: a ``</s>`` that a user types never becomes
the control token of that name. Only the control tokens that a chat template itself wrote
(``Example.special``) are encoded as such.

Imports neither torch nor transformers: the trainer collates the lists, the tokenizer is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, cast

from fedia3.client.data import Example, Message, Renderer, Span
from fedia3.errors import BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross entropy leaves out
AT_ONCE = 256  # examples in one call of the tokenizer: fast, and a few MB of offsets at most


@dataclass(frozen=True)
class Encoded:
    """One example for a causal language model."""

    input_ids: list[int]
    labels: list[int]  # input_ids where the loss looks, IGNORED elsewhere; not shifted
    truncated: bool = False

    @property
    def n_learned(self) -> int:
        """Tokens the loss looks at; a causal model cannot predict the very first."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class EncodedPair:
    """One example for an encoder and a decoder."""

    source_ids: list[int]
    target_ids: list[int]  # all of them learned; ends with eos where the tokenizer has one
    truncated: bool = False


@dataclass(frozen=True)
class EncodedClass:
    """One labelled text for a classification head."""

    input_ids: list[int]
    label_index: int  # into the labels given
    truncated: bool = False


@dataclass(frozen=True)
class LeftOut:
    """An example that cannot be trained on, and why."""

    line: int  # in its file; 0 = from no file
    reason: str


@dataclass(frozen=True)
class EncodedSet:
    """What can be trained on, in the order given, and what cannot."""

    items: tuple[Encoded, ...]
    left_out: tuple[LeftOut, ...] = ()


class _Token(NamedTuple):
    id: int
    first: int  # characters of the example's text it stands for
    last: int  # one past


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """An example as at most ``max_length`` tokens between bos and eos, where there are such.

    A token is learned where it overlaps what the example learns; eos is where the text's end is.
    Too long plain text loses its end. With a prompt, the prompt loses its beginning first, so
    that as much as possible of the completion stays.

    Raises:
        BadData: within ``max_length`` nothing is left to learn.
    """
    encoded = encode_all([example], tokenizer, max_length)
    if encoded.left_out:
        raise BadData(f"line {example.line}: {encoded.left_out[0].reason}")
    return encoded.items[0]


def encode_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedSet:
    """:func:`encode` for many; what has nothing to learn is listed instead of raised."""
    items: list[Encoded] = []
    left_out: list[LeftOut] = []
    for example, tokens in _tokenize_in_batches(examples, tokenizer):
        encoded = _fit(example, tokens, tokenizer, max_length)
        if encoded.n_learned:
            items.append(encoded)
        else:
            left_out.append(
                LeftOut(
                    example.line,
                    "expected at least one token to learn, got none within "
                    f"max_length={max_length} of {len(tokens)} tokens",
                )
            )
    return EncodedSet(tuple(items), tuple(left_out))


def encode_pair(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedPair:
    """Prompt and completion apart, each at most ``max_length`` tokens, cut on the right.

    Raises:
        BadData: the example is plain text, or its completion has no tokens.
    """
    if not example.prompt_end:
        raise BadData(
            f"line {example.line}: an encoder-decoder model needs a prompt and a completion, "
            "got plain text"
        )
    (tokens,) = _tokenize([example], tokenizer)
    body, rest = _apart(tokens, example.prompt_end)
    last = example.learn[-1][1]
    target = _with_eos([token.id for token in rest if token.first < last], tokenizer)
    if not rest:
        raise BadData(f"line {example.line}: expected a completion, got one without tokens")
    source, source_cut = _with_own_specials([token.id for token in body], tokenizer, max_length)
    return EncodedPair(source, target[:max_length], source_cut or len(target) > max_length)


def encode_classification(
    example: Example, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int
) -> EncodedClass:
    """A labelled text as the tokenizer wants it for classifiers, cut on the right.

    Raises:
        BadData: the example has no label, or one that is not among ``labels``.
    """
    if example.label is None:
        raise BadData(f"line {example.line}: expected a label, got none")
    if example.label not in labels:
        raise BadData(
            f"line {example.line}: expected one of the model's labels {', '.join(labels)}, "
            "got another one"
        )
    (tokens,) = _tokenize([Example.whole(example.item)], tokenizer)
    ids, cut = _with_own_specials([token.id for token in tokens], tokenizer, max_length)
    return EncodedClass(ids, list(labels).index(example.label), cut)


def chat_renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer | None:
    """Writes chats in the tokenizer's own template; None where it has none.

    What is learned is each assistant's turn with the control token that ends it. A template is
    any program: where its parts lie is found by rendering with placeholders for the turns, and
    the parts must put together exactly what it makes of the real turns. White space around a
    turn is left out, as most templates do.
    """
    if not tokenizer.chat_template:
        return None
    control = _control_tokens(tokenizer)

    def render(messages: Sequence[Message]) -> Example:
        turns = [Message(message.role, message.content.strip()) for message in messages]
        masked = [Message(m.role, _placeholder(place)) for place, m in enumerate(turns)]
        example = _assemble(_apply(tokenizer, masked), turns, control)
        if example.text != _apply(tokenizer, turns):
            raise BadData(
                "expected a chat template that keeps the turns' text, got one that changes it "
                "('messages' may hold the template's own marks); use prompt and completion"
            )
        return example

    return render


def _tokenize_in_batches(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Example, list[_Token]]]:
    for first in range(0, len(examples), AT_ONCE):
        batch = examples[first : first + AT_ONCE]
        yield from zip(batch, _tokenize(batch, tokenizer), strict=True)


def _tokenize(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[list[_Token]]:
    """Each example's tokens with their places in its text, no bos or eos added."""
    pieces = [_pieces(example, whole=tokenizer.is_fast) for example in examples]
    plain = [
        (example.text[first:last], first)
        for example, spans in zip(examples, pieces, strict=True)
        for first, last in spans
        if (first, last) not in example.special
    ]
    encoded = iter(_encode_texts(plain, tokenizer))
    found: list[list[_Token]] = []
    for example, spans in zip(examples, pieces, strict=True):
        tokens: list[_Token] = []
        for first, last in spans:
            if (first, last) in example.special:
                control = tokenizer.convert_tokens_to_ids(example.text[first:last])
                tokens.append(_Token(cast(int, control), first, last))
            else:
                tokens += next(encoded)
        found.append(tokens)
    return found


def _pieces(example: Example, whole: bool) -> list[Span]:
    """The text cut at control tokens; unless ``whole``, also where learning starts and ends.

    A tokenizer without offsets cannot say where in a text a token lies, so it is given pieces
    that are learned either whole or not at all.
    """
    spans = example.special if whole else example.special + example.learn
    cuts = {0, len(example.text), *(place for span in spans for place in span)}
    if not whole:
        cuts.add(example.prompt_end)
    return list(pairwise(sorted(cuts)))


def _encode_texts(
    plain: Sequence[tuple[str, int]], tokenizer: PreTrainedTokenizerBase
) -> list[list[_Token]]:
    """Plain texts, each with its place in the example's, as tokens.

    Without offsets every token stands for its whole text.
    """
    if not plain:
        return []
    encoded = tokenizer(
        [text for text, _ in plain],
        add_special_tokens=False,
        split_special_tokens=True,  # "</s>" is four characters when a user writes it
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,  # we cut ourselves; no warning about the model's length
    )
    if not tokenizer.is_fast:
        return [
            [_Token(token, start, start + len(text)) for token in ids]
            for (text, start), ids in zip(plain, encoded["input_ids"], strict=True)
        ]
    offsets = encoded["offset_mapping"]
    return [
        _placed(ids, places, start)
        for (_, start), ids, places in zip(plain, encoded["input_ids"], offsets, strict=True)
    ]


def _placed(ids: Sequence[int], offsets: Sequence[Span], start: int) -> list[_Token]:
    tokens: list[_Token] = []
    end = 0
    for token, (first, last) in zip(ids, offsets, strict=True):
        # Byte-level tokenizers trim white space off offsets: a token of nothing else has none left.
        begin = first if first < last else min(end, first)
        tokens.append(_Token(token, start + begin, start + last))
        end = last
    return tokens


def _fit(
    example: Example, tokens: list[_Token], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    ids = [token.id for token in tokens]
    labels = [token.id if _learned(token, example.learn) else IGNORED for token in tokens]
    if _ends_open(example):
        ids = _with_eos(ids, tokenizer)
        labels += ids[len(labels) :]
    # A chat template writes its own bos, or means to have none.
    bos = [] if example.special else _bos(tokenizer)
    over = max(0, len(bos) + len(ids) - max_length)
    prompt, _ = _apart(tokens, example.prompt_end)
    kept = slice(min(over, len(prompt)), None)
    return Encoded(
        input_ids=(bos + ids[kept])[:max_length],
        labels=([IGNORED] * len(bos) + labels[kept])[:max_length],
        truncated=over > 0,
    )


def _ends_open(example: Example) -> bool:
    """The text's end is learned, and no control token of a chat template marks it already."""
    end = len(example.text)
    return example.learn[-1][1] == end and all(last < end for _, last in example.special)


def _learned(token: _Token, learn: Sequence[Span]) -> bool:
    return any(token.first < last and token.last > first for first, last in learn)


def _apart(tokens: list[_Token], prompt_end: int) -> tuple[list[_Token], list[_Token]]:
    """The prompt's tokens, and those that reach into the completion."""
    n_prompt = sum(token.last <= prompt_end for token in tokens)
    return tokens[:n_prompt], tokens[n_prompt:]


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, int(eos)]


def _with_own_specials(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], bool]:
    """``ids`` between what the tokenizer adds by itself ([CLS], [SEP], </s>), else after bos."""
    before, after = _own_specials(tokenizer)
    room = max(0, max_length - len(before) - len(after))
    return before + ids[:room] + after, len(ids) > room


def _own_specials(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    if full == bare:
        return _bos(tokenizer), []
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    contents = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    contents |= set(tokenizer.all_special_tokens)
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")  # private use characters: no template has them


def _placeholder(place: int) -> str:
    return f"\ue000{place}\ue001"


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    from jinja2 import TemplateError  # noqa: PLC0415  # slow, and only chats need it

    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except TemplateError as error:
        raise BadData(f"expected a chat the model's template takes, got: {error}") from error


def _assemble(template: str, turns: Sequence[Message], control: re.Pattern[str]) -> Example:
    """The template's text with the turns in their places, and what is learned of it."""
    text, special, learn = "", [], []
    speaker: str | None = None
    prompt_end = 0
    for place, part in enumerate(PLACEHOLDER.split(template)):  # text, number, text, number, text
        start = len(text)
        if place % 2:
            speaker = turns[int(part)].role
            text += turns[int(part)].content
            if speaker == "assistant":
                learn.append((start, len(text)))
                prompt_end = start
            continue
        text += part
        controls = [(start + m.start(), start + m.end()) for m in control.finditer(part)]
        special += controls
        if speaker == "assistant" and controls and not text[start : controls[0][0]].strip():
            learn[-1] = (learn[-1][0], controls[0][1])  # where to stop is learned too
    if not learn:
        raise BadData("expected a chat template that shows assistant turns, got one that does not")
    return Example(text, tuple(learn), prompt_end=prompt_end, special=tuple(special))
