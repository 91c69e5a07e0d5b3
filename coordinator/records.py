"""What the registry remembers, as values: owners, adapter versions, rounds and who took part.

Each value is sound once it is built: names, digests, counts and metrics are checked here, so that
no store has to. Rules that need a look at what is stored are in :mod:`fedia3.coordinator.registry`.
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from numbers import Real
from typing import Literal, get_args

from fedia3.errors import BadInput

OwnerKind = Literal["global", "user"]
Form = Literal["adapter", "personal"]
Verdict = Literal["accepted", "rejected", "missing"]

MAX_NAME = 128  # characters
MAX_SPELLED = 4 * MAX_NAME  # no character of NFC stands for more than four others
MAX_REASON = 500  # characters
MAX_METRICS = 4096  # bytes of JSON
MAX_COUNT = 2**63 - 1  # what a database's integer holds
LATEST = "latest"  # what a version that names none means; never an alias

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ALIAS = re.compile(r"[A-Za-z_][A-Za-z0-9._-]{0,127}")  # a tag of OCI's, but for a leading digit


@dataclass(frozen=True, order=True)
class Owner:
    """Whose adapter it is: everyone's, or one user's.

    A user's name is any text of 1 to 128 characters without control characters; it is kept in
    NFC, so that two spellings of one name are one owner. It is never used as a path.

    Raises:
        BadInput: the name cannot be an owner's name.
    """

    kind: OwnerKind
    name: str  # "" for everyone

    def __post_init__(self) -> None:
        if self.kind not in get_args(OwnerKind):
            raise BadInput(f"an owner is one of {get_args(OwnerKind)}, got {self.kind!r}")
        if self.kind == "user":
            object.__setattr__(self, "name", checked_name(self.name, "a user's name"))
        elif self.name:
            raise BadInput(f"everyone's adapter has no name, got {self.name!r}")

    def __str__(self) -> str:
        return f"user {self.name!r}" if self.kind == "user" else "everyone"

    @classmethod
    def everyone(cls) -> "Owner":
        """The owner of the global adapter."""
        return cls("global", "")

    @classmethod
    def user(cls, name: str) -> "Owner":
        """The owner of one user's personal adapters."""
        return cls("user", name)


@dataclass(frozen=True, kw_only=True)
class AdapterDraft:
    """A version that is about to be published: everything but its number and its time.

    Raises:
        BadInput: a digest, a count or the metrics are not sound, or form and owner disagree.
    """

    owner: Owner
    form: Form
    digest: str  # of the stored bytes
    schema_digest: str
    base: str  # digest of the base model's manifest
    round_num: int  # the round it came out of, or the round of the global it was trained on
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    parent: str | None = None  # digest of the owner's version it continues
    global_digest: str | None = None  # the global version a personal adapter is relative to

    def __post_init__(self) -> None:
        _check_form(self.form, self.owner, self.global_digest)
        for name in ("digest", "schema_digest", "base"):
            checked_digest(getattr(self, name), name)
        for name in ("parent", "global_digest"):
            if getattr(self, name) is not None:
                checked_digest(getattr(self, name), name)
        for name in ("round_num", "num_examples"):
            checked_count(getattr(self, name), name)
        object.__setattr__(self, "metrics", checked_metrics(self.metrics))


@dataclass(frozen=True, kw_only=True)
class AdapterRecord(AdapterDraft):
    """A published version; it never changes and its number is never given again."""

    version: int  # 1, 2, 3, … for each owner and base
    created_at: datetime  # UTC, whole milliseconds
    yanked: bool = False  # when it was read: only who names it is given it

    def __str__(self) -> str:
        return f"version {self.version} of {self.owner}"


@dataclass(frozen=True, kw_only=True)
class AliasMove:
    """An alias, such as ``stable``, that is about to point at a version, or at none any more.

    Raises:
        BadInput: the name is ``latest``, a number or no alias, or who and why are not sound.
    """

    owner: Owner
    base: str
    name: str
    version: int | None
    actor: str = "operator"  # who moves it
    reason: str = ""

    def __post_init__(self) -> None:
        checked_digest(self.base, "base")
        checked_alias(self.name)
        object.__setattr__(self, "actor", checked_name(self.actor, "who moves an alias"))
        object.__setattr__(self, "reason", checked_reason(self.reason))


@dataclass(frozen=True, kw_only=True)
class AliasEvent(AliasMove):
    """One move of an alias; the newest says where it points. None is ever changed."""

    rev: int  # 1, 2, 3, … for each alias, dropped or not
    at: datetime  # UTC, whole milliseconds; never before the move before

    def __str__(self) -> str:
        return f"alias {self.name!r} of {self.owner}"


@dataclass(frozen=True)
class Contribution:
    """What became of one client's part in a round.

    What a rejected client claimed is left out where it is not a sound value. The reason may quote
    a stranger: characters that cannot be stored are replaced, and it is cut at 500.

    Raises:
        BadInput: the client's name, its count, norm or metrics are not sound.
    """

    client: str
    verdict: Verdict
    reason: str = ""
    num_examples: int = 0
    norm: float | None = None  # L2 norm of the delta; None where there was none to measure
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verdict not in get_args(Verdict):
            raise BadInput(f"a verdict is one of {get_args(Verdict)}, got {self.verdict!r}")
        if self.norm is not None and not math.isfinite(self.norm):
            raise BadInput(f"a delta's norm is finite, got {self.norm}; leave it out")
        reason = self.reason[:MAX_REASON].encode(errors="replace").decode().replace("\0", "?")
        object.__setattr__(self, "reason", reason)
        object.__setattr__(self, "client", checked_name(self.client, "a client's name"))
        checked_count(self.num_examples, "num_examples")
        object.__setattr__(self, "metrics", checked_metrics(self.metrics))


@dataclass(frozen=True)
class RoundCommit:
    """One finished round, stored whole or not at all.

    Raises:
        BadInput: the draft is not everyone's adapter of this very round.
    """

    round_num: int
    state: bytes  # the server state the next round starts from
    draft: AdapterDraft
    contributions: tuple[Contribution, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.draft.owner != Owner.everyone():
            raise BadInput(f"a round yields everyone's adapter, got one of {self.draft.owner}")
        if self.draft.round_num != self.round_num:
            raise BadInput(
                f"round {self.round_num} was given the adapter of round {self.draft.round_num}"
            )
        clients = [c.client for c in self.contributions]
        if len(set(clients)) != len(clients):
            raise BadInput(f"round {self.round_num} lists a client twice; one contribution each")
        object.__setattr__(self, "metrics", checked_metrics(self.metrics))


@dataclass(frozen=True)
class RoundRecord:
    """One committed round; ``version`` is the global version that came out of it."""

    round_num: int
    base: str
    version: int
    digest: str
    contributions: tuple[Contribution, ...]
    metrics: Mapping[str, float]
    committed_at: datetime  # UTC, whole milliseconds


@dataclass(frozen=True)
class Tombstone:
    """What is left of an erasure; it names nobody."""

    receipt: str  # 32 random hex digits
    erased_at: datetime  # UTC, whole milliseconds
    versions: int  # that were deleted
    traceless: bool = True  # False: the database's log goes on holding them for a while


def checked_name(name: str, what: str, longest: int = MAX_NAME) -> str:
    """The name in NFC, once it is 1 to 128 characters, not blank, free of control characters.

    Raises:
        BadInput: it is not; ``what`` says in the message whose name was expected.
    """
    if len(name) <= MAX_SPELLED:  # the time it takes grows with the square of a run of accents
        name = unicodedata.normalize("NFC", name)
    if not name.strip() or len(name) > longest:
        raise BadInput(f"{what} has 1 to {longest} characters, got {len(name)}: {name[:20]!r}")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
        raise BadInput(f"{what} holds no control characters or lone surrogates, got {name!r}")
    return name


def checked_alias(name: str) -> str:
    """The alias itself, once it is 1 to 128 letters, digits, ``_``, ``.`` or ``-``.

    Raises:
        BadInput: it is not, begins with a digit, or is ``latest``, which moves by itself.
    """
    if name == LATEST:
        raise BadInput(f"{LATEST!r} is always the newest version; name another alias to move")
    if not _ALIAS.fullmatch(name) or _DIGEST.fullmatch(name):
        raise BadInput(
            "an alias has 1 to 128 letters, digits, '_', '.' or '-', does not begin with a digit, "
            f"'.' or '-', and is no digest, got {name[:64]!r}"
        )
    return name


def checked_reason(reason: str) -> str:
    """Why somebody did something, once it is at most 500 printable characters.

    Raises:
        BadInput: it is not.
    """
    return checked_name(reason, "a reason", MAX_REASON) if reason else ""


def is_digest(name: str) -> bool:
    """Whether this is a sha256 in lower-case hex, which no alias is."""
    return _DIGEST.fullmatch(name) is not None


def checked_digest(digest: str, what: str) -> str:
    """The digest itself, once it is a sha256 in lower-case hex.

    Raises:
        BadInput: it is not.
    """
    if not _DIGEST.fullmatch(digest):
        raise BadInput(f"{what} is a sha256 of 64 hex digits, got {digest[:80]!r}")
    return digest


def checked_version(version: int) -> int:
    """The number itself, once it may be a version's.

    Raises:
        BadInput: it is not positive.
    """
    if version < 1:
        raise BadInput(f"versions are 1, 2, 3, …, got {version}; name none for the newest")
    return version


def checked_count(count: int, what: str) -> int:
    """The count itself, once a database can hold it.

    Raises:
        BadInput: it is negative or too large.
    """
    if not 0 <= count <= MAX_COUNT:
        raise BadInput(f"{what} lies in 0 … 2^63-1, got {count}")
    return count


def checked_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """A copy with plain floats, once all are finite and their JSON has at most 4096 bytes.

    Raises:
        BadInput: a value is not a finite number, or there are too many of them.
    """
    if len(metrics) > MAX_METRICS:  # a stranger's may be hundreds of thousands
        raise BadInput(
            f"metrics take at most {MAX_METRICS} bytes of JSON, got {len(metrics)} of them; "
            "keep fewer"
        )
    for name, value in metrics.items():
        if not isinstance(value, Real) or not math.isfinite(value):
            raise BadInput(f"metric {name!r} is a finite number, got {value!r}")
    checked = {str(name): float(value) for name, value in metrics.items()}
    if (size := len(metrics_to_json(checked))) > MAX_METRICS:
        raise BadInput(f"metrics take at most {MAX_METRICS} bytes of JSON, got {size}; keep fewer")
    return checked


def metrics_to_json(metrics: Mapping[str, float]) -> str:
    """The stored form: ASCII, sorted keys, no spaces."""
    return json.dumps(dict(metrics), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _check_form(form: Form, owner: Owner, global_digest: str | None) -> None:
    expected = "personal" if owner.kind == "user" else "adapter"
    if form != expected:
        raise BadInput(f"{owner} publishes the form {expected!r}, got {form!r}")
    if form == "personal" and global_digest is None:
        raise BadInput("a personal adapter names the global version it was trained on, got none")
    if form == "adapter" and global_digest is not None:
        raise BadInput("a global adapter is relative to no other, got a global_digest")
