"""A demo population: synthetic persons who write short messages, each in a manner of their own.

Nobody here is real and nobody wrote these texts. They are drawn from hand-written clauses,
so they are far more regular than real messages, and a gain measured on them says that
personalization *works*, never how much it is worth to people. Use them for demos and tests.

Everything is a pure function of its arguments: the same names and seeds give the same texts
on every machine (``random.Random`` seeded with a string hashes it with SHA-512).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

__all__ = [
    "Contact",
    "DemoPerson",
    "Phrasing",
    "Routines",
    "demo_person",
    "demo_population",
    "messages",
    "pretraining_population",
]

DEMO_NAMES = (
    "alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "ivan", "judy", "kevin",
    "laura", "mallory", "niaj", "olivia", "peggy", "quentin", "rupert", "sybil", "trent", "ursula",
    "victor", "wendy", "xavier", "yolanda", "zoe",
)  # fmt: skip

# What persons choose from. Contacts are never called like a demo person.
CONTACT_NAMES = (
    "Anna", "Marta", "Tom", "Priya", "Luis", "Mei", "Omar", "Nina", "Jonas", "Sara", "Hugo",
    "Leila", "Ben", "Clara", "Amir", "Ruth", "Pablo", "Ines", "Felix", "Yuki", "Rosa", "Karl",
    "Dina", "Sam", "Lucy", "Theo", "Maya", "Nils", "Eva", "Raj", "Paula", "Max", "Irene", "Leo",
    "Tina", "Hassan", "Greta", "Joe", "Lena", "Marco",
)  # fmt: skip
ROLES = ("partner", "boss", "friend", "sister", "neighbour")
GREETINGS = (
    "hi there", "hey", "hello", "hiya", "yo", "good day", "heya", "howdy", "hey hey", "ahoy",
    "hello hello", "hi", "dear", "oi", "greetings", "morning",
)  # fmt: skip
OPENERS = (
    "so", "well", "listen", "honestly", "guess what", "quick one", "just to say", "by the way",
    "ok so", "right", "you know", "look", "good news", "as I said", "fun fact", "update",
)  # fmt: skip
INTENSIFIERS = (
    "really", "so", "super", "very", "totally", "terribly", "quite", "absurdly", "mega",
    "awfully", "wicked", "extremely",
)  # fmt: skip
PET_WORDS = (
    "great", "lovely", "awesome", "brilliant", "nice", "fab", "splendid", "sweet", "grand",
    "cool", "fine", "magic",
)  # fmt: skip
TAGS = (
    "ok?", "right?", "what do you think?", "deal?", "you in?", "sounds good?", "let me know",
    "no rush", "no worries if not", "fingers crossed", "can't wait", "just saying", "as always",
    "promise",
)  # fmt: skip
EMOTICONS = (None, None, ":)", ":-)", ";)", ":D", "<3", "xD", ":P", "^^", ":-/", "(:", "\\o/", "=)")
ENDINGS = (".", "!", "...", "!!", " :", "~", " -", " //")
SIGN_OFFS = (
    "cheers", "xx", "take care", "love", "ciao", "best", "see ya", "hugs", "later", "bye bye",
    "kisses", "regards", "talk soon", "peace", "over and out", "yours", "ta ta", "stay safe",
)  # fmt: skip
ABBREVIATIONS: tuple[Mapping[str, str], ...] = (
    {},
    {"you": "u", "are": "r", "tomorrow": "tmrw", "please": "pls"},
    {"tomorrow": "tmrw", "please": "plz", "thanks": "thx", "tonight": "tonite"},
    {"and": "&", "with": "w/", "about": "abt", "because": "bc"},
    {"you": "ya", "going to": "gonna", "want to": "wanna", "thanks": "ta"},
)
PLACES = (
    "the library", "the river path", "the old market", "the station", "the harbour", "the park",
    "the corner pub", "the museum", "the bakery", "the gym", "the town hall", "the roof terrace",
    "the bike shop", "the allotment", "the lake", "the cinema", "the bus stop", "the book shop",
    "the swimming pool", "the bridge",
)  # fmt: skip
TIMES = (
    "at six", "at half past seven", "at noon", "around nine", "after lunch", "before work",
    "at 5pm", "at quarter to eight", "by ten", "at 18:30", "after the kids are in bed",
    "at four sharp", "around 3ish", "at dawn",
)  # fmt: skip
ACTIVITIES = (
    "football", "choir practice", "climbing", "yoga", "chess", "running", "pottery", "tennis",
    "gardening", "swing dancing", "badminton", "rowing", "painting", "band rehearsal", "cycling",
    "board games", "boxing", "bird watching",
)  # fmt: skip
FOODS = (
    "ramen", "pancakes", "lentil soup", "pizza", "tacos", "curry", "dumplings", "cheese toast",
    "apple pie", "falafel", "fish and chips", "risotto", "sushi", "goulash", "banana bread",
    "mushroom pasta", "burgers", "salad", "waffles", "paella",
)  # fmt: skip
DRINKS = ("coffee", "green tea", "cider", "lemonade", "hot chocolate", "a beer", "red wine", "mate")
RIDES = ("bus", "train", "bike", "tram", "car", "ferry", "scooter", "metro")
PROJECTS = (
    "the budget", "the website", "the school play", "the spring report", "the new shop",
    "the tax papers", "the slides", "the survey", "the rota", "the garden plan", "the grant",
    "the client visit",
)  # fmt: skip

CLAUSES: Mapping[str, tuple[str, ...]] = {
    "meeting": (
        "shall we meet at {place} {time}",
        "I am at {place} already, come over when you can",
        "can we make it {time} instead, {place} is {very} crowded before that",
        "{friend} will join us at {place} {day}",
        "let us have {drink} at {place} {day} {time}",
        "waiting near {place} with {drink}",
    ),
    "late": (
        "running late, the {ride} is stuck again",
        "sorry, I missed the {ride}, will be there {time}",
        "the {ride} was {very} slow, please start without me",
        "ten minutes more, still looking for my keys",
        "I overslept, tell {boss} I am on the {ride}",
        "the {ride} stopped right before {place}",
    ),
    "shopping": (
        "can you get what we need for {food} from the shop",
        "we are out of milk and I want to make {food}",
        "I bought {drink} and two bags of rice near {place}",
        "please pick up bread on the way, {partner} forgot it",
        "the shop by {place} had {very} cheap apples",
        "the new shoes for {activity} are {very} {good}",
    ),
    "work": (
        "{boss} wants {project} done {time}",
        "still sitting on {project}, it is {very} long",
        "meeting with {boss} about {project} went {good}",
        "finished {project}, going to send it {day}",
        "can you check {project} before {boss} sees it",
        "{boss} moved the call to {day} {time}",
    ),
    "sports": (
        "{activity} was {very} {good} today",
        "are you coming to {activity} {day}",
        "my legs hurt after {activity} but it was {good}",
        "{friend} and I go to {activity} {time}",
        "no {activity} {day} because the hall is closed",
        "bring water for {activity}, it gets {very} hot",
    ),
    "food": (
        "I am making {food} tonight",
        "the {food} at {place} is {very} {good}",
        "{partner} cooked {food} and it was {good}",
        "thinking about {food} all day",
        "we have {food} left, want to come over {time}",
        "{drink} and {food}, that is all I need",
    ),
    "family": (
        "{sister} is visiting {day}",
        "{sister} sends her love and asks about you",
        "{partner} is ill so I stay home {day}",
        "the kids want {food} for the birthday",
        "mum called, she is {very} happy about {project}",
        "{sister} got a new {ride} and is {very} proud",
    ),
    "plans": (
        "going to {place} {day}, want to come",
        "we could take the {ride} to {place} {day}",
        "tickets for {place} are booked, {day} {time}",
        "{neighbour} invited us for {food} {day}",
        "let us plan the trip with {friend} over {drink}",
        "nothing planned {day} except {activity}",
    ),
    "thanks": (
        "thanks for yesterday, the {food} was {very} {good}",
        "thanks for helping with {project}",
        "{neighbour} fixed my {ride}, how {good} is that",
        "tell {friend} thanks for the lift to {place}",
        "you were {very} kind to {sister}, thanks",
        "thanks for watering the plants, {drink} is on me",
    ),
}
WEEK = ("on Monday", "on Tuesday", "on Wednesday", "on Thursday", "on Friday", "on Saturday",
        "on Sunday")  # fmt: skip


@dataclass(frozen=True)
class Contact:
    """Somebody a person writes to and about; ``role`` is one of ``ROLES``."""

    name: str
    role: str


@dataclass(frozen=True)
class Routines:
    """Where, when and what a person does; the first of each tuple is the favourite."""

    places: tuple[str, ...]
    times: tuple[str, ...]
    activities: tuple[str, ...]
    foods: tuple[str, ...]
    projects: tuple[str, ...]
    drink: str
    ride: str
    topics: tuple[str, ...]


@dataclass(frozen=True)
class Phrasing:
    """How a person writes, whatever it is about.

    ``abbreviations`` holds (long, short) pairs; ``ending`` stands where others put a full stop.
    """

    greeting: str
    opener: str
    intensifier: str
    pet_word: str
    tag: str
    emoticon: str | None
    ending: str
    lowercase: bool
    abbreviations: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class DemoPerson:
    """A synthetic person: people around them, routines, phrasing and a sign-off."""

    name: str
    contacts: tuple[Contact, ...]
    routines: Routines
    phrasing: Phrasing
    sign_off: str

    def contact(self, role: str) -> str:
        """Name of the contact who has ``role``; every person has one of each."""
        return next(contact.name for contact in self.contacts if contact.role == role)

    @property
    def habits(self) -> tuple[object, ...]:
        """All that shows in the texts: two persons with equal habits write alike."""
        return (self.contacts, self.routines, self.phrasing, self.sign_off)


def demo_person(name: str, seed: int) -> DemoPerson:
    """The person that ``name`` and ``seed`` stand for."""
    rng = Random(f"person/{seed}/{name}")
    people = rng.sample(CONTACT_NAMES, len(ROLES))
    return DemoPerson(
        name=name,
        contacts=tuple(Contact(who, role) for who, role in zip(people, ROLES, strict=True)),
        routines=_routines(rng),
        phrasing=_phrasing(rng),
        sign_off=rng.choice(SIGN_OFFS),
    )


def messages(person: DemoPerson, count: int, seed: int) -> list[str]:
    """``count`` texts by ``person`` in time order: one a day, the first on a Monday."""
    rng = Random(f"messages/{seed}/{person.name}")
    return [_message(person, day, rng) for day in range(count)]


def demo_population(
    persons: int = 24, messages_each: int = 80, seed: int = 0
) -> list[dict[str, str]]:
    """Rows ``{"user": "alice", "text": "..."}``, user by user, in time order for each."""
    names = [_demo_name(index) for index in range(persons)]
    return list(_rows(names, messages_each, seed))


def pretraining_population(
    persons: int = 200, messages_each: int = 80, seed: int = 0
) -> list[dict[str, str]]:
    """Rows by other persons than any demo population has, for pretraining a base model.

    They draw on the same words, so a base model knows every single habit; the combination
    that makes a demo person is not among them. Names are ``other-000``, ``other-001``, …
    """
    names = [f"other-{index:03d}" for index in range(persons)]
    return list(_rows(names, messages_each, seed))


def _rows(names: Sequence[str], messages_each: int, seed: int) -> Iterator[dict[str, str]]:
    for name in names:
        for text in messages(demo_person(name, seed), messages_each, seed):
            yield {"user": name, "text": text}


def _demo_name(index: int) -> str:
    """alice … zoe, then alice2 … zoe2, and so on."""
    lap, position = divmod(index, len(DEMO_NAMES))
    return DEMO_NAMES[position] + (str(lap + 1) if lap else "")


def _routines(rng: Random) -> Routines:
    return Routines(
        places=tuple(rng.sample(PLACES, 3)),
        times=tuple(rng.sample(TIMES, 3)),
        activities=tuple(rng.sample(ACTIVITIES, 2)),
        foods=tuple(rng.sample(FOODS, 3)),
        projects=tuple(rng.sample(PROJECTS, 2)),
        drink=rng.choice(DRINKS),
        ride=rng.choice(RIDES),
        topics=tuple(rng.sample(sorted(CLAUSES), len(CLAUSES))),
    )


def _phrasing(rng: Random) -> Phrasing:
    return Phrasing(
        greeting=rng.choice(GREETINGS),
        opener=rng.choice(OPENERS),
        intensifier=rng.choice(INTENSIFIERS),
        pet_word=rng.choice(PET_WORDS),
        tag=rng.choice(TAGS),
        emoticon=rng.choice(EMOTICONS),
        ending=rng.choice(ENDINGS),
        lowercase=rng.random() < 0.5,
        abbreviations=tuple(rng.choice(ABBREVIATIONS).items()),
    )


def _message(person: DemoPerson, day: int, rng: Random) -> str:
    """One text; every habit is left out now and then, as people do."""
    phrasing = person.phrasing
    sentences = _sentences(person, day, rng)
    if rng.random() < 0.5:
        sentences[0] = f"{phrasing.opener}, {sentences[0]}"
    if rng.random() < 0.35:
        sentences.append(phrasing.tag)
    sentences[0] = f"{_greeting(person, rng)} {sentences[0]}".strip()
    parts = [_capitalized(_ended(sentence, phrasing.ending, rng)) for sentence in sentences]
    if rng.random() < 0.75:
        parts.append(_capitalized(person.sign_off))
    text = _written(" ".join(parts), phrasing, rng)
    return f"{text} {phrasing.emoticon}" if phrasing.emoticon and rng.random() < 0.6 else text


def _greeting(person: DemoPerson, rng: Random) -> str:
    """The greeting, mostly followed by whom it is for; empty in one message of eight."""
    if rng.random() < 1 / 8:
        return ""
    greeting = person.phrasing.greeting
    if rng.random() < 0.3:
        return f"{greeting},"
    # The partner gets half of the personal messages.
    role = "partner" if rng.random() < 0.5 else rng.choice(ROLES)
    return f"{greeting} {person.contact(role)},"


def _sentences(person: DemoPerson, day: int, rng: Random) -> list[str]:
    """One sentence on a topic, in three messages of ten two different ones."""
    count = 2 if rng.random() < 0.3 else 1
    clauses = rng.sample(CLAUSES[_topic(person, day, rng)], count)
    return [clause.format_map(_slots(person, day, rng)) for clause in clauses]


def _topic(person: DemoPerson, day: int, rng: Random) -> str:
    """Favourite topics come up more often; nobody writes about work at the weekend."""
    topics = [t for t in person.routines.topics if t != "work" or day % 7 < 5]
    return rng.choices(topics, weights=[2.0**-rank for rank in range(len(topics))])[0]


def _slots(person: DemoPerson, day: int, rng: Random) -> dict[str, str]:
    """What fills a clause of ``CLAUSES`` on ``day``."""
    routines, phrasing = person.routines, person.phrasing
    names = {role: person.contact(role) for role in ROLES}
    return names | {
        "place": _favourite(routines.places, rng),
        "time": _favourite(routines.times, rng),
        "activity": _favourite(routines.activities, rng),
        "food": _favourite(routines.foods, rng),
        "project": _favourite(routines.projects, rng),
        "drink": routines.drink,
        "ride": routines.ride,
        "very": phrasing.intensifier,
        "good": phrasing.pet_word,
        "day": rng.choice(("today", "tomorrow", WEEK[(day + 2) % 7])),
    }


def _favourite(choices: Sequence[str], rng: Random) -> str:
    """The first of ``choices`` in more than half of the cases, else any other."""
    return choices[0] if rng.random() < 0.6 else rng.choice(choices[1:])


def _ended(part: str, ending: str, rng: Random) -> str:
    if part.endswith("?"):
        return part
    return part + (ending if rng.random() < 0.9 else ".")


def _capitalized(part: str) -> str:
    return part[:1].upper() + part[1:]


def _written(text: str, phrasing: Phrasing, rng: Random) -> str:
    """``text`` with the person's case and abbreviations, each short form used mostly."""
    words = f" {text} "
    for long, short in phrasing.abbreviations:
        if rng.random() < 0.85:
            words = words.replace(f" {long} ", f" {short} ").replace(f" {long},", f" {short},")
    return words.strip().lower() if phrasing.lowercase else words.strip()
