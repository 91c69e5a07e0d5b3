"""How people name a version: whose it is, then which one.

    bob                 bob's latest
    everyone@latest     everyone's latest
    alice@3             alice's version 3
    alice@5f0c21aa      alice's version whose digest begins so, with 8 digits or more
    everyone@stable     the version that everyone's alias points at

What stands behind the last @ says which one, so whoever has an @ in their name is named with one
more: ``alice@example.org@latest``. All digits are a version number up to seven of them, a digest's
beginning from eight on; other words are aliases. ``everyone`` is always the owner of the global
adapter.
"""

import re
from dataclasses import dataclass

from fedia3.coordinator.records import LATEST, AdapterRecord, Owner, checked_alias
from fedia3.coordinator.registry import Registry
from fedia3.errors import BadInput, BadSetting, NotFound

EVERYONE = "everyone"

_NUMBER = re.compile(r"[1-9][0-9]{0,6}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{8,64}", re.ASCII)


@dataclass(frozen=True)
class VersionName:
    """One version of one owner; the latest where no number, digest or alias is named."""

    owner: Owner
    version: int | None = None
    digest: str | None = None  # its beginning
    alias: str | None = None

    def __str__(self) -> str:
        owner = EVERYONE if self.owner.kind == "global" else self.owner.name
        return f"{owner}@{self.version or self.digest or self.alias or LATEST}"


def parse_version_name(text: str) -> VersionName:
    """A version as people name it; see the module's head.

    Raises:
        BadInput: the name is no owner's, or what stands behind the @ names no version.
    """
    whose, at, which = text.rpartition("@")
    if not at:
        whose, which = text, LATEST
    owner = Owner.everyone() if whose == EVERYONE else Owner.user(whose)
    if which == LATEST:
        return VersionName(owner)
    if _NUMBER.fullmatch(which):
        return VersionName(owner, version=int(which))
    if _DIGEST.fullmatch(which):
        return VersionName(owner, digest=which)
    try:
        return VersionName(owner, alias=checked_alias(which))
    except BadInput as error:
        raise BadInput(
            f"cannot read {which!r} in {text!r}: behind the @ stands a version number, 8 or more "
            f"hex digits of a digest, an alias or {LATEST}; a name that holds an @ is written "
            f"{text}@{LATEST}"
        ) from error


def find_version(registry: Registry, name: VersionName, base: str) -> AdapterRecord:
    """The version of that name on the base model of this digest.

    Raises:
        NotFound: the owner has no such version or alias on this base.
        BadSetting: several digests begin so.
    """
    if name.alias is not None:
        try:
            return registry.find(name.owner, base, name.alias)
        except NotFound as error:
            raise NotFound(f"{error}; a name that holds an @ is written {name}@{LATEST}") from error
    if name.digest is None:
        return registry.find(name.owner, base, name.version or LATEST)
    # Newest first: of two versions with the same bytes the newer one is meant.
    found = {
        record.digest: record
        for record in reversed(registry.versions(name.owner, base))
        if record.digest.startswith(name.digest)
    }
    if not found:
        raise NotFound(
            f"no version of {name.owner} for base model {base[:12]} has a digest that begins with "
            f"{name.digest}; list what there is first"
        )
    if len(found) > 1:
        listed = ", ".join(digest[: len(name.digest) + 4] for digest in sorted(found))
        raise BadSetting(f"{len(found)} digests of {name.owner} begin so ({listed}); give more")
    return next(iter(found.values()))
