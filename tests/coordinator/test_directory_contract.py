"""What every directory promises; a new backend joins the ``directory`` fixture and passes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fedia3.coordinator.directory import (
    FORGOTTEN,
    TOKENS_OF_A_DEVICE,
    Device,
    Directory,
    Invite,
    OpenRound,
    Principal,
    RoundControl,
    Token,
    open_directory,
)
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.stores.memory_directory import MemoryDirectory
from fedia3.errors import BadInput, BadInvite, BadSetting, BadToken, Conflict, NotFound, Replayed

NOW = 1_900_000_000_000
LATER = NOW + 600_000
INVITE = Invite(b"code".rjust(32), "anna", LATER, b"challenge".rjust(32))


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str | None:
    """Where rows are kept: None for the folder's own file, else an empty PostgreSQL database."""
    return None if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Directory]:
    """An empty directory of each kind."""
    opened: Directory
    if request.param == "memory":
        opened = MemoryDirectory()
    elif request.param == "sqlite":
        opened = open_directory(tmp_path)
    else:
        opened = open_directory(tmp_path, request.getfixturevalue("postgres_url"))
    yield opened
    opened.close()


def device(number: int = 1, user: str = "anna") -> Device:
    """A device whose id and keys are its own number's."""
    return Device(
        device_id=f"{number:032x}",
        user=user,
        name=f"phone {number}",
        signing_key=number.to_bytes(32),
        node_key=f"node key {number}".encode(),
        enrolled_ms=NOW,
    )


def token(number: int = 1, expires_ms: int = LATER) -> Token:
    """A device's token; whose, the directory says."""
    return Token(f"token {number}".encode().rjust(32), "device", "nobody", expires_ms)


def invite(number: int, user: str = "anna", expires_ms: int = LATER) -> Invite:
    """An unused invite."""
    return Invite(f"code {number}".encode().rjust(32), user, expires_ms, b"c" * 32)


def enrolled(directory: Directory, number: int = 1, user: str = "anna") -> Device:
    """A device that has enrolled with its own invite and token."""
    directory.add_invite(invite(number, user))
    return directory.enrol(invite(number, user), device(number, user), token(number), NOW)


def test_a_device_enrols_with_an_invite(directory: Directory) -> None:
    """
    The device is kept as it came, and its token shows who it is.
    """
    directory.add_invite(INVITE)
    assert directory.enrol(INVITE, device(), token(), NOW) == device()
    assert directory.device(device().device_id) == device()
    assert directory.principal(token().sha256, NOW) == Principal(
        "device", device().device_id, token().sha256, "anna", device().signing_key
    )


def test_the_invite_says_whose_the_device_is(directory: Directory) -> None:
    """
    A device that calls itself bob's belongs to anna when it used anna's invite.
    """
    directory.add_invite(INVITE)
    assert directory.enrol(INVITE, device(user="bob"), token(), NOW).user == "anna"


def test_an_invite_is_found_until_its_time_is_over(directory: Directory) -> None:
    """
    At the millisecond where it ends there is none any more.
    """
    directory.add_invite(INVITE)
    assert directory.invite(INVITE.code_sha256, LATER - 1) == INVITE
    with pytest.raises(BadInvite):
        directory.invite(INVITE.code_sha256, LATER)
    with pytest.raises(BadInvite):
        directory.enrol(INVITE, device(), token(), LATER)


def test_unknown_used_and_ended_invites_are_told_alike(directory: Directory) -> None:
    """
    Whoever guesses codes learns nothing from the error.
    """
    said = set()
    directory.add_invite(INVITE)
    directory.enrol(INVITE, device(1), token(1), NOW)
    for wrong, now_ms in ((invite(7), NOW), (INVITE, NOW), (INVITE, LATER)):
        with pytest.raises(BadInvite) as refused:
            directory.enrol(wrong, device(2), token(2), now_ms)
        said.add(str(refused.value))
    assert len(said) == 1


def test_a_used_invite_names_its_device(directory: Directory) -> None:
    """
    Who used it is kept beside it.
    """
    enrolled(directory)
    found = directory.invite(invite(1).code_sha256, NOW)
    assert found == replace(invite(1), device_id=device().device_id)


def test_enrolling_again_with_the_same_keys_is_the_same_device(directory: Directory) -> None:
    """
    A lost answer costs nothing: the device keeps its id, gets the new token, and the old one ends.
    """
    first = enrolled(directory)
    again = replace(device(), device_id="f" * 32, name="another name")
    assert directory.enrol(invite(1), again, token(2), NOW + 1) == first
    assert directory.principal(token(2).sha256, NOW + 1).name == first.device_id
    with pytest.raises(BadToken):
        directory.principal(token(1).sha256, NOW + 1)
    assert directory.devices() == (first,)


def test_another_device_cannot_use_a_used_invite(directory: Directory) -> None:
    """
    New keys, or one new key, with a used invite are refused, and nothing changes.
    """
    first = enrolled(directory)
    half = replace(device(2), node_key=first.node_key)
    for other in (device(2), half):
        with pytest.raises(BadInvite):
            directory.enrol(invite(1), other, token(2), NOW)
    assert directory.devices() == (first,)
    assert directory.principal(token(1).sha256, NOW).name == first.device_id


def test_a_new_invite_of_the_same_user_lets_the_same_device_in_again(directory: Directory) -> None:
    """
    A device whose token ended enrols again with the keys it has, under the id it had.
    """
    first = enrolled(directory)
    directory.add_invite(invite(2))
    assert directory.enrol(invite(2), device(1), token(2), NOW) == first
    with pytest.raises(BadInvite):
        directory.enrol(invite(2), device(3), token(3), NOW)


def test_a_key_of_another_device_is_a_conflict(directory: Directory) -> None:
    """
    Neither key may be another device's, nor both another user's; the invite stays unused.
    """
    first = enrolled(directory)
    directory.add_invite(invite(2, "bob"))
    wrong = (
        replace(device(2), signing_key=first.signing_key),
        replace(device(2), node_key=first.node_key),
        device(1, "bob"),
    )
    for other in wrong:
        with pytest.raises(Conflict):
            directory.enrol(invite(2, "bob"), other, token(2), NOW)
    assert directory.enrol(invite(2, "bob"), device(2, "bob"), token(2), NOW).user == "bob"


def test_of_two_devices_one_uses_the_invite(directory: Directory) -> None:
    """
    Eight devices enrol with one code at the same time: one is in, the others are told.
    """
    directory.add_invite(INVITE)

    def enrol(number: int) -> bool:
        try:
            directory.enrol(INVITE, device(number), token(number), NOW)
        except BadInvite:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(enrol, range(1, 9))) == 1
    assert len(directory.devices()) == 1


def test_a_new_invite_drops_those_that_ended_a_day_before(directory: Directory) -> None:
    """
    Invites do not pile up.
    """
    directory.add_invite(INVITE)
    directory.add_invite(invite(2, expires_ms=LATER + 24 * 3600 * 1000))
    with pytest.raises(BadInvite):
        directory.invite(INVITE.code_sha256, NOW)


def test_a_token_ends(directory: Directory) -> None:
    """
    At the millisecond where it ends nobody is known by it; an unknown one is told alike.
    """
    enrolled(directory)
    assert directory.principal(token().sha256, LATER - 1).user == "anna"
    with pytest.raises(BadToken) as ended:
        directory.principal(token().sha256, LATER)
    with pytest.raises(BadToken) as unknown:
        directory.principal(b"?" * 32, NOW)
    assert str(ended.value) == str(unknown.value)


def test_an_operators_token_carries_its_key(directory: Directory) -> None:
    """
    What is added for an operator is who it says it is, without a device.
    """
    admin = Token(b"a" * 32, "admin", "operator", LATER, signing_key=b"k" * 32)
    directory.add_token(admin)
    assert directory.principal(b"a" * 32, NOW) == Principal(
        "admin", "operator", b"a" * 32, None, b"k" * 32
    )


def test_a_service_may_have_a_devices_name(directory: Directory) -> None:
    """
    Shutting a device out leaves the token of a service that is called alike.
    """
    device_id = enrolled(directory).device_id
    directory.add_token(Token(b"s" * 32, "service", device_id, LATER))
    directory.revoke(device_id, NOW)
    assert directory.principal(b"s" * 32, NOW).kind == "service"


def test_a_renewed_token_leaves_the_old_one_its_time(directory: Directory) -> None:
    """
    Both tokens open the door until the first ends.
    """
    first = enrolled(directory)
    directory.add_token(replace(token(2, LATER + 1), principal=first.device_id))
    for number in (1, 2):
        assert directory.principal(token(number).sha256, NOW).name == first.device_id


def test_a_device_has_a_few_tokens_at_most(directory: Directory) -> None:
    """
    Of five tokens the four that end last are kept.
    """
    first = enrolled(directory)
    for number in range(2, TOKENS_OF_A_DEVICE + 2):
        directory.add_token(replace(token(number, LATER + number), principal=first.device_id))
    with pytest.raises(BadToken):
        directory.principal(token(1).sha256, NOW)
    assert directory.principal(token(2).sha256, NOW).name == first.device_id


def test_a_token_for_nobody_is_refused(directory: Directory) -> None:
    """
    A device that is not enrolled, or is shut out, gets no token.
    """
    with pytest.raises(NotFound):
        directory.add_token(token())
    first = enrolled(directory)
    directory.revoke(first.device_id, NOW)
    with pytest.raises(NotFound):
        directory.add_token(replace(token(2), principal=first.device_id))


def test_a_token_is_not_added_twice(directory: Directory) -> None:
    """
    A secret belongs to one principal.
    """
    directory.add_token(Token(b"s" * 32, "service", "web", LATER))
    with pytest.raises(Conflict):
        directory.add_token(Token(b"s" * 32, "admin", "operator", LATER))


def test_a_nonce_is_used_once(directory: Directory) -> None:
    """
    The same principal may not use it again; another one may.
    """
    directory.use_nonce("anna's phone", b"n" * 16, LATER, NOW)
    with pytest.raises(Replayed):
        directory.use_nonce("anna's phone", b"n" * 16, LATER, LATER - 1)
    directory.use_nonce("bob's phone", b"n" * 16, LATER, NOW)


def test_a_nonce_is_forgotten_when_its_time_is_over(directory: Directory) -> None:
    """
    Nonces do not pile up: behind its time the same one is new.
    """
    directory.use_nonce("phone", b"n" * 16, LATER, NOW)
    directory.use_nonce("phone", b"n" * 16, LATER + 1, LATER)


def test_of_two_calls_with_one_nonce_one_passes(directory: Directory) -> None:
    """
    Eight calls at the same time with one nonce: one is new.
    """

    def use(_number: int) -> bool:
        try:
            directory.use_nonce("phone", b"n" * 16, LATER, NOW)
        except Replayed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(use, range(8))) == 1


def test_devices_come_in_pages_in_the_order_they_enrolled(directory: Directory) -> None:
    """
    Three devices in pages of two: the third stands alone on the second page.
    """
    first, second, third = (enrolled(directory, number) for number in (3, 1, 2))
    assert directory.devices(limit=2) == (first, second)
    assert directory.devices(after=second.device_id, limit=2) == (third,)
    assert directory.devices(after=third.device_id) == ()


def test_a_page_needs_a_known_start_and_room(directory: Directory) -> None:
    """
    A device that is not there cannot start a page, and a page holds something.
    """
    with pytest.raises(NotFound):
        directory.devices(after="f" * 32)
    with pytest.raises(BadSetting):
        directory.devices(limit=0)


def test_a_revoked_device_is_shut_out_for_good(directory: Directory) -> None:
    """
    Its token means nothing, it is not among the enrolled, and its keys open no other door.
    """
    first = enrolled(directory)
    revoked = directory.revoke(first.device_id, NOW + 5)
    assert revoked == replace(first, revoked_ms=NOW + 5)
    assert directory.devices() == (revoked,)
    assert directory.enrolled() == ()
    with pytest.raises(BadToken):
        directory.principal(token().sha256, NOW)
    with pytest.raises(BadInvite):
        directory.enrol(invite(1), device(1), token(2), NOW)
    directory.add_invite(invite(2))
    with pytest.raises(Conflict):
        directory.enrol(invite(2), device(1), token(2), NOW)


def test_revoking_again_changes_nothing(directory: Directory) -> None:
    """
    The time of the first revocation stays.
    """
    revoked = directory.revoke(enrolled(directory).device_id, NOW)
    assert directory.revoke(revoked.device_id, NOW + 9) == revoked


def test_a_device_that_is_not_there_is_not_found(directory: Directory) -> None:
    """
    Neither looked up nor revoked.
    """
    with pytest.raises(NotFound):
        directory.device("f" * 32)
    with pytest.raises(NotFound):
        directory.revoke("f" * 32, NOW)


def test_devices_are_seen(directory: Directory) -> None:
    """
    The last time is kept for each that is known; strangers and nobody are no error.
    """
    first, second = (enrolled(directory, number) for number in (1, 2))
    directory.saw([first.device_id, "f" * 32], NOW + 7)
    directory.saw([], NOW + 8)
    assert directory.device(first.device_id).last_seen_ms == NOW + 7
    assert directory.device(second.device_id).last_seen_ms is None


def test_rounds_run_until_somebody_says_otherwise(directory: Directory) -> None:
    """
    A new directory neither pauses nor asks for anything.
    """
    assert directory.round_control() == RoundControl()


def test_the_operators_words_do_not_undo_each_other(directory: Directory) -> None:
    """
    Pausing, asking for a run and an open round stand beside each other.
    """
    opened = OpenRound(3, ("a", "b"), LATER)
    directory.set_paused(True)
    directory.request_run(NOW)
    directory.open_round(opened)
    assert directory.round_control() == RoundControl(True, NOW, opened)
    directory.set_paused(False)
    directory.open_round(None)
    assert directory.round_control() == RoundControl(False, NOW, None)


def test_a_request_made_after_a_run_started_stays(directory: Directory) -> None:
    """
    A run that met the request of 5 leaves that of 6; one that met 6 leaves none.
    """
    directory.run_started(5)
    directory.request_run(6)
    directory.run_started(5)
    assert directory.round_control().run_requested_ms == 6
    directory.run_started(6)
    assert directory.round_control().run_requested_ms is None


def test_a_device_has_a_sound_name_and_key() -> None:
    """
    A blank name and a signing key of another length are refused.
    """
    with pytest.raises(BadInput, match="name"):
        replace(device(), name=" ")
    with pytest.raises(BadInput, match="32 bytes"):
        replace(device(), signing_key=b"short")


def test_a_text_that_cannot_be_kept_is_not_found(directory: Directory) -> None:
    """
    A NUL, which some databases cannot hold, is in no device's id.
    """
    for find in (
        lambda: directory.device("a\0b"),
        lambda: directory.revoke("a\0b", NOW),
        lambda: directory.devices(after="a\0b"),
    ):
        with pytest.raises(NotFound, match=r"no device 'a.x00b'"):
            find()
    directory.saw(["a\0b"], NOW)


@pytest.mark.parametrize(
    "make",
    [
        lambda: replace(device(), device_id="a\0b"),
        lambda: replace(token(), principal="a\0b"),
        lambda: replace(INVITE, user="a\0b"),
    ],
)
def test_a_text_that_cannot_be_kept_is_not_taken(make: Callable[[], object]) -> None:
    """
    Ids and names with a NUL are refused before they reach a directory.
    """
    with pytest.raises(BadInput, match="control characters"):
        make()


def test_many_threads_enrol_many_devices(directory: Directory) -> None:
    """
    Eight threads enrol 24 devices at once, renew tokens and are seen; all are there, in one order.
    """

    def join(number: int) -> str:
        joined = enrolled(directory, number)
        directory.add_token(replace(token(100 + number), principal=joined.device_id))
        directory.saw([joined.device_id], NOW + number)
        return joined.device_id

    with ThreadPoolExecutor(8) as pool:
        joined = set(pool.map(join, range(1, 25)))
    listed = [d.device_id for d in directory.devices(limit=100)]
    assert set(listed) == joined
    assert [d.device_id for d in directory.devices(after=listed[9], limit=5)] == listed[10:15]
    assert all(d.last_seen_ms == NOW + int(d.device_id, 16) for d in directory.enrolled())


def test_a_directory_survives_reopening(tmp_path: Path, database: str | None) -> None:
    """
    Devices, tokens, nonces and the operator's word are there after a restart, beside the registry.
    """
    directory = open_directory(tmp_path, database)
    first = enrolled(directory)
    directory.use_nonce("phone", b"n" * 16, LATER, NOW)
    directory.open_round(OpenRound(3, (first.device_id,), LATER))
    directory.close()
    Registry.open(tmp_path, database).close()
    again = open_directory(tmp_path, database)
    assert again.enrolled() == (first,)
    assert again.principal(token().sha256, NOW).user == "anna"
    assert again.round_control().open_round == OpenRound(3, (first.device_id,), LATER)
    with pytest.raises(Replayed):
        again.use_nonce("phone", b"n" * 16, LATER, NOW)
    again.close()


def test_two_processes_share_a_directory(tmp_path: Path, database: str | None) -> None:
    """
    Two directories on one database, as the service and the proxy have them: what one shuts out the
    other does not know any more, and of two uses of one nonce one passes.
    """
    one, other = open_directory(tmp_path, database), open_directory(tmp_path, database)
    first = enrolled(one)
    assert other.principal(token().sha256, NOW).name == first.device_id

    def use(number: int) -> bool:
        try:
            (one, other)[number % 2].use_nonce("phone", b"n" * 16, LATER, NOW)
        except Replayed:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(use, range(8))) == 1
    one.revoke(first.device_id, NOW)
    assert other.enrolled() == ()
    one.close()
    other.close()


def test_a_directory_in_a_file_is_refused(tmp_path: Path) -> None:
    """
    The error says to choose a folder.
    """
    (tmp_path / "file").write_text("")
    with pytest.raises(BadSetting, match="choose a folder"):
        open_directory(tmp_path / "file")


def test_a_forgotten_users_devices_have_no_name_and_no_access(directory: Directory) -> None:
    """
    Anna's two devices are shut out and nobody's, her open invite is gone; bob's are as they were.
    """
    enrolled(directory, 1)
    enrolled(directory, 2)
    bobs = enrolled(directory, 3, "bob")
    directory.add_invite(invite(9))
    assert [d.device_id for d in directory.devices_of("anna")] == [f"{n:032x}" for n in (1, 2)]
    directory.forget_user("anna", LATER)
    assert directory.devices_of("anna") == ()
    assert directory.enrolled() == (bobs,)
    shut_out = directory.device(f"{1:032x}")
    assert (shut_out.user, shut_out.name, shut_out.revoked_ms) == (FORGOTTEN, FORGOTTEN, LATER)
    with pytest.raises(BadInvite):
        directory.invite(invite(9).code_sha256, NOW)
    directory.forget_user("anna", LATER + 1)
    assert directory.device(f"{1:032x}").revoked_ms == LATER
