"""Small networks that are really trained: ResNet-14 and a MobileNet on Fashion-MNIST, for accuracy in benchmarks.

`python -m benchmarks.fashion_mnist` trains the first on the images of the Debian package `dataset-fashion-mnist`, and
writes the checkpoint that comes with the repository: 12 epochs, about a minute each on two cores, to 93.6 %. With
`--network mobilenet --epochs 6` it trains the other, two minutes or so an epoch on one core, to 91.3 %.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.errors import BenchmarkError
from fxopt.nn import InvertedResidual

__all__ = [
    "CHECKPOINT",
    "MOBILENET_CHECKPOINT",
    "Images",
    "accuracy",
    "images",
    "mobilenet",
    "resnet14",
    "train",
    "trained",
    "trained_mobilenet",
]

CHECKPOINT = Path(__file__).parent / "data" / "fashion_mnist_resnet14.safetensors"
MOBILENET_CHECKPOINT = CHECKPOINT.with_name("fashion_mnist_mobilenet.safetensors")
FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts them

_log = logging.getLogger(__name__)
_MEAN, _STD = 0.2860, 0.3530  # of the training images


class Images:
    """Images, float32[N, 1, 28, 28] of mean 0 and deviation 1 over the training set, and their classes, int64[N]."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Images:
        """The first so many of them."""
        return Images(self.pixels[:count], self.labels[:count])


def images(split: str, folder: Path = FOLDER) -> Images:
    """The "train" (60,000) or "t10k" (10,000) images.

    Raises:
        BenchmarkError: if they are not there.
    """
    pixels, labels = (folder / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    if not pixels.exists():
        raise BenchmarkError(
            f"no Fashion-MNIST in {folder}: install the Debian package dataset-fashion-mnist, or pass --data"
        )
    raw = np.frombuffer(gzip.decompress(pixels.read_bytes()), dtype=np.uint8, offset=16).reshape(-1, 1, 28, 28)
    classes = np.frombuffer(gzip.decompress(labels.read_bytes()), dtype=np.uint8, offset=8)
    return Images(
        (torch.from_numpy(raw.copy()).float() / 255 - _MEAN) / _STD, torch.from_numpy(classes.astype(np.int64))
    )


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet14() -> nn.Module:
    """Two blocks each of 16, 32 and 64 channels: 175 k parameters, 20.4 M MACs an image."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for out, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        layers.append(_Block(channels, out, stride))
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mobilenet() -> nn.Module:
    """Inverted residuals with ReLU behind a stem of stride 2: 82 k parameters, 4.6 M MACs an image."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for out, stride in ((24, 1), (40, 2), (40, 1), (64, 1), (64, 1)):
        layers.append(InvertedResidual(channels, out, stride=stride, expansion=4, activation=nn.ReLU))
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def trained(path: Path = CHECKPOINT) -> nn.Module:
    """ResNet-14 with its trained weights, in evaluation mode.

    Raises:
        BenchmarkError: if there is no checkpoint.
    """
    return _loaded("resnet14", path)


def trained_mobilenet(path: Path = MOBILENET_CHECKPOINT) -> nn.Module:
    """The MobileNet with its trained weights, in evaluation mode.

    Raises:
        BenchmarkError: if there is no checkpoint.
    """
    return _loaded("mobilenet", path)


_NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], Path]] = {
    "resnet14": (resnet14, CHECKPOINT),
    "mobilenet": (mobilenet, MOBILENET_CHECKPOINT),
}


def _loaded(network: str, path: Path) -> nn.Module:
    from safetensors.torch import load_file

    if not path.exists():
        raise BenchmarkError(f"no checkpoint {path}: python -m benchmarks.fashion_mnist --network {network} trains it")
    model = _NETWORKS[network][0]()
    model.load_state_dict(load_file(path))
    return model.eval()


def accuracy(model: nn.Module, test: Images, *, batch: int = 500) -> float:
    """The share of images whose class the model, in evaluation mode, finds."""
    with torch.no_grad():
        right = sum(
            int((model(pixels).argmax(1) == labels).sum())
            for pixels, labels in zip(test.pixels.split(batch), test.labels.split(batch), strict=True)
        )
    return right / len(test)


def train(
    model: nn.Module,
    data: Images,
    *,
    epochs: int,
    rate: float,
    seed: int = 0,
    batch: int = 128,
    teacher: nn.Module | None = None,
) -> None:
    """Trains in place: SGD with momentum, a one-cycle rate, images flipped and shifted by up to two pixels.

    With a teacher, whose probabilities are to be met, labels are not looked at (arXiv:1503.02531).
    """
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(data) // batch)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.25)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=generator)
        total = 0.0
        for picks in order.split(batch)[: len(data) // batch]:
            pixels = _augmented(data.pixels[picks], generator)
            labels: Tensor = data.labels[picks]
            if teacher is not None:
                with torch.no_grad():
                    labels = teacher(pixels).softmax(1)
            loss = F.cross_entropy(model(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        _log.info("epoch %d of %d: loss %.4f", epoch + 1, epochs, total / (len(data) // batch))
    model.eval()


def _augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image flipped or not; the batch shifted by up to two pixels."""
    flipped = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    pixels = torch.where(flipped, pixels.flip(3), pixels)
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    padded = F.pad(pixels, (2, 2, 2, 2), value=-_MEAN / _STD)
    return padded[:, :, down : down + 28, right : right + 28]


def main() -> int:
    """Trains and saves."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=_NETWORKS, default="resnet14")
    parser.add_argument("--data", type=Path, default=FOLDER, help=f"folder of the images [{FOLDER}]")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, help="the checkpoint [the one that comes with the repository]")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        data, test = images("train", arguments.data), images("t10k", arguments.data)
    except BenchmarkError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    make, checkpoint = _NETWORKS[arguments.network]
    path = arguments.out or checkpoint
    torch.manual_seed(0)
    model = make().to(memory_format=torch.channels_last)
    train(model, data, epochs=arguments.epochs, rate=0.2)
    _log.info("accuracy on %d images: %.2f %%", len(test), 100 * accuracy(model, test))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
