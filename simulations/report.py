"""What a run did for each user, on text nobody trained on: as text, JSON and a picture.

Losses are nats per token on the test split. Four adapters answer every user: none (base), the
global one, the user's own, and, as the control, another user's own: personalization is real
where the own one wins and the other one does not.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedia3.errors import Corrupt

HEALTHY = (1e-3, 1e-1)  # L2 norm of a client's gradient before clipping
Choice = str  # "personal" or "global", what the validation split decided


@dataclass(frozen=True)
class UserResult:
    """One user in one seed."""

    user: str
    seed: int
    train_examples: int
    test_examples: int
    test_tokens: int
    base: float  # test losses, nats per token
    global_: float
    personal: float
    wrong_user: float  # under another user's personal adapter
    choice: Choice
    seen_in_pretraining: bool
    exact_base: float | None = None  # share of completions right to the last token
    exact_global: float | None = None
    exact_personal: float | None = None
    majority: float | None = None  # accuracy of the user's most common training label

    @property
    def served(self) -> float:
        """Test loss of what the user is served: the personal part behind its gate."""
        return self.personal if self.choice == "personal" else self.global_

    @property
    def exact_served(self) -> float | None:
        """Exact completions of what the user is served."""
        return self.exact_personal if self.choice == "personal" else self.exact_global


@dataclass(frozen=True)
class RunFacts:
    """What the run was, beside its users."""

    data: str
    base: str
    base_digest: str
    users: int
    too_small: Mapping[str, int]  # users with too little text and how many they have
    rounds: int
    cohort: int
    seeds: tuple[int, ...]
    adapter_params: int
    bytes_down: int  # payload of one client in one round
    bytes_up: int
    rejected: int  # updates the gate refused, all rounds and seeds
    grad_norm: tuple[float, float]  # smallest and largest mean norm of a client's gradient
    unhealthy: int  # clients' rounds whose mean norm lies outside HEALTHY
    client_rounds: int
    peak_memory: int  # bytes, the whole process
    seconds: float  # of this process; a resumed run counts from its resumption
    skipped_lines: int
    left_out: int  # texts without a token left to learn once cut to max_length


@dataclass(frozen=True)
class Report:
    """All users of all seeds."""

    facts: RunFacts
    users: tuple[UserResult, ...]

    def to_json(self) -> str:
        """Facts, summaries and every user's figures."""
        return json.dumps(
            {
                "facts": asdict(self.facts),
                "summary": {name: summary(group) for name, group in groups(self.users).items()},
                "users": [
                    {**asdict(u), "served": u.served, "exact_served": u.exact_served}
                    for u in self.users
                ],
            },
            indent=1,
        )

    def to_text(self) -> str:
        """For a terminal or a mail: facts, summaries, then every user."""
        parts = [_facts_text(self.facts)]
        parts += [_summary_text(name, summary(g)) for name, g in groups(self.users).items()]
        parts.append(_users_text(self.users))
        return "\n\n".join(parts) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """The report a run wrote.

        Raises:
            Corrupt: the file is not a report of this version.
        """
        try:
            data = json.loads((folder / "report.json").read_text())
            facts = data["facts"] | {
                name: tuple(data["facts"][name]) for name in ("seeds", "grad_norm")
            }
            derived = ("served", "exact_served")
            users = tuple(
                UserResult(**{k: v for k, v in row.items() if k not in derived})
                for row in data["users"]
            )
            return cls(RunFacts(**facts), users)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Corrupt(f"{folder / 'report.json'} is not a fedia3 report: {error}") from error


def groups(users: Sequence[UserResult]) -> dict[str, list[UserResult]]:
    """All users, and those the base's pretraining saw apart from those it did not."""
    seen = [u for u in users if u.seen_in_pretraining]
    unseen = [u for u in users if not u.seen_in_pretraining]
    if not seen or not unseen:
        return {"all users": list(users)}
    return {
        "all users": list(users),
        "users new to the base": unseen,
        "users the base's pretraining saw": seen,
    }


def summary(users: Sequence[UserResult]) -> dict[str, Any]:
    """Means, win rates and quantiles over the users of every seed."""
    loss = {
        name: [getattr(u, name) for u in users]
        for name in ("base", "global_", "personal", "served", "wrong_user")
    }
    facts: dict[str, Any] = {
        "users": len({u.user for u in users}),
        "mean_loss": {name.rstrip("_"): float(np.mean(values)) for name, values in loss.items()},
        "personal_better_than_base": _wins(users, lambda u: u.personal < u.base),
        "personal_better_than_global": _wins(users, lambda u: u.personal < u.global_),
        "wrong_user_better_than_global": _wins(users, lambda u: u.wrong_user < u.global_),
        "served_personal": _wins(users, lambda u: u.choice == "personal"),
        "served_better_than_global": _wins(users, lambda u: u.served < u.global_),
        "served_worse_than_global": _wins(users, lambda u: u.served > u.global_),
        "served_gain_over_base": _quantiles([gain(u.served, u.base) for u in users]),
        "served_gain_over_global": _quantiles([gain(u.served, u.global_) for u in users]),
        "by_seed": {
            seed: {
                name.rstrip("_"): float(
                    np.mean([getattr(u, name) for u in users if u.seed == seed])
                )
                for name in loss
            }
            for seed in sorted({u.seed for u in users})
        },
    }
    exact = [u for u in users if u.exact_base is not None]
    if exact:
        facts["exact"] = {
            name: float(np.mean([getattr(u, f"exact_{name}") for u in exact]))
            for name in ("base", "global", "personal", "served")
        }
    labelled = [u.majority for u in users if u.majority is not None]
    if labelled:
        facts["majority_label"] = float(np.mean(labelled))
    return facts


def gain(loss: float, over: float) -> float:
    """How much lower ``loss`` is than ``over``, as a share; where that is 0, nothing is gained."""
    return 1 - loss / over if over else 0.0


def _wins(users: Sequence[UserResult], won: Callable[[UserResult], bool]) -> dict[str, Any]:
    """How many users, of how many, as mean and spread over the seeds."""
    seeds = sorted({u.seed for u in users})
    counts = [sum(won(u) for u in users if u.seed == seed) for seed in seeds]
    of = max(sum(u.seed == seed for u in users) for seed in seeds)
    return {"mean": float(np.mean(counts)), "least": min(counts), "most": max(counts), "of": of}


def _quantiles(gains: Sequence[float]) -> dict[str, float]:
    p10, p50, p90 = np.percentile(gains, [10, 50, 90])
    return {"p10": float(p10), "p50": float(p50), "p90": float(p90), "worst": min(gains)}


def _facts_text(facts: RunFacts) -> str:
    low, high = facts.grad_norm
    lines = [
        f"fedia3 report — {facts.data} on base {facts.base} ({facts.base_digest[:12]})",
        f"  {facts.users} users, {facts.rounds} rounds of {facts.cohort} clients, "
        f"seeds {', '.join(map(str, facts.seeds))}",
        f"  one adapter: {facts.adapter_params:,} scales; payload of a client's round: "
        f"{facts.bytes_down / 1000:.1f} kB down, {facts.bytes_up / 1000:.1f} kB up; "
        f"{facts.rejected} updates rejected",
        f"  clients' gradient norms {low:.1e} to {high:.1e}, {facts.unhealthy} of "
        f"{facts.client_rounds} outside the healthy {HEALTHY[0]:.0e} to {HEALTHY[1]:.0e}; "
        f"peak memory {facts.peak_memory / 1e6:.0f} MB; {facts.seconds:.0f} s",
    ]
    if facts.too_small:
        lines.append(
            f"  {len(facts.too_small)} more have too little text to train and test on and are "
            f"served the global adapter: {_some(facts.too_small)}"
        )
    if facts.skipped_lines:
        lines.append(f"  {facts.skipped_lines} malformed lines were skipped")
    if facts.left_out:
        lines.append(
            f"  {facts.left_out} texts had nothing left to learn once cut, and are left out"
        )
    return "\n".join(lines)


def _some(users: Mapping[str, int]) -> str:
    shown = ", ".join(f"{user} ({count})" for user, count in list(users.items())[:8])
    return shown if len(users) <= 8 else f"{shown} …"


def _summary_text(name: str, facts: Mapping[str, Any]) -> str:
    mean, over_base = facts["mean_loss"], facts["served_gain_over_base"]
    over_global = facts["served_gain_over_global"]
    lines = [
        f"{name} ({facts['users']}), held-out loss in nats per token:",
        f"  base {mean['base']:.3f}  global {mean['global']:.3f}  personal "
        f"{mean['personal']:.3f}  served {mean['served']:.3f}  another user's "
        f"{mean['wrong_user']:.3f}",
        f"  personal beats base for {_share(facts['personal_better_than_base'])}, "
        f"beats global for {_share(facts['personal_better_than_global'])}; "
        f"another user's beats global for {_share(facts['wrong_user_better_than_global'])}",
        f"  the gate serves personal to {_share(facts['served_personal'])}; what is served beats "
        f"global for {_share(facts['served_better_than_global'])}, is worse for "
        f"{_share(facts['served_worse_than_global'])}",
        f"  served against base:   p10 {over_base['p10']:+.1%}  p50 {over_base['p50']:+.1%}  "
        f"p90 {over_base['p90']:+.1%}  worst user {over_base['worst']:+.1%}",
        f"  served against global: p10 {over_global['p10']:+.1%}  p50 {over_global['p50']:+.1%}  "
        f"p90 {over_global['p90']:+.1%}  worst user {over_global['worst']:+.1%}",
    ]
    if "exact" in facts:
        lines.append("  exact completions: " + _exact_text(facts))
    return "\n".join(lines)


def _exact_text(facts: Mapping[str, Any]) -> str:
    shown = "  ".join(f"{name} {share:.1%}" for name, share in facts["exact"].items())
    if "majority_label" in facts:
        shown += f"  (each user's most common training label: {facts['majority_label']:.1%})"
    return shown


def _share(count: Mapping[str, float]) -> str:
    spread = "" if count["least"] == count["most"] else f" ({count['least']}–{count['most']})"
    return f"{count['mean']:.1f}".removesuffix(".0") + f"{spread} of {count['of']}"


def _users_text(users: Sequence[UserResult]) -> str:
    """Every user, the best served first; means over the seeds."""
    by_user: dict[str, list[UserResult]] = {}
    for u in users:
        by_user.setdefault(u.user, []).append(u)
    width = min(32, max(map(len, by_user)))
    head = f"{'user':<{width}}  texts   base  global  personal  another's  served"
    rows = []
    for name, results in by_user.items():
        loss = {
            key: float(np.mean([getattr(r, key) for r in results]))
            for key in ("base", "global_", "personal", "wrong_user", "served")
        }
        share = sum(r.choice == "personal" for r in results)
        served = "personal" if share == len(results) else "global" if share == 0 else "mixed"
        seen = " *" if results[0].seen_in_pretraining else ""
        rows.append(
            (
                gain(loss["served"], loss["base"]),
                f"{_fitted(name, width)}  {results[0].train_examples:5d}  {loss['base']:5.3f}  "
                f"{loss['global_']:6.3f}  {loss['personal']:8.3f}  {loss['wrong_user']:9.3f}  "
                f"{served} {gain(loss['served'], loss['base']):+.1%}{seen}",
            )
        )
    rows.sort(key=lambda row: -row[0])
    note = (
        ["* the base's pretraining saw this user"]
        if any(u.seen_in_pretraining for u in users)
        else []
    )
    return "\n".join([head, *(line for _, line in rows), *note])


def _fitted(name: str, width: int) -> str:
    return name.ljust(width) if len(name) <= width else name[: width - 1] + "…"


def write_picture(report: Report, path: Path) -> None:
    """Two panels: each user's losses, and each user's gain against the text they gave."""
    from matplotlib.backends.backend_agg import (  # noqa: PLC0415  # half a second of import
        FigureCanvasAgg,
    )
    from matplotlib.figure import Figure  # noqa: PLC0415  # as above

    names = sorted({u.user for u in report.users})
    mean = {
        name: {
            key: float(np.mean([getattr(u, key) for u in report.users if u.user == name]))
            for key in ("base", "global_", "personal", "wrong_user", "served", "train_examples")
        }
        for name in names
    }
    names.sort(key=lambda n: gain(mean[n]["served"], mean[n]["base"]))
    gains = {
        key: [100 * gain(mean[n][key], mean[n]["base"]) for n in names]
        for key in ("global_", "personal", "wrong_user", "served")
    }
    figure = Figure(figsize=(11, max(4.0, min(16.0, 1.5 + 0.17 * len(names)))), dpi=110)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    rows = range(len(names))
    for key, label, colour, marker in (
        ("wrong_user", "another user's adapter", "#b8b8b8", "x"),
        ("global_", "global", "#4477aa", "o"),
        ("personal", "personal", "#cc6633", "D"),
    ):
        left.scatter(gains[key], rows, s=18, c=colour, marker=marker, label=label, zorder=3)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(
        list(rows),
        [_short(n) for n in names] if len(names) <= 60 else [""] * len(names),
        parse_math=False,  # a user may be called "$_$"
    )
    left.tick_params(axis="y", labelsize=7, length=0)
    left.set_xlabel("lower held-out loss than the base model, %")
    left.set_title(f"{len(names)} users, one row each", fontsize=10)
    left.grid(axis="x", alpha=0.3)
    right.scatter(
        [mean[n]["train_examples"] for n in names],
        [100 * gain(mean[n]["served"], mean[n]["global_"]) for n in names],
        s=18,
        c="#cc6633",
    )
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xlabel("texts trained on")
    right.set_ylabel("served: lower loss than the global adapter, %")
    right.set_title("gain by amount of text", fontsize=10)
    right.grid(alpha=0.3)
    with warnings.catch_warnings():
        # The font lacks some scripts: those names are boxes here, and whole in report.txt.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="lower center", ncols=3)
        figure.tight_layout(
            rect=(0, 0.3 / figure.get_figheight(), 1, 1)
        )  # a line of the legend below
        figure.savefig(path)


def _short(name: str) -> str:
    return _fitted(name, 28).strip()


def write(report: Report, folder: Path) -> None:
    """``report.txt``, ``report.png`` and, last and at once, ``report.json``: it says finished."""
    (folder / "report.txt").write_text(report.to_text())
    write_picture(report, folder / "report.png")
    draft = folder / "report.json.draft"
    draft.write_text(report.to_json())
    draft.replace(folder / "report.json")
