"""Which tokens a model reads and which it learns.

The tokenizer has one token a byte, and "th" and "the" besides, so ids can be read back and
counted by eye.
"""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer

from fedia3.client.data import Example, Message, plain_chat
from fedia3.client.tokens import (
    AT_ONCE,
    IGNORED,
    Encoded,
    chat_renderer,
    encode,
    encode_all,
    encode_classification,
    encode_pair,
)
from fedia3.errors import BadData

BOS, EOS, PAD, START, END = 0, 1, 2, 3, 4
SPECIAL = ["<s>", "</s>", "<pad>", "<|start|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}"
    "{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content | trim }}<|end|>\n"
    "{% endfor %}"
)


def byte_tokenizer(**settings: object) -> PreTrainedTokenizerFast:
    """One token a byte, "th" and "the" besides; trims offsets as GPT-2's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *alphabet, "th", "the"]
    bpe = Tokenizer(
        models.BPE(
            vocab={piece: place for place, piece in enumerate(pieces)},
            merges=[("t", "h"), ("th", "e")],
        )
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    bpe.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | settings
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers' own gap
        tokenizer_object=bpe, additional_special_tokens=SPECIAL[3:], **special
    )


TOKENIZER = byte_tokenizer()
BARE = byte_tokenizer(bos_token=None, eos_token=None)


def read(encoded: Encoded, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> str:
    """What the model reads."""
    return str(tokenizer.decode(encoded.input_ids))


def learned(encoded: Encoded, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> str:
    """What the loss looks at; labels are the ids themselves or ignored."""
    assert all(
        label in (IGNORED, token)
        for token, label in zip(encoded.input_ids, encoded.labels, strict=True)
    )
    return str(tokenizer.decode([label for label in encoded.labels if label != IGNORED]))


def test_plain_text_is_learned_with_its_end() -> None:
    """
    Everything but bos is learned, eos included.
    """
    encoded = encode(Example.whole("the cat"), TOKENIZER, 100)
    assert read(encoded) == "<s>the cat</s>"
    assert learned(encoded) == "the cat</s>"
    assert encoded.n_learned == 6  # the, space, c, a, t, eos
    assert not encoded.truncated


def test_a_prompt_is_read_and_not_learned() -> None:
    """
    The loss looks at the completion and the end.
    """
    encoded = encode(Example.answer("2 + 2 =", " 4"), TOKENIZER, 100)
    assert read(encoded) == "<s>2 + 2 = 4</s>"
    assert learned(encoded) == " 4</s>"


def test_a_token_that_reaches_into_the_completion_is_learned() -> None:
    """
    Prompt "t" and completion "he" are one token of the whole text, as a model will meet it.
    """
    encoded = encode(Example.answer("t", "he"), TOKENIZER, 100)
    assert learned(encoded) == "the</s>"


def test_white_space_is_learned_where_the_tokenizer_trims_its_offsets() -> None:
    """
    A byte-level tokenizer gives tokens of white space no width; they are learned all the same.
    """
    encoded = encode(Example.whole("a  b\n"), TOKENIZER, 100)
    assert learned(encoded) == "a  b\n</s>"


def test_every_byte_of_a_long_character_is_learned() -> None:
    """
    "é" is two byte tokens in the place of one character.
    """
    encoded = encode(Example.answer("a", "é"), TOKENIZER, 100)
    assert learned(encoded) == "é</s>"
    assert encoded.n_learned == 3


def test_only_the_assistants_turns_of_a_chat_are_learned() -> None:
    """
    The end of a line ends a turn, the end of the text the last.
    """
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    encoded = encode(plain_chat([Message(*turn) for turn in turns]), TOKENIZER, 100)
    assert learned(encoded) == "b\nd</s>"


def test_control_tokens_a_user_writes_are_plain_text() -> None:
    """
    "</s>" in a message is four characters; only the end that we add is the control token.
    """
    encoded = encode(Example.whole("a</s>b"), TOKENIZER, 100)
    assert encoded.input_ids.count(EOS) == 1
    assert encoded.input_ids[-1] == EOS
    assert read(encoded) == "<s>a</s>b</s>"


def test_a_tokenizer_without_bos_and_eos_adds_none() -> None:
    """
    Three characters are three tokens; the first can never be predicted.
    """
    encoded = encode(Example.whole("cat"), BARE, 100)
    assert len(encoded.input_ids) == 3
    assert encoded.n_learned == 2


def test_long_plain_text_loses_its_end() -> None:
    """
    Four tokens keep bos and three characters.
    """
    encoded = encode(Example.whole("cats"), TOKENIZER, 4)
    assert (read(encoded), learned(encoded), encoded.truncated) == ("<s>cat", "cat", True)


@pytest.mark.parametrize(
    ("max_length", "kept"),
    [(9, "<s>12345ab</s>"), (6, "<s>45ab</s>"), (4, "<s>ab</s>"), (3, "<s>ab"), (2, "<s>a")],
)
def test_a_long_prompt_loses_its_beginning_before_the_completion_loses_its_end(
    max_length: int, kept: str
) -> None:
    """
    Prompt "12345", completion "ab": bos always stays, and the completion as long as it can.
    """
    encoded = encode(Example.answer("12345", "ab"), TOKENIZER, max_length)
    assert read(encoded) == kept
    assert learned(encoded) == kept.removeprefix("<s>").lstrip("12345")
    assert encoded.truncated == (max_length < 9)


def test_an_example_with_nothing_left_to_learn_is_an_error() -> None:
    """
    Within one token only bos fits.
    """
    with pytest.raises(BadData, match=r"line 0: .* at least one token to learn.*max_length=1"):
        encode(Example.whole("cat"), TOKENIZER, 1)


def test_examples_with_nothing_to_learn_are_listed_apart() -> None:
    """
    A single token with nothing before it cannot be predicted; the others are trained.
    """
    lone = Example("a", ((0, 1),), line=7)
    found = encode_all([Example.whole("ab"), lone, Example.whole("cd")], BARE, 100)
    assert [read(item, BARE) for item in found.items] == ["ab", "cd"]
    assert [left.line for left in found.left_out] == [7]


def test_many_examples_are_encoded_as_each_alone() -> None:
    """
    Encoding together is only faster, for more than one call of the tokenizer too.
    """
    examples = [Example.answer("q" * place, "a") for place in range(AT_ONCE + 1)]
    together = encode_all(examples, TOKENIZER, 100).items
    assert together == tuple(encode(example, TOKENIZER, 100) for example in examples)


def test_no_examples_are_no_items() -> None:
    """
    An empty side of a split is not an error here.
    """
    assert encode_all([], TOKENIZER, 100).items == ()


def test_a_tokenizer_without_offsets_learns_the_same_part() -> None:
    """
    ByT5's tokenizer cannot say where tokens lie, so prompt and completion are encoded apart.
    """
    slow = ByT5Tokenizer()
    encoded = encode(Example.answer("ab", "cd"), slow, 100)
    assert slow.decode(encoded.input_ids) == "abcd</s>"
    assert encoded.labels[:2] == [IGNORED, IGNORED]
    assert encoded.labels[2:] == encoded.input_ids[2:]


def test_a_tokenizer_without_offsets_keeps_control_tokens_plain() -> None:
    """
    A typed "</s>" does not end a text there either.
    """
    slow = ByT5Tokenizer()
    encoded = encode(Example.whole("</s>"), slow, 100)
    assert encoded.input_ids.count(slow.eos_token_id) == 1


def test_an_encoder_decoder_reads_the_prompt_and_answers_to_its_end() -> None:
    """
    Source and target are encoded apart; the tokenizer adds what its models expect of a source.
    """
    slow = ByT5Tokenizer()  # T5: no bos, eos after the source too
    pair = encode_pair(Example.answer("ab", "cd"), slow, 100)
    assert slow.decode(pair.source_ids) == "ab</s>"
    assert slow.decode(pair.target_ids) == "cd</s>"
    assert not pair.truncated


def test_a_long_pair_is_cut_on_the_right() -> None:
    """
    Three tokens keep bos and two characters of the source, three of the target.
    """
    pair = encode_pair(Example.answer("12345", "abcd"), TOKENIZER, 3)
    assert TOKENIZER.decode(pair.source_ids) == "<s>12"
    assert TOKENIZER.decode(pair.target_ids) == "abc"
    assert pair.truncated


def test_plain_text_is_no_pair() -> None:
    """
    An encoder-decoder model has nothing to read before plain text.
    """
    with pytest.raises(BadData, match="needs a prompt and a completion"):
        encode_pair(Example.whole("cat"), TOKENIZER, 100)


def test_a_classifier_reads_the_text_without_its_label() -> None:
    """
    "no" is the second of the labels, and is not in the ids.
    """
    encoded = encode_classification(
        Example.answer("cat\n\n", "no", label="no"), TOKENIZER, ["yes", "no"], 100
    )
    assert TOKENIZER.decode(encoded.input_ids) == "<s>cat"
    assert encoded.label_index == 1


def test_a_classifier_keeps_the_tokenizers_own_frame_when_it_cuts() -> None:
    """
    A tokenizer that writes <s> … </s> around a text does so around what is left of it.
    """
    framed = byte_tokenizer()
    framed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    example = Example.answer("cats\n\n", "yes", label="yes")
    encoded = encode_classification(example, framed, ["yes"], 5)
    assert framed.decode(encoded.input_ids) == "<s>cat</s>"
    assert encoded.truncated


@pytest.mark.parametrize("label", [None, "maybe"])
def test_a_label_nobody_announced_is_an_error(label: str | None) -> None:
    """
    The message lists the labels that are known.
    """
    example = Example.answer("cat\n\n", "maybe", label=label)
    with pytest.raises(BadData, match=r"a label, got none|yes, no, got another"):
        encode_classification(example, TOKENIZER, ["yes", "no"], 100)


def chat(*turns: tuple[str, str], template: str = CHAT_TEMPLATE) -> Example:
    """These turns as a tokenizer with this template writes them."""
    tokenizer = byte_tokenizer(chat_template=template)
    render = chat_renderer(tokenizer)
    assert render is not None
    return render([Message(*turn) for turn in turns])


def test_a_chat_template_is_followed_to_the_letter() -> None:
    """
    The text is what the tokenizer itself makes of the chat, and so are the ids.
    """
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the cat"}]
    example = chat(("user", "hi"), ("assistant", "the cat"))
    assert example.text == tokenizer.apply_chat_template(messages, tokenize=False)
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    assert encode(example, tokenizer, 100).input_ids == expected


def test_a_templated_chat_teaches_the_turns_and_where_they_stop() -> None:
    """
    The control token after an assistant's turn is learned, the user's turns are not.
    """
    example = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert learned(encode(example, TOKENIZER, 100)) == "b<|end|>d<|end|>"
    assert example.completion == "d<|end|>"


def test_control_tokens_in_a_turn_are_plain_text_while_the_templates_own_are_not() -> None:
    """
    A user who types "<|end|>" does not end their turn.
    """
    example = chat(("user", "<|end|>"), ("assistant", "ok"))
    ids = encode(example, TOKENIZER, 100).input_ids
    assert (ids.count(START), ids.count(END)) == (2, 2)
    assert TOKENIZER.decode(ids).count("<|end|>") == 3


def test_a_turn_that_reads_like_the_template_is_found_in_its_place() -> None:
    """
    The assistant says "user", which the template says too.
    """
    example = chat(("user", "user"), ("assistant", "user"))
    assert example.prompt.endswith("assistant\n")
    assert learned(encode(example, TOKENIZER, 100)) == "user<|end|>"


def test_a_template_may_write_a_turn_differently_in_its_last_place() -> None:
    """
    Some models get an empty thought before the last answer only; it is read, not learned.
    """
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n"
        "{% if loop.last %}(thought){% endif %}{{ m.content }}<|end|>{% endfor %}"
    )
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    example = chat(*turns, template=template)
    assert "(thought)d" in example.text
    assert learned(encode(example, TOKENIZER, 100)) == "b<|end|>d<|end|>"


def test_a_template_that_rewrites_turns_is_refused() -> None:
    """
    What is learned would not be where we think it is.
    """
    template = "{% for m in messages %}{{ m.content | replace('cat', 'dog') }}{% endfor %}"
    with pytest.raises(BadData, match="keeps the turns' text"):
        chat(("user", "cat"), ("assistant", "ok"), template=template)


def test_a_chat_the_template_refuses_is_bad_data() -> None:
    """
    The template's own words say why.
    """
    with pytest.raises(BadData, match="no such role"):
        chat(("tool", "42"), ("assistant", "ok"))


def test_a_tokenizer_without_a_template_renders_no_chat() -> None:
    """
    The reader then writes plain lines.
    """
    assert chat_renderer(TOKENIZER) is None
