"""fold_batch_norm against the folding that comes with torch: what is left, error, time of the pass, latency.

Peers: `torch.fx.experimental.optimization.fuse` and, while torch has it, `torch.ao.quantization.quantize_fx.fuse_fx`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.batch_norms import foldable
from benchmarks.comparison import (
    NORM_OPS,
    Comparison,
    add_network_arguments,
    compare,
    count_text,
    error_text,
    seconds_text,
    spread_text,
)
from benchmarks.networks import TRICKY, Network, load_network
from benchmarks.results import RESULTS, Table, save

BAR = 1e-4
NETWORKS = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:densenet121",
    "torchvision:mobilenet_v2",
    "timm:repvgg_a0",
    "timm:mobileone_s0",
    *TRICKY,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_network_arguments(parser, NETWORKS)


def run(arguments: argparse.Namespace) -> int:
    """Runs all networks.

    Returns:
        0 if fxopt stayed within the bar and left nothing foldable on every network, else 1.
    """
    rows, results, bad = [], [], []
    for name in arguments.networks:
        network = load_network(name, size=arguments.size)
        programs: dict[str, Any] = {}
        compared = compare(network, _transforms(network, programs), rounds=arguments.rounds)
        left = foldable(programs["fxopt"]) if programs else []
        skips = [str(skip) for each in programs["fxopt"].report.passes for skip in each.skips] if programs else []
        error = compared.versions["fxopt"].error
        if error is None or error > BAR or left:
            bad.append(f"{name}: error {error_text(error)}, foldable left: {', '.join(left) or 'none'}")
        rows += _rows(compared)
        results.append({**compared.to_json(), "foldable_left": left, "skips": skips})
    notes = [
        "error is max|a - b| / max|b| against the network, with random statistics; bar " + f"{BAR:.0e}",
        "seconds: from the caller's module to the new one; fxopt's include capture and the proof",
        "latency: eager, over the network's own, median of interleaved rounds with quartiles",
        *bad,
    ]
    columns = ("network", "version", "batch norms run", "error", "seconds", "latency / model", "failure")
    table = Table("fold_batch_norm", columns, rows, notes)
    save(arguments.out or RESULTS / "fold_batch_norm.json", table, {"bar": BAR, "networks": results})
    return int(bool(bad))


def _transforms(network: Network, programs: dict[str, Any]) -> dict[str, Callable[[], nn.Module]]:
    import fxopt

    def ours() -> nn.Module:
        program = fxopt.optimize(network.model, network.inputs, ["fold_batch_norm"], on_no_match="ignore")
        programs["fxopt"] = program
        return program.module

    def fuse() -> nn.Module:
        from torch.fx.experimental.optimization import fuse

        return fuse(network.model)

    def fuse_fx() -> nn.Module:
        from torch.ao.quantization.quantize_fx import fuse_fx

        module: nn.Module = fuse_fx(copy.deepcopy(network.model))
        return module

    transforms: dict[str, Callable[[], nn.Module]] = {"fxopt": ours, "torch.fx fuse": fuse}
    if importlib.util.find_spec("torch.ao.quantization.quantize_fx") is not None:
        transforms["torch.ao fuse_fx"] = fuse_fx
    return transforms


def _rows(compared: Comparison) -> list[list[str]]:
    return [
        [
            compared.network.name,
            name,
            count_text(version.count(NORM_OPS)),
            error_text(version.error),
            seconds_text(version.seconds),
            spread_text(compared.speed(name)),
            version.failure or "",
        ]
        for name, version in compared.versions.items()
    ]
