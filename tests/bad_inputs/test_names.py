"""59 to 68: names and pages, as people, databases and file systems read them."""

import pytest

from fedia3.coordinator.records import Owner
from fedia3.proto import adapters_pb2 as pb
from fedia3.proto import admin_pb2

from .scene import (
    ANNA,
    BAD_INPUT,
    FETCH,
    HISTORY,
    LIST,
    NOT_FOUND,
    RESOLVE,
    Refused,
    Scene,
    require_refused,
)

INVITE, DEVICES = "/fedia3.v1.Admin/Invite", "/fedia3.v1.Admin/ListDevices"


def invited(user: str):
    """An invite for a user of this name."""
    return lambda scene: scene.call(INVITE, admin_pb2.InviteRequest(user=user), scene.operator)


def read(user: str):
    """A service that may read everybody's asks for this user's."""
    return lambda scene: scene.read(RESOLVE, pb.Owner(user=user), scene.web)


def spelled(user: bytes):
    """The same with the name's own bytes, which need not be text."""

    def send(scene: Scene) -> bytes:
        owner = b"\x12" + bytes([len(user)]) + user
        base = pb.ResolveRequest(base_digest=scene.base).SerializeToString()
        return scene.call(RESOLVE, b"\x0a" + bytes([len(owner)]) + owner + base, scene.web)

    return send


def listed(**page: int):
    """A page of anna's versions."""
    return lambda scene: scene.read(LIST, pb.Owner(user="anna"), **page)


def devices(**page: object):
    """A page of devices."""
    return lambda scene: scene.call(DEVICES, admin_pb2.ListDevicesRequest(**page), scene.operator)


NOBODYS = "has no adapter for base model .*list what there is"
TABLE = [
    *(
        Refused(66, repr(name), lambda scene, name=name: scene.promote(name), BAD_INPUT, says)
        for name, says in (
            ("latest", "'latest' is always the newest version; name another alias"),
            ("3", "does not begin with a digit, .*got '3'"),
            ("f" * 64, "is no digest, got 'ffff"),
        )
    ),
    *(
        Refused(
            67,
            f"alias {name[:9]!r}",
            lambda scene, name=name: scene.promote(name),
            BAD_INPUT,
            "an alias has 1 to 128 letters, digits, '_', '.' or '-'.*got",
        )
        for name in (
            "",
            "a b",
            "../a",
            "a/b",
            "-a",
            ".a",
            "ä",
            "a\n",
            "a\0",
            "a" * 129,
            "a" * 10**6,
        )
    ),
    Refused(
        67,
        "asked for",
        lambda scene: scene.read(FETCH, ANNA, alias="a b"),
        BAD_INPUT,
        "an alias has .*got 'a b'",
    ),
    *(
        Refused(
            68,
            f"a history's page {page}",
            lambda scene, page=page: scene.read(HISTORY, ANNA, name="stable", **page),
            BAD_INPUT,
            "a page holds 1 to 100 entries below a positive number",
        )
        for page in ({"before_rev": -1}, {"limit": -1}, {"limit": 101})
    ),
    *(
        Refused(59, what, invited(name), BAD_INPUT, f"1 to 128 characters, got {len(name)}")
        for what, name in (("empty", ""), ("blank", " \t "), ("10 KB", "x" * 10_240))
    ),
    Refused(
        59,
        "4 MB of accents",  # putting them into one order would take half an hour
        read("a" + "\u0315\u0300" * 1_000_000),
        BAD_INPUT,
        "1 to 128 characters, got 2000001",
    ),
    *(Refused(60, name, read(name), NOT_FOUND, NOBODYS) for name in ("an%", "ann_", "%", "a*")),
    *(
        Refused(61, name, read(name), NOT_FOUND, NOBODYS)
        for name in ("'; DROP TABLE adapter; --", '"', "anna' OR '1'='1", "anna\\")
    ),
    Refused(63, "a lone surrogate", spelled(b"\xed\xa0\x80"), BAD_INPUT, "bytes that are none"),
    Refused(63, "no UTF-8", spelled(b"\xff\xfe"), BAD_INPUT, "got .* bytes that are none"),
    Refused(64, "NUL", read("anna\0"), BAD_INPUT, r"no control characters .* got 'anna\\x00'"),
    Refused(64, "a line break", invited("an\nna"), BAD_INPUT, "no control characters"),
    *(Refused(65, name, read(name), NOT_FOUND, NOBODYS) for name in ("ANNA", "аnnа", "anna ")),
    *(
        Refused(68, f"a forged page of {path}", send, answer, says)
        for path, send, answer, says in (
            ("versions, -1", listed(limit=-1), BAD_INPUT, "holds 1 to 100 entries"),
            ("versions, 101", listed(limit=101), BAD_INPUT, "got limit 101"),
            ("versions below -1", listed(before_version=-1), BAD_INPUT, "below a positive number"),
            ("devices, -1", devices(limit=-1), BAD_INPUT, "1 to 1000 devices, got limit -1"),
            ("devices, 2^31-1", devices(limit=2**31 - 1), BAD_INPUT, "1 to 1000 devices"),
            ("devices, made up", devices(after="../x"), NOT_FOUND, r"no device '\.\./x'.*list"),
            ("devices, 100 KB", devices(after="f" * 100_000), NOT_FOUND, "no device 'f{40}' is"),
        )
    ),
]


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_a_name_that_is_none_is_refused(scene: Scene, case: Refused) -> None:
    """Whether it cannot be kept or is nobody's: it never reaches anna's."""
    require_refused(scene, case)


# What looks like a path or a statement and is kept as what it is, a name: nothing is called by it.
HARMLESS = [
    (59, "../../etc/passwd"),
    (59, "/etc/passwd"),
    (59, "a/b"),
    (59, "con"),
    (60, "%"),
    (61, "'; DROP TABLE adapter; --"),
    (62, "Jose\u0301"),
    (65, "АNNА"),
]


@pytest.mark.parametrize(("number", "name"), HARMLESS)
def test_a_name_is_a_name_and_nothing_else(scene: Scene, number: int, name: str) -> None:
    """Its user publishes and fetches; on the disk all bytes lie under their digests."""
    phone = scene.device(scene.service.enrol(name))
    scene.publish(who=phone)
    answer = pb.FetchResponse.FromString(scene.read(FETCH, pb.Owner(user=name), phone))
    assert answer.data == scene.good
    assert Owner.user(name) in scene.service.registry.owners("user")
    blobs = scene.folder / "registry" / "blobs"
    files = [path.name for path in blobs.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(scene.service.registry.blobs.digests())


def test_twins_by_spelling_are_one_user(scene: Scene) -> None:
    """62: composed and decomposed, a name is one; its owner reads with either."""
    phone = scene.device(scene.service.enrol("Ren\u00e9"))
    scene.publish(who=phone)
    both = [scene.read(RESOLVE, pb.Owner(user=name), phone) for name in ("Ren\u00e9", "Rene\u0301")]
    assert both[0] == both[1]
    owners = scene.service.registry.owners("user")
    assert [owner for owner in owners if owner.name.startswith("Ren")] == [Owner.user("Ren\u00e9")]


NUMBERS = {*(case.number for case in TABLE), *(number for number, _name in HARMLESS)}
