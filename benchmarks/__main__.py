"""The command line: `python -m benchmarks NAME [options]`, where NAME is a benchmark's file name in this package.

A module of this package is a benchmark if it defines `add_arguments(parser)` and `run(arguments) -> exit code`; the
first line of its docstring is its help. Nothing else registers it.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from benchmarks.errors import BenchmarkError


def discover() -> dict[str, ModuleType]:
    """The benchmarks by name, in alphabetical order."""
    found = {}
    for info in sorted(pkgutil.iter_modules([str(Path(__file__).parent)]), key=lambda module: module.name):
        if info.name == "__main__":
            continue
        module = importlib.import_module(f"benchmarks.{info.name}")
        if hasattr(module, "add_arguments") and hasattr(module, "run"):
            found[info.name] = module
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark.

    Returns:
        The process's exit code: 0 if every bar was met, 1 if one was missed, 2 for an error of the user's.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    benchmarks = discover()
    for name, module in benchmarks.items():
        summary = (module.__doc__ or "").strip().splitlines()[0].replace("%", "%%")
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(command)
    arguments = parser.parse_args(argv)
    try:
        return int(benchmarks[arguments.benchmark].run(arguments))
    except BenchmarkError as error:
        sys.stderr.write(f"python -m benchmarks {arguments.benchmark}: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
