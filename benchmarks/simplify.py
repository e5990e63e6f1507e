"""simplify: nodes before and after, error, latency."""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn

from benchmarks.comparison import add_network_arguments, compare, error_text, seconds_text, spread_text
from benchmarks.networks import Network, load_network
from benchmarks.results import RESULTS, Table, save

BAR = 1e-4
NETWORKS = (
    "torchvision:resnet18",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:convnext_tiny",
    "torchvision:vit_b_32",
    "torchvision:swin_t",
    "timm:efficientnet_lite0",
    "timm:ghostnet_050",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_network_arguments(parser, NETWORKS)


def run(arguments: argparse.Namespace) -> int:
    """Runs all networks.

    Returns:
        0 if every error is within the bar, else 1.
    """
    rows, results, bad = [], [], []
    for name in arguments.networks:
        network = load_network(name, size=arguments.size)
        captured, simplified = _programs(network)
        compared = compare(
            network, {"captured": _module(captured), "simplify": _module(simplified)}, rounds=arguments.rounds
        )
        error = compared.versions["simplify"].error
        if error is None or error > BAR:
            bad.append(f"{name}: error {error_text(error)}")
        (report,) = simplified.report.passes
        before, after = len(captured.nodes), len(simplified.nodes)
        rows.append(
            [
                name,
                captured.frontend,
                str(before),
                str(after),
                str(len(report.rewrites)),
                error_text(error),
                seconds_text(report.seconds),
                spread_text(compared.timings.ratio("simplify", "captured")),
            ]
        )
        results.append({**compared.to_json(), "nodes_before": before, "nodes_after": after, "pass": report.to_json()})
    notes = ["latency: eager, over the captured program's, median of interleaved rounds with quartiles", *bad]
    columns = ("network", "frontend", "nodes", "after", "rewrites", "error", "pass s", "latency / captured")
    save(
        arguments.out or RESULTS / "simplify.json",
        Table("simplify", columns, rows, notes),
        {"bar": BAR, "networks": results},
    )
    return int(bool(bad))


def _programs(network: Network) -> tuple[Any, Any]:
    import fxopt

    captured = fxopt.capture(network.model, network.inputs)
    return captured, fxopt.optimize(network.model, network.inputs, ["simplify"], on_no_match="ignore")


def _module(program: Any) -> Any:
    def module() -> nn.Module:
        found: nn.Module = program.module
        return found

    return module
