"""How near to its budget prune_channels comes: what is left of the MACs and parameters, as torch counts them.

MACs are counted by torch's flop counter on one forward of `program.module`, over the same count on the model: none of
fxopt's own arithmetic, by which the budget was met, is in the number.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

from benchmarks.networks import Network, load_network
from benchmarks.prune_speed.part import Found, Size, found, met

NETWORKS = (
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:densenet121",
    "torchvision:swin_t",
    "torchvision:efficientnet_b0",
)
BAR = 0.02
LEAST_GROUP = 0.1
BUDGETS: tuple[dict[str, Any], ...] = (
    *({measure: share} for measure in ("macs", "params") for share in (0.7, 0.5, 0.3)),
    {"macs": 0.5, "round_to": 8},
)

_COLUMNS = ("network", "budget", "MACs left", "parameters left", "off by", "smallest group", "seconds", "met")


def measure_all(names: Sequence[str], arguments: argparse.Namespace) -> Found:
    """One row per network and budget."""
    rows, networks, missed = [], [], []
    for name in names:
        results = measure(load_network(name, size=arguments.size))
        networks.append({"network": name, "bar": BAR, "budgets": results})
        for result in results:
            what = ", ".join(f"{key}={value}" for key, value in result["budget"].items())
            if "failure" in result:
                missed.append(f"{name}, {what}: {result['failure']}")
                rows.append([name, what, *["failed"] * (len(_COLUMNS) - 2)])
                continue
            # the group itself is measured in whole channels
            good = abs(result["off_by"]) <= BAR and result["smallest_group"] >= LEAST_GROUP
            if not good:
                smallest = f"smallest group {result['smallest_group']:.3f}"
                missed.append(f"{name}, {what}: off by {result['off_by']:+.4f}, {smallest}")
            rows.append(
                [
                    name,
                    what,
                    f"{result['macs']:.3f}",
                    f"{result['params']:.3f}",
                    f"{result['off_by']:+.4f}",
                    f"{result['smallest_group']:.3f}",
                    f"{result['seconds']:.2f}",
                    met(good),
                ]
            )
    notes = [
        f"shares of the model's own; off by: what is left less the budget, bar {BAR} either way",
        f"smallest group: share of its channels that are left, bar {LEAST_GROUP}; seconds: of the pass",
    ]
    return found("Budgets of prune_channels", _COLUMNS, rows, notes, networks, missed)


def measure(network: Network) -> list[dict[str, Any]]:
    """One entry per budget: shares of the MACs and parameters left, how far off, and the smallest group's share."""
    import fxopt
    from fxopt.errors import FxoptError
    from fxopt.manager import PassManager
    from fxopt.passes import PruneChannels

    whole = Size.of(network.model, network)
    program = fxopt.capture(network.model, network.inputs)
    results: list[dict[str, Any]] = []
    for budget in BUDGETS:
        (measure_, target), *_ = budget.items()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pruned = PassManager([PruneChannels(**budget)], verify="structure").run(program)
        except FxoptError as error:
            results.append({"budget": budget, "failure": f"{type(error).__name__}: {error}"})
            continue
        left = dict(zip(("macs", "params"), Size.of(pruned.module, network).over(whole), strict=True))
        report = pruned.report.passes[-1]
        groups = [len(rewrite.params["kept"]) / rewrite.params["size"] for rewrite in report.rewrites]
        results.append(
            {
                "budget": budget,
                **left,
                "off_by": left[measure_] - target,
                "smallest_group": min(groups, default=1.0),
                "seconds": round(report.seconds, 2),
            }
        )
    return results
