"""How long a round of a real deployment takes when training costs nothing.

A coordinator (`fedia3 coordinator serve`) and N devices (agent, flower-supernode, executor, and the
failure drill's trainer, which answers at once) run as real processes on this machine. What is timed
is from one committed round to the next, by the registry's own times. The first rounds, in which
devices still join, are left out, and so are those between two Flower runs. Beside it stands what
the coordinator's parts took of a processor, for each device and round.

    python benchmarks/deployed_round.py --devices 2 20 --rounds 15 --repeats 3
"""

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "deployment"))
from harness import RunningCoordinator, cpu_s, light_deployment

from fedia3.coordinator.registry import Registry

WARM_UP = 3  # rounds
JOIN_S = 300.0


Costs = dict[str, float]  # by part of the coordinator, processor seconds for a device and round


def measure(devices: int, rounds: int) -> tuple[list[float], Costs]:
    """Seconds of each round with all devices in it, and what they cost."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        users = [f"user{number}" for number in range(devices)]
        made = light_deployment(
            Path(folder), users, min_clients=devices, deadline_s=60.0, rounds_per_run=rounds + 50
        )
        try:
            for device in made.devices:
                device.run_light()
            (coordinator,) = made.coordinators
            coordinator.wait_for_round(WARM_UP, within_s=JOIN_S)
            parts = coordinator.folder / "parts.json"
            before, first = cpu_s(parts), coordinator.round_num()
            coordinator.wait_for_round(first + rounds, within_s=JOIN_S + 30.0 * rounds)
            after, asked = cpu_s(parts), devices * (coordinator.round_num() - first)
            costs = {part: (after[part] - before[part]) / asked for part in after}
            return times(coordinator, devices)[-rounds:], costs
        finally:
            made.close()


def times(coordinator: RunningCoordinator, devices: int) -> list[float]:
    """Seconds from each commit to the next, where every device's update is in the later."""
    with Registry.open(coordinator.folder / "registry") as registry:
        committed = registry.rounds()[WARM_UP:]
    return [
        (after.committed_at - before.committed_at).total_seconds()
        for before, after in pairwise(committed)
        if after.metrics["accepted"] == devices
    ]


def main() -> None:
    """A line for each number of devices."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 20])
    parser.add_argument("--rounds", type=int, default=15, help="counted in each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for devices in args.devices:
        began, seconds, costs = time.monotonic(), list[float](), list[Costs]()
        for _ in range(args.repeats):
            taken, cost = measure(devices, args.rounds)
            seconds += taken
            costs.append(cost)
        by_part = {part: statistics.median(c[part] for c in costs) * 1000 for part in costs[0]}
        print(
            f"{devices:>3} devices: {statistics.median(seconds):.2f} s a round, median of "
            f"{len(seconds)} (p10 {statistics.quantiles(seconds, n=10)[0]:.2f}, p90 "
            f"{statistics.quantiles(seconds, n=10)[-1]:.2f}, {min(seconds):.2f} to "
            f"{max(seconds):.2f}); {args.repeats} repeats in {time.monotonic() - began:.0f} s; "
            "processor ms for a device and round: "
            + ", ".join(f"{part} {used:.0f}" for part, used in by_part.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
