"""Every error fedia3 raises on purpose.

    Fedia3Error
    ├── BadInput               what was given cannot be used
    │   ├── BadAdapter         an adapter's values or bytes: length, finiteness, header, keys
    │   ├── BadData            a line of training data: file, line, what was expected
    │   ├── BadTargets         IA3 targets that match nothing, or an unknown architecture
    │   ├── BadSetting         an option outside its range
    │   ├── NoDeadline         a call that says no time to give up, or one too far away
    │   ├── OutOfRange         an offset outside its file
    │   └── WrongBaseModel     two things that belong to different base models met
    ├── NotFound               no such owner, version, run or base model
    ├── Conflict               somebody else was first, or the same key names other bytes
    │   └── Erased             what is published was erased by its owner, or began before they did
    ├── Corrupt                stored bytes do not match their digest
    ├── StorageFailed          the disk refused; nothing was changed
    ├── NoGradient             training cannot move a vector, and names it
    ├── QuorumNotMet           too few usable replies before the round's deadline
    ├── TrainerFailed          a device's trainer could not do what it was asked
    ├── NotAllowed             who asks may not do this
    │   ├── BadToken           no token, or one that is unknown, expired or revoked
    │   ├── BadInvite          an invite that is unknown, used or expired
    │   ├── BadSignature       a signature that does not hold
    │   ├── Replayed           a signed request that came a second time
    │   └── WrongClock         a request whose time is too far from the coordinator's
    └── Unreachable            nobody answers, or not in time; come again
        └── TooManyCalls       who asks has to wait

Messages say what was expected, what was found and what to do.
"""


class Fedia3Error(Exception):
    """Root of the tree; ``exit_code`` is what the command line leaves with."""

    exit_code = 1


class BadInput(Fedia3Error):
    """What was given cannot be used; nothing was changed."""

    exit_code = 3


class BadAdapter(BadInput):
    """An adapter's values or bytes break the format."""


class BadData(BadInput):
    """A line of training data cannot be read."""


class BadTargets(BadInput):
    """IA3 targets match nothing, or the architecture is not known."""


class BadSetting(BadInput):
    """An option lies outside its range."""


class NoDeadline(BadInput):
    """A call says no time to give up, or one too far away."""


class OutOfRange(BadInput):
    """An offset lies outside its file."""


class WrongBaseModel(BadInput):
    """Two things that belong to different base models met."""


class NotFound(Fedia3Error):
    """No such owner, version, run or base model."""

    exit_code = 4


class Conflict(Fedia3Error):
    """Somebody else was first, or the same key names other bytes."""

    exit_code = 5


class Erased(Conflict):
    """What is published was erased by its owner, or began before the erasure."""


class Corrupt(Fedia3Error):
    """Stored bytes do not match their digest; they are not served."""

    exit_code = 6


class StorageFailed(Fedia3Error):
    """The disk refused to read or write: full, read-only or broken."""

    exit_code = 9


class NoGradient(Fedia3Error):
    """Training cannot move a vector; the message names it."""

    exit_code = 7


class QuorumNotMet(Fedia3Error):
    """Too few usable replies before the round's deadline; the round is not committed."""

    exit_code = 8


class TrainerFailed(Fedia3Error):
    """A device's trainer could not do what it was asked; ``kind`` is the class of its error."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class NotAllowed(Fedia3Error):
    """Who asks may not do this; nothing was changed."""

    exit_code = 10


class BadToken(NotAllowed):
    """There is no token, or it is unknown, expired or revoked."""


class BadInvite(NotAllowed):
    """The invite is unknown, used or expired."""


class BadSignature(NotAllowed):
    """A signature does not hold: the bytes are not what their sender signed."""


class Replayed(NotAllowed):
    """A signed request came a second time."""


class WrongClock(NotAllowed):
    """A request's time is too far from the coordinator's."""


class Unreachable(Fedia3Error):
    """Nobody answers, or not in time; ``retry_after_s`` says when to come again, if known."""

    exit_code = 11

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyCalls(Unreachable):
    """Who asks has to wait."""
