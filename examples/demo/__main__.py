"""A really pretrained network, original against compiled: `python -m examples.demo` (or `make demo`).

EfficientNet-Lite0 with its ImageNet weights classifies photographs before and after `fxopt.compile`. Exits with 1 if a
label changed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fxopt
from examples.demo.model import pretrained_model, weights_file
from examples.demo.photographs import PHOTOGRAPHS, class_name, load_photographs
from fxopt.timing import Timing, measure


def main() -> int:
    """Runs the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60, help="measured calls of each (default: 60)")
    parser.add_argument("--backend", default="onnx", help="a backend, such as onnx or eager (default: onnx)")
    options = parser.parse_args()

    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.status("reading the network and the photographs"):
        model = pretrained_model()
        photographs = load_photographs()
    with console.status("compiling"):
        compiled = fxopt.compile(model, (photographs[:1],), backend=options.backend)
    console.rule("what the compiler did")
    console.print(compiled.report)

    console.rule("what the network sees")
    same = _show_predictions(console, model, compiled, photographs)

    console.rule("what it costs")
    with tempfile.TemporaryDirectory() as folder, console.status("measuring"):
        compiled.save(folder)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        reloaded = fxopt.load(folder)
        same = same and torch.equal(reloaded(photographs), compiled(photographs))
        timings = measure(
            {"original": lambda: _run(model, photographs[:1]), "compiled": lambda: compiled(photographs[:1])},
            rounds=options.rounds,
        )
    _show_costs(console, timings, weights_file().stat().st_size, size)

    if not same:
        console.print("[bold red]The compiled network does not agree with the original.[/]")
        return 1
    console.print("[bold green]The compiled network agrees with the original on every photograph.[/]")
    return 0


def _run(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images)


def _show_predictions(console: Console, model: nn.Module, compiled: fxopt.Compiled, photographs: torch.Tensor) -> bool:
    before = _run(model, photographs)
    after = compiled(photographs)
    table = Table("photograph", "original", "compiled", "same label", caption_justify="left")
    table.caption = f"largest difference of any logit: {(before - after).abs().max().item():.1e}"
    same = True
    for name, old, new in zip(PHOTOGRAPHS, before.softmax(-1), after.softmax(-1), strict=True):
        agree = bool(old.argmax() == new.argmax())
        same = same and agree
        table.add_row(name, _prediction(old), _prediction(new), "yes" if agree else "[bold red]NO[/]")
    console.print(table)
    return same


def _prediction(probabilities: torch.Tensor) -> str:
    probability, index = probabilities.max(-1)
    return f"{class_name(int(index))} {probability.item():.4f}"


def _show_costs(console: Console, timings: dict[str, Timing], size_before: int, size_after: int) -> None:
    original, compiled = timings["original"], timings["compiled"]
    table = Table("", "original", "compiled", "ratio", caption_justify="left")
    table.caption = (
        f"latency: median (and quartiles) of {len(original.seconds)} calls each, taking turns, batch of 1, "
        f"{torch.get_num_threads()} threads"
    )
    table.add_row("latency", _latency(original), _latency(compiled), f"{original.median / compiled.median:.2f}x faster")
    table.add_row("on disk", _megabytes(size_before), _megabytes(size_after), f"{size_after / size_before:.2f}x")
    console.print(table)


def _latency(timing: Timing) -> str:
    low, high = timing.quartiles
    return f"{timing.median * 1e3:.1f} ms ({low * 1e3:.1f} - {high * 1e3:.1f})"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
