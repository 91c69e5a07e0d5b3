"""The demo population: synthetic, repeatable, and visibly personal."""

from fedia3.simulations.demo import (
    CONTACT_NAMES,
    DEMO_NAMES,
    ROLES,
    DemoPerson,
    demo_person,
    demo_population,
    messages,
    pretraining_population,
)

ALICE = demo_person("alice", seed=0)


def _demo_persons() -> list[DemoPerson]:
    return [demo_person(name, seed=0) for name in DEMO_NAMES]


def test_the_same_seed_gives_the_same_population() -> None:
    """Two calls agree row by row, so a test may rely on what alice writes."""
    assert demo_population(3, 10, seed=7) == demo_population(3, 10, seed=7)


def test_another_seed_gives_other_persons() -> None:
    """The seed decides who alice is, not only what she writes."""
    assert demo_person("alice", seed=1).habits != ALICE.habits


def test_a_longer_history_continues_the_shorter_one() -> None:
    """Asking for more messages never rewrites the earlier ones."""
    assert messages(ALICE, 20, seed=0)[:5] == messages(ALICE, 5, seed=0)


def test_a_population_has_the_asked_number_of_persons_and_messages() -> None:
    """3 persons with 4 messages each are 12 rows, user by user."""
    users = [row["user"] for row in demo_population(persons=3, messages_each=4)]
    assert users == ["alice"] * 4 + ["bob"] * 4 + ["carol"] * 4


def test_names_stay_distinct_beyond_the_list_of_names() -> None:
    """The 27th person is alice2, not alice again."""
    users = {row["user"] for row in demo_population(persons=27, messages_each=1)}
    assert len(users) == 27
    assert "alice2" in users


def test_no_two_persons_share_all_habits() -> None:
    """Telling persons apart is what the demo is for."""
    people = _demo_persons()
    assert len({person.habits for person in people}) == len(people)


def test_no_pretraining_person_has_the_habits_of_a_demo_person() -> None:
    """A base model must not have met alice under another name."""
    others = {row["user"] for row in pretraining_population(messages_each=1)}
    demo = {row["user"] for row in demo_population(messages_each=1)}
    assert not others & demo
    habits = {demo_person(name, seed=0).habits for name in others}
    assert not habits & {demo_person(name, seed=0).habits for name in demo}


def test_every_person_knows_one_contact_in_each_role() -> None:
    """Five roles, five different people, none of them called like a demo person."""
    names = [ALICE.contact(role) for role in ROLES]
    assert len(set(names)) == len(ROLES)
    assert not {name.lower() for name in CONTACT_NAMES} & set(DEMO_NAMES)


def test_texts_are_short_and_never_empty() -> None:
    """Every message has words, and no message is a letter."""
    lengths = [len(row["text"].split()) for row in demo_population()]
    assert min(lengths) >= 4
    assert max(lengths) <= 45


def test_most_messages_of_a_person_differ() -> None:
    """Personal does not mean one fixed sentence: at least 70 of 80 are distinct."""
    assert len(set(messages(ALICE, 80, seed=0))) >= 70


def test_a_person_signs_most_messages_but_not_all() -> None:
    """The sign-off stands in three messages of four, and hardly ever in another's."""
    bob = demo_person("bob", seed=0)
    signed = [ALICE.sign_off in text.lower() for text in messages(ALICE, 400, seed=0)]
    assert 0.65 < sum(signed) / 400 < 0.85
    assert not any(ALICE.sign_off in text.lower() for text in messages(bob, 400, seed=0))


def test_messages_usually_begin_with_the_greeting() -> None:
    """Seven of eight do, so a prompt that greets is a natural beginning."""
    greeting = ALICE.phrasing.greeting
    greeted = [text.lower().startswith(greeting) for text in messages(ALICE, 400, seed=0)]
    assert 0.8 < sum(greeted) / 400 < 0.95


def test_lowercase_persons_write_no_capitals() -> None:
    """Only an emoticon may keep its capital letter."""
    person = next(p for p in _demo_persons() if p.phrasing.lowercase)
    emoticon = person.phrasing.emoticon or ""
    for text in messages(person, 50, seed=0):
        plain = text.removesuffix(emoticon)
        assert plain == plain.lower()
