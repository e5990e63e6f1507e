"""cluster_weights against scikit-learn KMeans on the raw tensors: time, inertia, bits a weight, accuracy."""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.errors import BenchmarkError
from benchmarks.fashion_mnist import accuracy, images, trained
from benchmarks.photographs import crops, efficientnet_lite0
from benchmarks.results import RESULTS, Table, save

BITS = (8, 4, 3, 2)
NETWORKS = ("resnet14", "efficientnet_lite0")
TIME_BAR, INERTIA_BAR, SIZE_BAR = 0.25, 1.01, 4.1
_CALIBRATION = 256
_VERSIONS: Mapping[str, Mapping[str, str]] = {
    "fxopt": {},
    "fxopt, fisher": {"sensitivity": "fisher"},
    "fxopt, per channel": {"per": "channel"},
}


@dataclass(frozen=True)
class _Subject:
    """A network, data to calibrate on with targets, and what is measured of a version of it."""

    model: nn.Module
    calibration: list[tuple[Tensor, Tensor]]
    test: Tensor
    score: Callable[[nn.Module], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS, metavar="NAME")
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS))
    parser.add_argument("--images", type=int, default=10_000, help="test images of Fashion-MNIST")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing, in turns")
    parser.add_argument("--no-peer", action="store_true", help="leave scikit-learn out on the networks")
    parser.add_argument("--out", type=Path, default=None, help="JSON file [benchmarks/results/cluster_weights.json]")


def run(arguments: argparse.Namespace) -> int:
    """Runs the large tensor and the networks.

    Returns:
        0 if all bars were met, else 1.
    """
    try:
        import sklearn.cluster  # noqa: F401 (asked for before minutes are spent)
    except ImportError as error:
        raise BenchmarkError(f"{error}: pip install scikit-learn") from error
    large = _large_tensor(arguments.rounds)
    bars = {
        "time over scikit-learn's": (large["time_ratio"], TIME_BAR),
        "inertia over scikit-learn's": (large["inertia_ratio"], INERTIA_BAR),
        "bits a weight, safetensors": (large["safetensors_bits"], SIZE_BAR),
        "bits a weight, model.onnx": (large["onnx_bits"], SIZE_BAR),
    }
    rows, results = [], []
    for name in arguments.networks:
        subject = _SUBJECTS[name](arguments)
        for found in _network(subject, arguments):
            results.append({"network": name, **found})
            rows.append(_row(name, found))
    notes = [
        f"{name}: {value:.4g}, bar {bar} {'met' if value <= bar else 'MISSED'}" for name, (value, bar) in bars.items()
    ]
    notes += [
        f"the bars are about a convolution of 512 x 512 x 3 x 3 Laplace-distributed weights and 16 clusters; fxopt "
        f"{large['seconds']:.2f} s, scikit-learn {large['peer_seconds']:.2f} s, medians of rounds in turns",
        "clustered: the share of the parameters; per channel, layers of few weights a channel gain nothing",
        "bits a weight: of the file less the bytes of tensors that were not clustered; its header or graph counts",
        "SQNR: of the outputs, against the network's; score: accuracy, or the share of crops with the network's class",
        "fisher: mean squared gradients, on 256 training images or 32 crops with the network's classes as targets",
        "scikit-learn: KMeans(random_state=0) on each raw tensor, of 256 clusters with at most 20 iterations",
    ]
    columns = (
        "network",
        "bits",
        "version",
        "SQNR dB",
        "score",
        "seconds",
        "clustered",
        "safetensors bits/weight",
        "onnx bits/weight",
    )
    table = Table("cluster_weights", columns, rows, notes)
    data = {"bars": {name: {"value": value, "bar": bar} for name, (value, bar) in bars.items()}, "large": large}
    save(arguments.out or RESULTS / "cluster_weights.json", table, {**data, "networks": results})
    return int(any(value > bar for value, bar in bars.values()))


def _large_tensor(rounds: int) -> dict[str, float]:
    from fxopt.kmeans import centroids, inertia
    from fxopt.passes import ClusterWeights

    torch.manual_seed(0)
    layer = nn.Conv2d(512, 512, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.distributions.Laplace(0.0, 0.02).sample(layer.weight.shape))
    values = layer.weight.detach().reshape(1, -1).numpy()
    seconds: dict[str, list[float]] = {"fxopt": [], "peer": []}
    for _ in range(rounds):
        start = time.perf_counter()
        ours = centroids(values, 16)
        middle = time.perf_counter()
        theirs = _peer_centroids(values.reshape(-1), 16)
        seconds["fxopt"].append(middle - start)
        seconds["peer"].append(time.perf_counter() - middle)
    model = nn.Sequential(layer)
    sizes = _file_bits(model, torch.randn(1, 512, 4, 4), ClusterWeights(), layer.weight.numel())
    return {
        "time_ratio": float(np.median(np.divide(seconds["fxopt"], seconds["peer"]))),
        "inertia_ratio": inertia(values, ours) / inertia(values, theirs[None]),
        "seconds": float(np.median(seconds["fxopt"])),
        "peer_seconds": float(np.median(seconds["peer"])),
        **sizes,
    }


def _file_bits(model: nn.Module, example: Tensor, pass_: Any, weights: int) -> dict[str, float]:
    """Bits a clustered weight in both files."""
    import fxopt

    program = fxopt.optimize(model, (example,), [pass_], verify="structure")
    compiled = fxopt.compile(model, (example,), passes=[pass_], verify="structure", backend="onnx")
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(folder + "/engine")
        onnx = sum(path.stat().st_size for path in Path(folder, "engine").glob("model.onnx*"))
    rest = _rest_bytes(program)
    return {
        "safetensors_bits": 8 * (_safetensors_bytes(program.module) - rest) / weights,
        "onnx_bits": 8 * (onnx - rest) / weights,
    }


def _rest_bytes(program: Any) -> int:
    """The bytes of the tensors that are no part of a clustered weight."""
    tensors = program.module.state_dict().items()
    return sum(tensor.nbytes for name, tensor in tensors if not name.endswith((".codes", ".codebook")))


def _safetensors_bytes(module: nn.Module) -> int:
    from safetensors.torch import save

    return len(save({name: tensor.contiguous() for name, tensor in module.state_dict().items()}))


def _peer_centroids(values: np.ndarray[Any, Any], clusters: int) -> np.ndarray[Any, Any]:
    from sklearn.cluster import KMeans

    found = KMeans(clusters, random_state=0, max_iter=20 if clusters > 16 else 300).fit(values.reshape(-1, 1))
    return np.sort(found.cluster_centers_.reshape(-1).astype(np.float64))


def _network(subject: _Subject, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    import fxopt
    from fxopt.passes import ClusterWeights

    with torch.no_grad():
        expected = subject.model(subject.test)
    captured = fxopt.optimize(subject.model, (subject.test[:2],), [], calibration=subject.calibration)
    found: list[dict[str, Any]] = [
        {"bits": 32, "version": "the network", "sqnr_db": None, "score": subject.score(subject.model)}
    ]

    def measure(bits: int, version: str, model: nn.Module, seconds: float, **more: float) -> None:
        with torch.no_grad():
            noise = model(subject.test) - expected
        sqnr = float(10 * torch.log10(expected.square().sum() / noise.square().sum()))
        score = subject.score(model)
        found.append({"bits": bits, "version": version, "sqnr_db": sqnr, "score": score, "seconds": seconds, **more})

    for bits in arguments.bits:
        clustered: dict[str, list[str]] = {}
        for version, options in _VERSIONS.items():
            pass_: Any = ClusterWeights(bits=bits, **options)
            start = time.perf_counter()
            program = fxopt.PassManager([pass_], verify="structure").run(captured)
            seconds = time.perf_counter() - start
            paths = [str(program.node(rewrite.node).target) for rewrite in program.report.passes[-1].rewrites]
            clustered[version] = paths
            weights = sum(subject.model.get_submodule(path).weight.numel() for path in paths)  # type: ignore[operator, union-attr]
            share = weights / sum(parameter.numel() for parameter in subject.model.parameters())
            # what counts for more takes no more room
            sizes = {} if "sensitivity" in options else _file_bits(subject.model, subject.test[:2], pass_, weights)
            measure(bits, version, program.module, seconds, share=share, **sizes)
        if not arguments.no_peer:
            start = time.perf_counter()
            twin = _peer_twin(subject.model, clustered["fxopt"], bits)
            measure(bits, "scikit-learn", twin, time.perf_counter() - start)
    return found


def _peer_twin(model: nn.Module, paths: list[str], bits: int) -> nn.Module:
    from fxopt.kmeans import nearest

    twin = copy.deepcopy(model)
    for path in paths:
        weight: Any = twin.get_submodule(path).weight
        values = weight.detach().reshape(1, -1).numpy()
        clusters = min(2**bits, len(np.unique(values)))
        centers = _peer_centroids(values.reshape(-1), clusters)
        found = centers[nearest(values, centers[None])]
        weight.data = torch.from_numpy(found).to(weight.dtype).reshape(weight.shape)
    return twin


def _resnet14(arguments: argparse.Namespace) -> _Subject:
    model, test, data = trained(), images("t10k").first(arguments.images), images("train").first(_CALIBRATION)
    calibration = list(zip(data.pixels.split(64), data.labels.split(64), strict=True))
    return _Subject(model, calibration, test.pixels[:512], lambda item: accuracy(item, test))


def _efficientnet(_: argparse.Namespace) -> _Subject:
    model = efficientnet_lite0()
    seen = crops(["astronaut", "coffee", "rocket"], 32, seed=0)
    test = crops(["chelsea", "astronaut", "coffee", "rocket"], 64, seed=1)
    with torch.no_grad():
        classes, wanted = model(seen).argmax(1), model(test).argmax(1)

    def agreement(item: nn.Module) -> float:
        with torch.no_grad():
            return float((item(test).argmax(1) == wanted).float().mean())

    return _Subject(model, list(zip(seen.split(8), classes.split(8), strict=True)), test, agreement)


_SUBJECTS: Mapping[str, Callable[[argparse.Namespace], _Subject]] = {
    "resnet14": _resnet14,
    "efficientnet_lite0": _efficientnet,
}


def _row(network: str, found: Mapping[str, Any]) -> list[str]:
    def text(key: str, form: str) -> str:
        return "-" if found.get(key) is None else format(found[key], form)

    return [
        network,
        str(found["bits"]),
        found["version"],
        text("sqnr_db", ".1f"),
        text("score", ".4f"),
        text("seconds", ".1f"),
        text("share", ".1%"),
        text("safetensors_bits", ".2f"),
        text("onnx_bits", ".2f"),
    ]
