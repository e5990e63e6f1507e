"""Latency of the ONNX engine at half the MACs: the pruned model, the whole one, and what Torch-Pruning leaves.

All three are built by `fxopt.compile` with the exact passes, one thread each: the idle threads of one session spin, and
would slow the other's turn. Torch-Pruning gets the same rounding and budget: its ratio of channels, for global pruning
by the magnitude of groups, is searched by bisection for the MACs.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.networks import Network, load_network
from benchmarks.prune_channels.peer import classifiers
from benchmarks.prune_speed.part import Found, Size, found, met
from benchmarks.timing import interleave

NETWORKS = ("torchvision:resnet50", "torchvision:mobilenet_v2")
BAR = 1.6
MACS = 0.5
ROUND_TO = 8

_BACKEND = "onnx(num_threads=1)"
_SEARCHES = 8
_MOST = 0.9
"""Of a layer's channels, what Torch-Pruning may remove: as fxopt does, so that no layer collapses."""
_COLUMNS = ("network", "engine", "MACs left", "parameters left", "ms", "times as fast", "bar", "met")


def measure_all(names: Sequence[str], arguments: argparse.Namespace) -> Found:
    """Three rows per network."""
    rows, networks, missed = [], [], []
    for name in names:
        result = measure(load_network(name, size=arguments.size), rounds=arguments.rounds)
        networks.append({"network": name, "bar": BAR, **result})
        faster = result["fxopt"]["speedup"]
        if faster.median < BAR:
            missed.append(f"{name}: {faster.median:.2f} times as fast, bar {BAR}")
        for engine, each in result.items():
            if "failure" in each:
                rows.append([name, engine, each["failure"], *["-"] * (len(_COLUMNS) - 3)])
                continue
            judged = engine == "fxopt"
            rows.append(
                [
                    name,
                    engine,
                    f"{each['macs']:.3f}",
                    f"{each['params']:.3f}",
                    each["seconds"].text(2, 1e3),
                    each["speedup"].text(2),
                    f"{BAR}" if judged else "",
                    met(faster.median >= BAR) if judged else "",
                ]
            )
    notes = [
        f"fxopt: PruneChannels(macs={MACS}, round_to={ROUND_TO}), then the exact passes; one thread",
        "times as fast: the whole engine's time over this one's, median of the rounds' ratios with quartiles",
    ]
    return found("Speed of the pruned engine", _COLUMNS, rows, notes, networks, missed)


def measure(network: Network, *, rounds: int) -> dict[str, dict[str, Any]]:
    """By engine ("whole", "fxopt", "Torch-Pruning"): shares of the MACs and parameters, seconds, and the speed-up."""
    import fxopt
    from fxopt.passes import PruneChannels

    whole = Size.of(network.model, network)
    pruning = PruneChannels(macs=MACS, round_to=ROUND_TO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruned = fxopt.optimize(network.model, network.inputs, [pruning])
        engines = {
            "whole": (whole, _engine(network.model, network, ["default"])),
            "fxopt": (Size.of(pruned.module, network), _engine(network.model, network, [pruning, "default"])),
        }
        try:
            peer = prune_by_peer(network)
            engines["Torch-Pruning"] = (Size.of(peer, network), _engine(peer, network, ["default"]))
            failure = None
        except Exception as error:  # noqa: BLE001 (a peer that fails on a network is a result)
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
    timings = interleave({name: call for name, (_, call) in engines.items()}, rounds=rounds, warmup=3)
    results: dict[str, dict[str, Any]] = {}
    for name, (size, _) in engines.items():
        macs, params = size.over(whole)
        seconds, speedup = timings.per_call(name), timings.ratio("whole", name)
        results[name] = {"macs": macs, "params": params, "seconds": seconds, "speedup": speedup}
    return results if failure is None else {**results, "Torch-Pruning": {"failure": failure}}


def prune_by_peer(network: Network) -> nn.Module:
    """What Torch-Pruning makes of a copy of the model, of the searched ratios the one whose MACs are nearest."""
    import torch_pruning as tp

    whole = Size.of(network.model, network)
    with torch.no_grad():
        outputs = network.model(*network.inputs)

    def prune(ratio: float) -> tuple[float, nn.Module]:
        own = network._replace(model=copy.deepcopy(network.model))
        pruner = tp.pruner.BasePruner(
            own.model,
            own.inputs,
            importance=tp.importance.GroupMagnitudeImportance(),
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=_MOST,
            round_to=ROUND_TO,
            ignored_layers=classifiers(own.model, outputs),
        )
        pruner.step()
        return Size.of(own.model, own).over(whole)[0], own.model

    low, high = 0.0, _MOST
    best: tuple[float, nn.Module] | None = None
    for _ in range(_SEARCHES):
        ratio = (low + high) / 2
        macs, model = prune(ratio)
        low, high = (ratio, high) if macs > MACS else (low, ratio)
        if best is None or abs(macs - MACS) < abs(best[0] - MACS):
            best = macs, model
    assert best is not None
    return best[1].eval()


def _engine(model: nn.Module, network: Network, passes: Sequence[Any]) -> Callable[[], object]:
    import fxopt

    compiled = fxopt.compile(model, network.inputs, passes=passes, backend=_BACKEND, on_no_match="ignore")
    return lambda: compiled(*network.inputs)
