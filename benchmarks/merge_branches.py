"""merge_branches against timm's own `reparameterize_model`: convolutions that run, error, latency.

timm merges the branches of networks whose classes know how; the pass works on the graph. On the networks of both, the
counts and errors should agree. fxopt runs `fold_batch_norm` and `merge_branches`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.comparison import (
    CONV_OPS,
    NORM_OPS,
    Comparison,
    add_network_arguments,
    compare,
    count_text,
    error_text,
    seconds_text,
    spread_text,
)
from benchmarks.networks import Network, load_network
from benchmarks.results import RESULTS, Table, save

BAR = 1e-4
PASSES = ("simplify", "fold_batch_norm", "merge_branches")
NETWORKS = (
    "timm:repvgg_a0",
    "timm:mobileone_s0",
    "timm:fastvit_t8",
    "timm:repvit_m1",
    "timm:repghostnet_050",
    "torchvision:resnet18",
    "torchvision:densenet121",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_network_arguments(parser, NETWORKS)


def run(arguments: argparse.Namespace) -> int:
    """Runs all networks.

    Returns:
        0 if fxopt stayed within the bar and ran no more convolutions than timm's own merging everywhere, else 1.
    """
    rows, results, bad = [], [], []
    for name in arguments.networks:
        network = load_network(name, size=arguments.size)
        programs: dict[str, Any] = {}
        compared = compare(network, _transforms(network, programs), rounds=arguments.rounds)
        skips = [str(skip) for each in programs["fxopt"].report.passes for skip in each.skips] if programs else []
        bad += _problems(compared)
        rows += _rows(compared)
        results.append({**compared.to_json(), "skips": skips})
    notes = [
        f"fxopt: {', '.join(PASSES)}; bar of its error against the network {BAR:.0e}",
        "timm: reparameterize_model, on a copy; it leaves batch norms outside of branches",
        "latency: eager, over the network's own, median of interleaved rounds with quartiles",
        *bad,
    ]
    columns = ("network", "version", "convolutions", "batch norms", "error", "seconds", "latency / model", "failure")
    save(
        arguments.out or RESULTS / "merge_branches.json",
        Table("merge_branches", columns, rows, notes),
        {"bar": BAR, "networks": results},
    )
    return int(bool(bad))


def _transforms(network: Network, programs: dict[str, Any]) -> dict[str, Callable[[], nn.Module]]:
    import fxopt

    def ours() -> nn.Module:
        programs["fxopt"] = fxopt.optimize(network.model, network.inputs, list(PASSES), on_no_match="ignore")
        module: nn.Module = programs["fxopt"].module
        return module

    def timm() -> nn.Module:
        from timm.utils.model import reparameterize_model

        module: nn.Module = reparameterize_model(copy.deepcopy(network.model))
        return module

    return {"fxopt": ours, "timm": timm}


def _problems(compared: Comparison) -> list[str]:
    ours, theirs, name = compared.versions["fxopt"], compared.versions["timm"], compared.network.name
    if ours.error is None or ours.error > BAR:
        return [f"{name}: fxopt's error is {error_text(ours.error)} ({ours.failure or 'over the bar'})"]
    count, peer = ours.count(CONV_OPS), theirs.count(CONV_OPS)
    if count is not None and peer is not None and count > peer:
        return [f"{name}: fxopt runs {count} convolutions, timm's own merging {peer}"]
    return []


def _rows(compared: Comparison) -> list[list[str]]:
    return [
        [
            compared.network.name,
            name,
            count_text(version.count(CONV_OPS)),
            count_text(version.count(NORM_OPS)),
            error_text(version.error),
            seconds_text(version.seconds),
            spread_text(compared.speed(name)),
            version.failure or "",
        ]
        for name, version in compared.versions.items()
    ]
