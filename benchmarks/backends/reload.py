"""Loads saved engines in a process of its own, runs them, and says how far their answers are from those before.

    python benchmarks/backends/reload.py FOLDER

Each folder in FOLDER is a saved engine; inputs and outputs that it had are beside it, in NAME.safetensors. Prints
JSON: by name, the largest difference, or why it could not be loaded. One that cannot run here has to load.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import load_file

import fxopt
from fxopt.compare import compare


def answers(folder: Path) -> dict[str, float | str]:
    """What became of each engine in a folder."""
    found: dict[str, float | str] = {}
    for path in sorted(folder.glob("*/manifest.json")):
        name = path.parent.name
        try:
            engine = fxopt.load(path.parent).engine
            if engine.cannot_run() is not None:
                found[name] = 0.0
                continue
            kept = load_file(folder / f"{name}.safetensors")
            inputs = [kept[f"input{index}"] for index in range(len(engine.inputs))]
            expected = [kept[key] for key in sorted(kept) if key.startswith("output")]
            difference = compare(expected, engine(*inputs))
            found[name] = difference.mismatch or difference.max_abs
        except Exception as error:  # noqa: BLE001 (what fails is a result)
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


if __name__ == "__main__":
    result = answers(Path(sys.argv[1]))
    # the classes of the models must not have been needed
    libraries = sorted({"torchvision", "timm", "benchmarks"} & set(sys.modules))
    sys.stdout.write(json.dumps({"engines": result, "libraries": libraries}) + "\n")
