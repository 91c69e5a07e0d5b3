"""The report's figures, by hand, and its three forms."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from fedia3.errors import Corrupt
from fedia3.simulations.report import Report, RunFacts, UserResult, gain, groups, summary, write

FACTS = RunFacts(
    data="chats.jsonl", base="toy", base_digest="ab" * 32, users=2, too_small={"eve": 3},
    rounds=2, cohort=2, seeds=(0,), adapter_params=192, bytes_down=768, bytes_up=768, rejected=1,
    grad_norm=(0.01, 0.02), peak_memory=5_000_000, seconds=3.0, skipped_lines=4,
    unhealthy=1,
    client_rounds=6,
    left_out=0,
)  # fmt: skip

# ann gains 40 % over the base and 25 % over the global; bob's own part lost on his validation text
ANN = UserResult(
    user="ann", seed=0, train_examples=9, test_examples=2, test_tokens=20,
    base=5.0, global_=4.0, personal=3.0, wrong_user=4.5, choice="personal",
    seen_in_pretraining=False,
)  # fmt: skip
BOB = replace(ANN, user="bob", global_=5.0, personal=6.0, wrong_user=4.0, choice="global")


def report_of(*users: UserResult) -> Report:
    """These users under the facts above."""
    return Report(FACTS, users)


def test_a_user_is_served_what_validation_chose():
    """
    ann's own part has 3.0; bob's is worse than the global one's 5.0, which he is served.
    """
    assert (ANN.served, BOB.served) == (3.0, 5.0)
    labelled = replace(BOB, exact_global=0.5, exact_personal=1.0)
    assert labelled.exact_served == 0.5


def test_means_are_over_users():
    """
    base 5 and 5, global 4 and 5, personal 3 and 6, served 3 and 5, another's 4.5 and 4.
    """
    assert summary([ANN, BOB])["mean_loss"] == {
        "base": 5.0,
        "global": 4.5,
        "personal": 4.5,
        "served": 4.0,
        "wrong_user": 4.25,
    }


def test_win_rates_count_users():
    """
    Only ann's own part wins; another user's beats the global one for bob; the gate serves ann's.
    """
    facts = summary([ANN, BOB])
    wins = {name: count["mean"] for name, count in facts.items() if "_better_" in name}
    assert wins == {
        "personal_better_than_base": 1,
        "personal_better_than_global": 1,
        "wrong_user_better_than_global": 1,
        "served_better_than_global": 1,
    }
    assert facts["served_personal"] == {"mean": 1.0, "least": 1, "most": 1, "of": 2}
    assert facts["served_worse_than_global"]["mean"] == 0


def test_equal_losses_are_no_win():
    """
    A personal part that changes nothing neither beats the global one nor loses to it.
    """
    same = replace(ANN, personal=4.0)
    facts = summary([same])
    assert facts["served_better_than_global"]["mean"] == 0
    assert facts["served_worse_than_global"]["mean"] == 0


def test_quantiles_of_the_gain():
    """
    Gains of 0, 10 … 100 %: p10 is 10 %, the median 50 %, p90 90 %, the worst 0 %.
    """
    users = [
        replace(ANN, user=str(n), base=10.0, personal=10.0 - n, choice="personal")
        for n in range(11)
    ]
    assert summary(users)["served_gain_over_base"] == pytest.approx(
        {"p10": 0.1, "p50": 0.5, "p90": 0.9, "worst": 0.0}
    )


def test_a_base_without_loss_leaves_nothing_to_gain():
    """
    A classifier that is certain and right has loss 0; a share of 0 is not asked for.
    """
    assert gain(3.0, 4.0) == 0.25
    assert gain(5.0, 4.0) == -0.25
    assert gain(0.0, 0.0) == 0.0


def test_wins_of_several_seeds_are_a_mean_and_a_spread():
    """
    In seed 0 both users win, in seed 1 one does: 1.5 (1–2) of 2.
    """
    won, lost = replace(BOB, personal=1.0), replace(BOB, seed=1)
    report = report_of(ANN, won, replace(ANN, seed=1), lost)
    count = summary(report.users)["personal_better_than_global"]
    assert count == {"mean": 1.5, "least": 1, "most": 2, "of": 2}
    assert "beats global for 1.5 (1–2) of 2" in report.to_text()


def test_each_seed_has_its_means():
    """
    Base losses of 5 in seed 0 and 7 in seed 1.
    """
    by_seed = summary([ANN, replace(ANN, seed=1, base=7.0)])["by_seed"]
    assert {seed: means["base"] for seed, means in by_seed.items()} == {0: 5.0, 1: 7.0}


def test_users_whom_the_base_has_seen_are_reported_apart():
    """
    ann is new, bob was in the pretraining text; without such users there is one group.
    """
    seen = replace(BOB, seen_in_pretraining=True)
    names = {name: [u.user for u in group] for name, group in groups([ANN, seen]).items()}
    assert names == {
        "all users": ["ann", "bob"],
        "users new to the base": ["ann"],
        "users the base's pretraining saw": ["bob"],
    }
    assert list(groups([ANN, BOB])) == ["all users"]


def test_exact_completions_stand_beside_the_majority_label():
    """
    Half of ann's and all of bob's labels are right; always guessing the most common gets a quarter.
    """
    ann = replace(ANN, exact_base=0.0, exact_global=0.25, exact_personal=0.5, majority=0.25)
    bob = replace(BOB, exact_base=0.0, exact_global=1.0, exact_personal=0.0, majority=0.25)
    facts = summary([ann, bob])
    assert facts["exact"] == {"base": 0.0, "global": 0.625, "personal": 0.25, "served": 0.75}
    assert facts["majority_label"] == 0.25
    assert "most common training label: 25.0%" in report_of(ann, bob).to_text()


def test_plain_text_has_no_exact_completions():
    """
    Without labels neither figure appears.
    """
    assert summary([ANN, BOB]).keys().isdisjoint({"exact", "majority_label"})


def test_the_text_says_what_happened():
    """
    Who is served what, the gain, who had too little text, what was skipped and refused.
    """
    text = report_of(ANN, BOB).to_text()
    for said in (
        "chats.jsonl on base toy (abababababab)",
        "base 5.000  global 4.500  personal 4.500  served 4.000  another user's 4.250",
        "the gate serves personal to 1 of 2",
        "served against base:   p10 +4.0%  p50 +20.0%  p90 +36.0%  worst user +0.0%",
        "1 more have too little text to train and test on and are served the global adapter: "
        "eve (3)",
        "4 malformed lines were skipped",
        "1 updates rejected",
        "0.8 kB down",
    ):
        assert said in text


def test_the_best_served_user_comes_first():
    """
    ann gains 40 %, bob nothing.
    """
    lines = report_of(BOB, ANN).to_text().splitlines()
    assert lines[-2].startswith("ann") and lines[-2].endswith("personal +40.0%")
    assert lines[-1].startswith("bob") and lines[-1].endswith("global +0.0%")


def test_a_written_report_reads_back(tmp_path: Path):
    """
    Nothing is lost between report.json and the value it was written from.
    """
    report = report_of(ANN, replace(BOB, exact_personal=0.5, exact_global=0.25, majority=0.1))
    write(report, tmp_path)
    assert Report.read(tmp_path) == report
    assert (tmp_path / "report.txt").read_text() == report.to_text()
    by_user = {row["user"]: row for row in json.loads(report.to_json())["users"]}
    assert (by_user["ann"]["served"], by_user["bob"]["exact_served"]) == (3.0, 0.25)


@pytest.mark.parametrize("text", ["{", "[]", '{"facts": {}, "users": []}', "null", "\x89PNG"])
def test_another_file_is_no_report(tmp_path: Path, text: str):
    """
    Half a file, other JSON or missing fields are Corrupt, and the message names the file.
    """
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(Corrupt, match=r"report\.json is not a fedia3 report"):
        Report.read(tmp_path)


def test_a_row_that_is_no_user_is_no_report(tmp_path: Path):
    """
    The facts are right, but among the users is a number.
    """
    data = json.loads(report_of(ANN, BOB).to_json())
    (tmp_path / "report.json").write_text(json.dumps({**data, "users": [7]}))
    with pytest.raises(Corrupt):
        Report.read(tmp_path)


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_the_picture_grows_with_the_users_within_bounds(tmp_path: Path):
    """
    1210 pixels wide; at least 440 high for two users, more for sixty, at most 1760 for thousands.
    """
    sizes = []
    for count in (2, 60, 1000):
        write(report_of(*(replace(ANN, user=f"user {n}") for n in range(count))), tmp_path)
        sizes.append(png_size(tmp_path / "report.png"))
    assert [width for width, _ in sizes] == [1210, 1210, 1210]
    assert sizes[0][1] == 440 < sizes[1][1] < sizes[2][1] == 1760


def test_any_name_can_be_drawn(tmp_path: Path):
    """
    Dollar signs are not mathematics, and a script the font lacks warns nobody.
    """
    users = [replace(ANN, user=name) for name in ("$_$", "$\\frac$", "李雷", "a" * 100)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(report_of(*users), tmp_path)
    assert "李雷" in (tmp_path / "report.txt").read_text()
    assert png_size(tmp_path / "report.png")[0] == 1210
