import re
from dataclasses import replace

import numpy as np
import pytest

from fedia3.adapters.schema import Schema, Target
from fedia3.adapters.update import TrainingPlan, TrainRequest
from fedia3.coordinator.gate import Admitted, GateLimits, Rejected, Reply, admit
from fedia3.errors import BadSetting

SCHEMA = Schema("0" * 64, (Target("layer", "k", 2),))
LIMITS = GateLimits(max_norm=5.0, max_examples=100)
REQUEST = TrainRequest("alice", 3, 0, np.ones(2, np.float32), SCHEMA.digest, TrainingPlan())
GOOD = Reply("alice", 3, SCHEMA.digest, np.array([3, 4], np.float32), 10, {"loss_mean": 1.5})


def judged(reply: Reply, **options: bool) -> Admitted | Rejected:
    """The gate's verdict on a reply to REQUEST."""
    return admit(reply, REQUEST, SCHEMA, LIMITS, **options)


def test_a_sound_reply_is_admitted_with_its_norm():
    """The delta [3, 4] has norm 5, which the limit 5 still allows."""
    verdict = judged(GOOD)
    assert isinstance(verdict, Admitted)
    assert verdict.norm == 5.0
    assert verdict.note == ""
    assert verdict.update.num_examples == 10
    assert verdict.update.metrics == {"loss_mean": 1.5}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"delta": np.array([np.nan, np.inf], np.float32)}, "2 of 2 values are not finite"),
        ({"delta": np.ones(3, np.float32)}, r"2 values, got float32 of shape \(3,\)"),
        ({"delta": np.ones((1, 2), np.float32)}, r"got float32 of shape \(1, 2\)"),
        ({"delta": np.ones(2)}, "got float64"),
        ({"delta": np.ones(2, ">f4")}, "got >f4"),
        ({"delta": [1.0, 2.0]}, "expected a float32 vector, got list"),
        ({"delta": None}, "expected a float32 vector, got NoneType"),
        ({"delta": np.array([6, 8], np.float32)}, "norm 10 is above the limit 5"),
        ({"delta": np.full(2, 3e38, np.float32)}, "is above the limit 5"),
        ({"delta": np.array([-1, -1], np.float32)}, "could not be stored: every scale is zero"),
        ({"num_examples": 0}, "positive whole number of examples, got 0"),
        ({"num_examples": -5}, "got -5"),
        ({"num_examples": 2.5}, "got 2.5"),
        ({"num_examples": float("nan")}, "got nan"),
        ({"num_examples": True}, "got True"),
        ({"num_examples": 10**5000}, "got a value of type int"),
        ({"num_examples": None}, "got None"),
        ({"round_num": 2}, "for round 3, got one for 2"),
        ({"round_num": "3"}, "for round 3, got one for '3'"),
        ({"schema_digest": "f" * 64}, "expected schema"),
        ({"schema_digest": None}, "expected schema .* got None"),
        ({"failure": "out of memory"}, "^out of memory$"),
    ],
)
def test_a_bad_reply_is_rejected_with_its_reason(change, reason):
    """One thing wrong with a reply is enough, and the verdict names it."""
    verdict = judged(replace(GOOD, **change))
    assert isinstance(verdict, Rejected)
    assert re.search(reason, verdict.reason)


def test_a_client_that_was_not_asked_is_rejected():
    """No request, no contribution."""
    verdict = admit(GOOD, None, SCHEMA, LIMITS)
    assert verdict == Rejected("this client was not asked in this round")


def test_a_second_answer_is_rejected():
    """The first answer stands, even if the second is sound."""
    verdict = judged(GOOD, answered=True)
    assert isinstance(verdict, Rejected)
    assert "its first answer stands" in verdict.reason


def test_a_claim_above_the_cap_counts_as_the_cap():
    """10**12 examples weigh as much as 100, and the note says so."""
    verdict = judged(replace(GOOD, num_examples=10**12))
    assert isinstance(verdict, Admitted)
    assert verdict.update.num_examples == 100
    assert verdict.note == "claims 1000000000000 examples, counted as 100: the limit"


def test_only_finite_numbers_with_plain_names_are_kept_of_the_metrics():
    """NaN, lists, text, huge integers and names beyond ASCII are dropped, the rest stays."""
    metrics = {
        "loss": 2, "nan": float("nan"), "list": [1.0], "text": "x", "huge": 10**400,
        "flag": True, "ümlaut": 1.0, "": 1.0, "a\nb": 1.0, 5: 1.0,
    }  # fmt: skip
    verdict = judged(replace(GOOD, metrics=metrics))
    assert isinstance(verdict, Admitted)
    assert verdict.update.metrics == {"loss": 2.0}


def test_a_client_cannot_report_metrics_without_end():
    """Of a thousand metrics the first sixteen by name are kept."""
    verdict = judged(replace(GOOD, metrics={f"m{i:03}": 1.0 for i in range(1000)}))
    assert isinstance(verdict, Admitted)
    assert list(verdict.update.metrics) == [f"m{i:03}" for i in range(16)]


@pytest.mark.parametrize("limits", [{"max_norm": 0.0}, {"max_norm": np.nan}, {"max_examples": 0}])
def test_limits_that_admit_nobody_are_refused(limits):
    """A limit of zero is a mistake in the settings."""
    with pytest.raises(BadSetting, match=next(iter(limits))):
        GateLimits(**limits)
