"""The table, and whether the bars are met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quantize.engines import FLOAT, FXOPT
from benchmarks.results import Table, number_text, shorten, verdict_lines
from benchmarks.timing import Spread
from fxopt.target import Target

__all__ = ["quantize_table", "sign_test", "verdicts"]

ACCURACY_DROP = 0.002
"""Of the accuracy of the float network."""
LATENCY = 1.03
"""Time over that of ONNX Runtime's fastest scheme, lower quartile of the rounds."""
SPEEDUP = 1.8
"""Over float, of `SPEEDUP_NETWORK`."""
SPEEDUP_NETWORK = "resnet50"

Result = Mapping[str, Any]


def verdicts(results: Sequence[Result]) -> list[tuple[str, bool]]:
    """Each bar in words with its numbers, and whether it is met. They are about the first variant of fxopt.

    A network on which it failed, or was not asked for, misses its bars.
    """
    ours = next(iter(FXOPT))
    found: list[tuple[str, bool]] = []
    for result in results:
        network, rows = result["network"], {row["method"]: row for row in result["rows"]}
        row = rows.get(ours, {"failure": "not asked for"})
        if row["failure"] is not None:
            found.append((f"{network}: {ours} failed: {shorten(row['failure'])}", False))
            continue
        peers = [each for name, each in rows.items() if name not in FXOPT and name != FLOAT and each["failure"] is None]
        found += _fidelity_bars(network, row, peers)
        if result["accuracy"] is not None:
            drop = result["accuracy"] - row["accuracy"]
            text = f"{network}: accuracy {_percent(row['accuracy'])}, {_percent(drop)} points below float; bar 0.20"
            # the shares are of whole images: the bar itself is met in spite of rounding
            found.append((text, drop <= ACCURACY_DROP + 1e-9))
        if row.get("to_fastest_ort") is not None:
            ratio = Spread(**row["to_fastest_ort"])
            found.append(
                (f"{network}: time over ORT's fastest scheme {ratio.text()}; bar {LATENCY}", ratio.low <= LATENCY)
            )
        if network == SPEEDUP_NETWORK and row.get("latency") is not None:
            speedup = 1 / row["latency"]["median"]
            text = f"{network}: {speedup:.2f} times as fast as float; bar {SPEEDUP} (for a machine without VNNI)"
            found.append((text, speedup >= SPEEDUP))
    return found


def quantize_table(results: Sequence[Result]) -> Table:
    """A row for each network and method, the bars below."""
    columns = ("network", "method", "SQNR dB", "agreement", "accuracy %", "latency over fp32", "ms", "MB", "seconds")
    notes = [
        *verdict_lines(verdicts(results)),
        f"CPU: {instruction_set()}; one thread, batch of 1, in turns: median and quartiles of the rounds' ratios",
        "SQNR and agreement (the share of images with one class): of the logits, against the float network, on images "
        "that were not calibrated on; accuracy on Fashion-MNIST; seconds: of the quantization",
        "p: how often the agreements of two equally good methods are that far apart (McNemar's exact test)",
        "classes that the float network finds in the test images (with one or two, agreement says little): "
        + ", ".join(f"{result['network']} {result['classes']}" for result in results),
        "resnet14 is trained on Fashion-MNIST, efficientnet_lite0 has its ImageNet weights, the others random ones "
        "and batch norm statistics of photographs",
        "OpenVINO is told to compute in float32 what is not int8; torchao runs its reference in PyTorch, so without "
        "a latency unless --inductor",
    ]
    return Table(
        "int8: fxopt, ONNX Runtime, NNCF with OpenVINO, torchao",
        columns,
        [_cells(result["network"], row) for result in results for row in result["rows"]],
        notes,
    )


def instruction_set(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What torch uses here, and which extensions for int8 the processor has (none: u8 * s8 saturates in pairs)."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    extensions = [flag for flag in ("avx_vnni", "avx512_vnni", "amx_int8") if flag in flags]
    return f"{Target.detect().instruction_set}, {' '.join(extensions) or 'no VNNI'}"


def _fidelity_bars(network: str, row: Result, peers: Sequence[Result]) -> list[tuple[str, bool]]:
    found = []
    for key, name in (("sqnr_db", "SQNR"), ("agreement", "agreement")):
        best = max(peers, key=lambda peer: _number(peer[key]), default=None)
        if best is None:
            continue
        digits = 1 if key == "sqnr_db" else 3
        theirs = f"{number_text(best[key], digits=digits)} of {best['method']}"
        text = f"{network}: {name} {number_text(row[key], digits=digits)}; the best peer's {theirs}"
        if key == "agreement" and "differs" in row and "differs" in best:
            mine, other = set(row["differs"]), set(best["differs"])
            text += f"; p {sign_test(len(mine - other), len(other - mine)):.2f}"
        found.append((text, _number(row[key]) >= _number(best[key])))
    return found


def sign_test(one: int, other: int) -> float:
    """How often two methods that are equally good differ by as many images as these do, or more (McNemar, exact).

    Args:
        one: images on which the first alone fails.
        other: images on which the second alone does.
    """
    both = one + other
    return min(1.0, 2 * sum(math.comb(both, count) for count in range(min(one, other) + 1)) / 2**both)


def _number(value: float | None) -> float:
    """A SQNR is None where nothing differs."""
    return float("inf") if value is None else value


def _cells(network: str, row: Result) -> list[str]:
    if row["failure"] is not None:
        return [network, row["method"], f"failed: {shorten(row['failure'])}", *["-"] * 6]
    latency = row.get("latency")
    return [
        network,
        row["method"],
        number_text(row["sqnr_db"], digits=1),
        f"{row['agreement']:.3f}",
        "-" if row["accuracy"] is None else _percent(row["accuracy"]),
        "-" if latency is None else Spread(**latency).text(),
        number_text(row.get("milliseconds")),
        number_text(row["megabytes"]),
        f"{row['seconds']:.0f}",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
