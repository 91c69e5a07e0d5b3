"""When a device works: its owner's wishes against the machine's facts."""

from datetime import date, time
from pathlib import Path

import pytest

from fedia3.client.conditions import (
    Conditions,
    DayBytes,
    Facts,
    Probes,
    QuietHours,
    idle_age_s,
    parse_bytes,
    why_not,
    why_offline,
)
from fedia3.errors import BadSetting

NOON = Facts(local_time=time(12))
NIGHT = QuietHours.parse("22:00-07:00")


@pytest.mark.parametrize(
    ("wanted", "facts", "reason"),
    [
        (Conditions(), NOON, None),
        (Conditions(), Facts(time(12), is_paused=True), "paused by its owner"),
        (Conditions(quiet_hours=NIGHT), NOON, None),
        (Conditions(quiet_hours=NIGHT), Facts(time(23)), "quiet hours until 07:00"),
        (Conditions(), Facts(time(12), on_battery=True), None),
        (Conditions(on_ac_power=True), Facts(time(12), on_battery=True), "on battery power"),
        (Conditions(on_ac_power=True), Facts(time(12), on_battery=False), None),
        (
            Conditions(only_when_idle=True),
            Facts(time(12), input_age_s=5),
            "somebody is using this machine",
        ),
        (
            Conditions(only_when_idle=True),
            Facts(time(12), input_age_s=500, others_share=0.8),
            "other programs use 80% of the processor",
        ),
        (Conditions(only_when_idle=True), Facts(time(12), input_age_s=500, others_share=0.1), None),
        (Conditions(), Facts(time(12), input_age_s=5, others_share=1.0), None),
    ],
)
def test_the_first_wish_that_is_not_met_is_named(
    wanted: Conditions, facts: Facts, reason: str | None
):
    """
    Only what the owner asked for counts.
    """
    assert why_not(wanted, facts) == reason


def test_what_the_system_does_not_tell_keeps_nothing_from_working():
    """
    A machine without a battery is on mains; one without logins is idle.
    """
    everything = Conditions(only_when_idle=True, on_ac_power=True, quiet_hours=NIGHT)
    assert why_not(everything, NOON) is None


@pytest.mark.parametrize(
    ("hours", "quiet", "loud"),
    [
        ("22:00-07:00", ["22:00", "23:59", "00:00", "06:59"], ["07:00", "12:00", "21:59"]),
        ("13:00-14:30", ["13:00", "14:29"], ["12:59", "14:30", "00:00"]),
    ],
)
def test_quiet_hours_may_go_past_midnight(hours: str, quiet: list[str], loud: list[str]):
    """
    The beginning belongs to them, the end does not.
    """
    covered = QuietHours.parse(hours).cover
    assert all(covered(time.fromisoformat(t)) for t in quiet)
    assert not any(covered(time.fromisoformat(t)) for t in loud)


@pytest.mark.parametrize("text", ["", "22:00", "22-07-01", "25:00-07:00", "07:00-07:00"])
def test_hours_that_are_none_are_refused(text: str):
    """
    The message shows how they are written.
    """
    with pytest.raises(BadSetting, match="quiet hours"):
        QuietHours.parse(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("50MB", 50_000_000), ("1.5 GiB", 1_610_612_736), ("1000", 1000), ("2k", 2000)],
)
def test_bytes_are_read_as_people_write_them(text: str, count: int):
    """
    Decimal units by default, binary ones with an i.
    """
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "many", "-1", "5 TB", "MB"])
def test_other_amounts_are_refused(text: str):
    """
    The message shows how they are written.
    """
    with pytest.raises(BadSetting, match="50MB"):
        parse_bytes(text)


def test_a_day_has_its_bytes():
    """
    Beyond them the device keeps off the network, and says how much went over it.
    """
    wanted = Conditions(max_bytes_a_day=50_000_000)
    assert why_offline(wanted, Facts(time(12), bytes_today=49_999_999)) is None
    assert why_offline(wanted, Facts(time(12), bytes_today=50_000_000)) == (
        "50.0 MB went over the network today, 50.0 MB may"
    )
    assert why_offline(Conditions(), Facts(time(12), bytes_today=10**12)) is None


def test_the_days_bytes_survive_a_restart_and_end_with_the_day(tmp_path: Path):
    """
    One file; midnight starts from zero.
    """
    today = date(2026, 11, 25)
    counted = DayBytes(tmp_path / "bytes.json", lambda: today)
    counted.add(1000)
    counted.add(500)
    counted.save()
    again = DayBytes(tmp_path / "bytes.json", lambda: today)
    assert again.count == 1500
    today = date(2026, 11, 26)
    assert again.count == 0
    again.add(7)
    again.save()
    assert DayBytes(tmp_path / "bytes.json", lambda: today).count == 7


def test_a_lot_of_bytes_is_written_down_at_once(tmp_path: Path):
    """
    A crash must not give a device a second allowance.
    """
    counted = DayBytes(tmp_path / "bytes.json")
    counted.add(DayBytes.SAVE_EVERY)
    assert DayBytes(tmp_path / "bytes.json").count == DayBytes.SAVE_EVERY


@pytest.mark.parametrize(
    ("told", "age"),
    [
        ("IdleHint=yes\nIdleSinceHint=40000000\n", 60.0),
        ("IdleHint=no\nIdleSinceHint=40000000\n", 0.0),
        ("IdleHint=no\nIdleSinceHint=0\n", None),
        ("", None),
    ],
)
def test_the_desktop_tells_how_long_it_has_been_idle(told: str, age: float | None):
    """
    A hundred seconds after 1970, idle since forty; one that never said anything says nothing.
    """
    assert idle_age_s(told, now_s=100.0) == age


def test_the_probes_find_facts_on_this_machine():
    """
    Whatever machine: shares are shares, and nothing raises.
    """
    facts = Probes().facts(is_paused=False, bytes_today=3)
    assert facts.others_share is None or 0 <= facts.others_share <= 1
    assert facts.input_age_s is None or facts.input_age_s >= 0
    assert facts.bytes_today == 3
