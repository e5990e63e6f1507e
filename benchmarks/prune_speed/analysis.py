"""Time of finding the channels of a model, next to the dependency graph of Torch-Pruning.

One process per network; what is compared takes turns there. `find_channels` starts from a captured program, whose
shapes capture has recorded. The dependency graph starts from the model and runs it once, so the whole of capture and
plan, which runs it four times to prove the captured graph, is given too.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.networks import load_network
from benchmarks.prune_speed.child import in_child
from benchmarks.prune_speed.part import Found, found, met
from benchmarks.timing import Spread, interleave

NETWORKS = ("torchvision:resnet50", "torchvision:densenet201", "torchvision:swin_t")
BARS = {"torchvision:resnet50": 1.0}
BAR = 5.0
"""Seconds of `find_channels`, for networks that have no bar of their own."""

ROUNDS = 3
_COLUMNS = ("network", "nodes", "groups", "find_channels", "capture and plan", "Torch-Pruning", "bar", "met")


def measure_all(names: Sequence[str], arguments: argparse.Namespace) -> Found:
    """One row per network."""
    rows, networks, missed = [], [], []
    for name in names:
        result = in_child("benchmarks.prune_speed.analysis:measure", name=name, size=arguments.size)
        bar = BARS.get(name, BAR)
        networks.append({"network": name, "bar": bar, **result})
        if "failure" in result:
            missed.append(f"{name}: {result['failure']}")
            rows.append([name, *["failed"] * (len(_COLUMNS) - 1)])
            continue
        seconds = Spread(*result["find_channels"])
        if seconds.median > bar:
            missed.append(f"{name}: {seconds.median:.2f} s, bar {bar:g} s")
        peer = result["torch_pruning"]
        rows.append(
            [
                name,
                str(result["nodes"]),
                str(result["groups"]),
                seconds.text(2),
                Spread(*result["capture_and_plan"]).text(2),
                peer if isinstance(peer, str) else Spread(*peer).text(2),
                f"{bar:g}",
                met(seconds.median <= bar),
            ]
        )
    notes = [
        f"seconds, median of {ROUNDS} interleaved rounds after one more, with quartiles; the bar is for find_channels",
        "Torch-Pruning: DependencyGraph().build_dependency; plan: of PruneChannels(macs=0.5)",
    ]
    return found("Time of the channel analysis", _COLUMNS, rows, notes, networks, missed)


def measure(name: str, size: int | None) -> dict[str, Any]:
    """The measurement, in a process of its own.

    Args:
        name: of the network.
        size: of its inputs, as for `load_network`.
    """
    import fxopt
    from fxopt.analysis.channels import find_channels
    from fxopt.passes import PruneChannels
    from fxopt.passes_base import Plan

    network = load_network(name, size=size)
    program = fxopt.capture(network.model, network.inputs)

    def whole() -> Plan:
        return Plan.of(PruneChannels(macs=0.5), fxopt.capture(network.model, network.inputs))

    def peer() -> object:
        import torch_pruning as tp

        return tp.DependencyGraph().build_dependency(network.model, example_inputs=network.inputs)

    candidates: dict[str, Callable[[], object]] = {
        "find_channels": lambda: find_channels(program),
        "capture_and_plan": whole,
    }
    reason = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer names parameters that it leaves alone
        try:
            peer()
            candidates["torch_pruning"] = peer
        except Exception as error:  # noqa: BLE001 (a peer that fails on a network is a result)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        timings = interleave(candidates, rounds=ROUNDS, warmup=1)
    return {
        "nodes": len(program.nodes),
        "groups": len(find_channels(program).groups),
        "torch_pruning": reason,
        **{each: list(timings.per_call(each)) for each in candidates},
    }
