"""What is measured of a pruned network, the same way whoever pruned it.

raw: its accuracy as it is. re-estimated: after fxopt's `reestimate_batch_norm` on the calibration images. fine-tuned:
after one epoch on top of that, the mean over several orders of the images: from the same network they end up to 0.2
points apart. MACs are counted by torch's flop counter.
"""

from __future__ import annotations

import copy
import hashlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fxopt
from benchmarks.fashion_mnist import Images, accuracy, train
from benchmarks.numerics import count_macs

__all__ = ["FXOPT", "PEER", "RATE", "Accuracy", "Network", "Row", "Setting", "Study"]

FXOPT, PEER = "fxopt", "Torch-Pruning"
RATE = 0.02
"""The highest learning rate of the epoch: a tenth of the one that the network was trained with."""

_BATCH = 256


@dataclass(frozen=True)
class Setting:
    """A way to prune.

    Attributes:
        side: `FXOPT` or `PEER`.
        name: what it is called there.
        prune: the trained network pruned to a share of its MACs, as a new module in evaluation mode.
    """

    side: str
    name: str
    prune: Callable[[float], nn.Module]

    def __str__(self) -> str:
        return f"{self.side}: {self.name}"


class Accuracy(NamedTuple):
    """The share of so many test images that is classified rightly."""

    share: float
    images: int


@dataclass
class Network:
    """A pruned network and its accuracies. Settings that keep the same channels share it.

    Attributes:
        macs: over those of the unpruned network.
        pruned: the network.
        adapted: the same with its BatchNorm statistics re-estimated.
        raw, reestimated: their accuracies.
        trainings: the accuracies after one epoch of training, by order of the images; empty for one that is not
            trained.
    """

    macs: float
    pruned: nn.Module = field(repr=False)
    adapted: nn.Module = field(repr=False)
    raw: Accuracy
    reestimated: Accuracy
    trainings: list[Accuracy] = field(default_factory=list)

    @property
    def finetuned(self) -> Accuracy | None:
        """The mean after one epoch of training."""
        if not self.trainings:
            return None
        return Accuracy(statistics.fmean(each.share for each in self.trainings), self.trainings[0].images)


@dataclass(frozen=True)
class Row:
    """What a setting gave at a budget: a network, or the reason why there is none."""

    setting: Setting
    budget: float
    network: Network | None
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and text."""
        data: dict[str, Any] = {"side": self.setting.side, "setting": self.setting.name, "budget": self.budget}
        if self.network is None:
            return {**data, "failure": self.failure}
        data["macs"] = self.network.macs
        for name in ("raw", "reestimated", "finetuned"):
            accuracy = getattr(self.network, name)
            data[name] = None if accuracy is None else accuracy._asdict()
        data["trainings"] = [each.share for each in self.network.trainings]
        return data


class Study:
    """The trained network, the data, and the measurements.

    Args:
        model: the trained network.
        training, test: the images.
        calibration: how many training images may be looked at without training.
        race: how many test images all settings are measured on.
        rate: the highest learning rate of the epoch of fine-tuning.
        orders: how many orders of the images each network is fine-tuned with.

    Attributes:
        model: the trained network.
        calibration: the training images that may be looked at without training.
        test: all test images that are used.
        rate, orders: as given.
        accuracy, race_accuracy: of the trained network, over all of them, and over those of the race.
    """

    def __init__(
        self,
        model: nn.Module,
        training: Images,
        test: Images,
        *,
        calibration: int,
        race: int,
        rate: float = RATE,
        orders: int = 3,
    ) -> None:
        self.model = model
        self.rate, self.orders = rate, orders
        self.training = training
        self.calibration = training.first(calibration)
        self.test = test
        self._race = test.first(race)
        self.accuracy, self.race_accuracy = (_measure(model, part).share for part in (test, self._race))
        self._macs = count_macs(model, (self.example,))
        self._networks: dict[str, Network] = {}

    @property
    def raced(self) -> int:
        """How many test images all settings are measured on."""
        return len(self._race)

    @property
    def example(self) -> Tensor:
        """Two images."""
        return self.calibration.pixels[:2]

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The calibration images with their classes."""
        pixels, labels = self.calibration.pixels.split(_BATCH), self.calibration.labels.split(_BATCH)
        return list(zip(pixels, labels, strict=True))

    def comparable(self, accuracy: Accuracy) -> float:
        """An accuracy; one over the race's images as if the trained network had its overall accuracy on these too."""
        return accuracy.share + (0.0 if accuracy.images == len(self.test) else self.accuracy - self.race_accuracy)

    def share_of_macs(self, module: nn.Module) -> float:
        """Its MACs over those of the unpruned network."""
        return count_macs(module, (self.example,)) / self._macs

    def race(self, setting: Setting, budget: float) -> Row:
        """Prunes, re-estimates, and measures both on the first test images."""
        try:
            module = setting.prune(budget)
        except Exception as error:  # noqa: BLE001 (a setting that cannot reach a budget is a result)
            return Row(setting, budget, None, f"{type(error).__name__}: {error}")
        key = _fingerprint(module)
        if key not in self._networks:
            adapted = self._reestimated(module)
            raw, reestimated = (_measure(each, self._race) for each in (module, adapted))
            self._networks[key] = Network(self.share_of_macs(module), module, adapted, raw, reestimated)
        return Row(setting, budget, self._networks[key])

    def measure_reestimated(self, network: Network) -> None:
        """On all test images."""
        if network.reestimated.images < len(self.test):
            network.reestimated = _measure(network.adapted, self.test)

    def measure_raw(self, network: Network) -> None:
        """On all test images."""
        if network.raw.images < len(self.test):
            network.raw = _measure(network.pruned, self.test)

    def finetune(self, network: Network) -> None:
        """Trains for one epoch from the re-estimated network on, the images in the same orders for all networks."""
        for order in range(len(network.trainings), self.orders):
            module = copy.deepcopy(network.adapted).to(memory_format=torch.channels_last)
            train(module, self.training, epochs=1, rate=self.rate, seed=order)
            network.trainings.append(_measure(module, self.test))

    def _reestimated(self, module: nn.Module) -> nn.Module:
        passes = ["reestimate_batch_norm"]
        program = fxopt.optimize(module, self.example, passes, calibration=self.batches, on_no_match="ignore")
        return program.module.eval()


def _measure(module: nn.Module, test: Images) -> Accuracy:
    return Accuracy(accuracy(module, test, batch=_BATCH), len(test))


def _fingerprint(module: nn.Module) -> str:
    """The same for modules with the same tensors in the same order."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
