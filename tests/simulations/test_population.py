"""Whose text a run trains on, split and encoded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedia3.adapters.base_model import BaseModel
from fedia3.client.data import Dataset, Example
from fedia3.client.examples import digest_of
from fedia3.client.splits import SplitPlan
from fedia3.client.tokens import EncodedClass, EncodedPair
from fedia3.errors import BadData, BadInput
from fedia3.simulations.population import prepare, read_people
from fedia3.simulations.settings import Settings
from fedia3.testing import tiny_base

TEN = Settings(split=SplitPlan(min_examples=10))


def texts(count: int) -> tuple[Example, ...]:
    """hi 0, hi 1 …"""
    return tuple(Example.whole(f"hi {n}") for n in range(count))


def test_ten_texts_are_seven_one_and_two(toy: BaseModel):
    """
    A tenth decides, a fifth judges, the oldest seven train; each text is bos, its bytes and eos.
    """
    people = prepare(Dataset({"ann": texts(10), "bob": texts(10)}), TEN, 0, toy)
    ann = people.clients["ann"]
    assert (len(ann.train), len(ann.validation), len(ann.test)) == (7, 1, 2)
    assert len(ann.test[0].input_ids) == 1 + len("hi 8") + 1
    assert people.too_small == {}


def test_who_has_too_little_is_counted_and_left_out(toy: BaseModel):
    """
    eve's three texts are fewer than ten.
    """
    dataset = Dataset({"ann": texts(10), "eve": texts(3), "bob": texts(10)})
    people = prepare(dataset, TEN, 0, toy)
    assert (list(people.clients), people.too_small) == (["ann", "bob"], {"eve": 3})


def test_who_has_nothing_left_to_learn_is_too_small(toy: BaseModel):
    """
    A text cut to one token has nothing that could be predicted.
    """
    short = replace(TEN, training=replace(TEN.training, max_length=1))
    dataset = Dataset({"ann": texts(10), "bob": texts(10)})
    with pytest.raises(BadData, match="at least 2 users with enough text, got 0"):
        prepare(dataset, short, 0, toy)


def test_one_user_is_no_population(toy: BaseModel):
    """
    The control is another user's adapter, and there is none.
    """
    with pytest.raises(BadData, match="at least 2 users with enough text, got 1"):
        prepare(Dataset({"ann": texts(10), "eve": texts(3)}), TEN, 0, toy)


def test_nobody_with_enough_text_is_an_error(toy: BaseModel):
    """
    The message says how much was expected and how much the largest user has.
    """
    with pytest.raises(BadData, match=r"at least 10 examples.* has 3"):
        prepare(Dataset({"ann": texts(2), "eve": texts(3)}), TEN, 0, toy)


def test_text_by_lot_differs_between_seeds(toy: BaseModel):
    """
    Another seed holds out other texts, the same one the same.
    """
    by_lot = replace(TEN, split=SplitPlan(by="seed", min_examples=10))
    dataset = Dataset({"ann": texts(40), "bob": texts(40)})
    first, again, other = (
        [item.input_ids for item in prepare(dataset, by_lot, seed, toy).clients["ann"].test]
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_plain_text_has_no_labels(toy: BaseModel):
    """
    Neither exact completions nor a majority label mean anything.
    """
    people = prepare(Dataset({"ann": texts(10), "bob": texts(10)}), TEN, 0, toy)
    assert not people.labelled
    assert people.majority == {"ann": None, "bob": None}


def test_the_majority_label_is_scored_on_the_test_split(toy: BaseModel):
    """
    ann trained on yes; of her two test labels one is yes.
    """
    labels = ["yes"] * 8 + ["yes", "no"]
    rows = tuple(Example.answer(f"{n}\n\n", label, label) for n, label in enumerate(labels))
    people = prepare(Dataset({"ann": rows, "bob": rows}), TEN, 0, toy)
    assert people.labelled
    assert people.majority == {"ann": 0.5, "bob": 0.5}


def test_the_digest_is_of_who_wrote_what_in_which_order():
    """
    The same text twice is the same; another order, writer or learned part is not.
    """
    first, second = texts(2)
    data = Dataset({"ann": (first, second)})
    others = [
        Dataset({"ann": (second, first)}),
        Dataset({"bob": (first, second)}),
        Dataset({"ann": (first, replace(second, learn=((0, 1),)))}),
    ]
    assert digest_of(data) == digest_of(Dataset({"ann": tuple(texts(2))}))
    assert digest_of(data) not in {digest_of(other) for other in others}


def test_where_a_line_stood_does_not_matter():
    """
    A blank line more in the file is the same text.
    """
    (text,) = texts(1)
    assert digest_of(Dataset({"a": (text,)})) == digest_of(Dataset({"a": (replace(text, line=9),)}))


def test_without_data_there_are_demo_users(toy: BaseModel):
    """
    As many users with as many texts as asked for.
    """
    people = read_people(Settings(demo_users=3, demo_texts=20), toy)
    assert [len(theirs) for theirs in people.examples.values()] == [20, 20, 20]


def test_a_name_that_no_registry_keeps_is_refused_before_training(toy: BaseModel, tmp_path: Path):
    """
    A line end in a name, or 129 characters, is noticed while reading.
    """
    for number, name in enumerate(("an\nn", "a" * 129)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps({"user": name, "text": "hi"}))
        with pytest.raises(BadInput, match="a user's name"):
            read_people(Settings(data=str(path)), toy)


def test_classification_rows_for_a_classifier_are_its_labels(tmp_path: Path):
    """
    A BERT with two labels gets the text and the label's number.
    """
    base = tiny_base(tmp_path / "bert", "bert", id2label={0: "no", 1: "yes"})
    rows = tuple(Example.answer(f"{n}\n\n", "yes", "yes") for n in range(10))
    people = prepare(Dataset({"ann": rows, "bob": rows}), TEN, 0, base)
    item = people.clients["ann"].test[0]
    assert isinstance(item, EncodedClass)
    assert item.label_index == 1


def test_a_label_the_classifier_does_not_have_is_named(tmp_path: Path):
    """
    The message lists those it has.
    """
    base = tiny_base(tmp_path / "bert", "bert", id2label={0: "no", 1: "yes"})
    rows = tuple(Example.answer(f"{n}\n\n", "maybe", "maybe") for n in range(10))
    with pytest.raises(BadData, match="labels no, yes, got another one"):
        prepare(Dataset({"ann": rows, "bob": rows}), TEN, 0, base)


def test_pairs_for_an_encoder_and_a_decoder(tmp_path: Path):
    """
    A T5 gets the prompt and the completion apart.
    """
    base = tiny_base(tmp_path / "t5", "t5")
    rows = tuple(Example.answer(f"ask {n}", "ok") for n in range(10))
    item = prepare(Dataset({"ann": rows, "bob": rows}), TEN, 0, base).clients["ann"].test[0]
    assert isinstance(item, EncodedPair)
    assert len(item.target_ids) == len("ok") + 1
