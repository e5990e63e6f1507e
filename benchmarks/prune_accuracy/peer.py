"""The settings of Torch-Pruning: every criterion that needs no training, in each of its three scopes.

`BasePruner` in one step, the classifier left whole, at the `pruning_ratio` that reaches the budget, found by bisection.
Gradients are those of the cross-entropy on the calibration images. `GroupHessianImportance` is given the mean squared
gradients of single images, as its documentation means: its own `accumulate_grad` keeps the last image's alone (1.6.1).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fashion_mnist import Images
from benchmarks.prune_accuracy.study import PEER, Setting, Study

__all__ = ["PLAIN", "SCOPES", "TOLERANCE", "peer_settings", "peer_variants"]

PLAIN = "l2, local"
"""What one gets for the pruner's and the importance's default options."""

TOLERANCE = 0.02
"""How far the MACs may be from the budget, relative to it. One ratio for all layers cannot reach every number."""

SCOPES: Mapping[str, Mapping[str, bool]] = {
    "local": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}

_CLOSE = 0.003  # near enough to stop looking
_BISECTIONS = 12
_RATIOS = 60  # that are tried where bisection fails
_REDUCTIONS = ("max", "prod", "first", "gate")  # "sum" is "mean" but for a factor, which normalising takes out
_NORMALIZERS = (None, "sum", "max", "standarization", "gaussian", "sentinel_0.5")  # spelt as there

Prepare = Callable[[nn.Module, Images], Any]
"""Gives the importance; what it has to know of the data it learns from a network, which it may mark."""


def peer_settings(study: Study) -> list[Setting]:
    """Each criterion with its default options."""
    pruner = _Pruner(study)
    return [
        Setting(PEER, f"{name}, {scope}", partial(pruner.pruned, name, prepare, scope))
        for name, prepare in _criteria().items()
        for scope in SCOPES
    ]


def peer_variants(study: Study) -> list[list[Setting]]:
    """Group norms with other reductions and normalisers: for each norm and scope the settings to choose from."""
    pruner = _Pruner(study)
    families = []
    for power in (1, 2):
        for scope in SCOPES:
            options: list[dict[str, Any]] = [{"group_reduction": each} for each in _REDUCTIONS]
            if scope != "local":  # within a layer the order is the same
                options += [{"normalizer": each} for each in _NORMALIZERS]
            family = []
            for option in options:
                ((key, value),) = option.items()
                name = f"l{power} ({key.removeprefix('group_')} {value})"
                prepare = _plain("GroupMagnitudeImportance", p=power, **option)
                family.append(Setting(PEER, f"{name}, {scope}", partial(pruner.pruned, name, prepare, scope)))
            families.append(family)
    return families


class _Pruner:
    """Prunes copies of the trained network, of which each criterion has one with what it learnt."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._prepared: dict[str, tuple[nn.Module, Any]] = {}

    def pruned(self, name: str, prepare: Prepare, scope: str, budget: float) -> nn.Module:
        """As close to the budget as it gets; where that is not within the tolerance, above it."""
        if name not in self._prepared:
            model = copy.deepcopy(self._study.model)
            self._prepared[name] = model, prepare(model, self._study.calibration)
        best: tuple[float, nn.Module] | None = None
        low, high = 0.0, 1.0
        # the bisection first; a scan if it fails, since MACs need not fall as the ratio grows: layers of which all
        # channels are under the threshold are left whole
        for step in range(_BISECTIONS + _RATIOS):
            if best is not None and best[0] <= (_CLOSE if step < _BISECTIONS else TOLERANCE):
                break
            ratio = (low + high) / 2 if step < _BISECTIONS else (step - _BISECTIONS + 0.5) / _RATIOS
            module = self._at(name, scope, ratio)
            share = self._study.share_of_macs(module)
            low, high = (ratio, high) if share > budget else (low, ratio)
            error = abs(share / budget - 1)
            if share < budget and error > TOLERANCE:
                error += 1  # a network that is too small would be held against it
            if best is None or error < best[0]:
                best = error, module
        assert best is not None
        return best[1]

    def _at(self, name: str, scope: str, ratio: float) -> nn.Module:
        import torch_pruning as tp

        learnt, importance = self._prepared[name]
        # together, so that an importance that knows the layers knows those of the copy
        model, importance = copy.deepcopy((learnt, importance))
        for parameter, original in zip(model.parameters(), learnt.parameters(), strict=True):
            parameter.grad = original.grad
        torch.manual_seed(0)  # for RandomImportance
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own deprecations
            pruner = tp.pruner.BasePruner(
                model,
                self._study.example,
                importance=importance,
                pruning_ratio=ratio,
                ignored_layers=[_classifier(model)],
                **SCOPES[scope],
            )
            pruner.step()
        model.zero_grad()
        return model


def _criteria() -> dict[str, Prepare]:
    return {
        "l2": _plain("GroupMagnitudeImportance", p=2),
        "l1": _plain("GroupMagnitudeImportance", p=1),
        "bn_scale": _plain("BNScaleImportance"),
        "lamp": _plain("LAMPImportance"),
        "fpgm": _plain("FPGMImportance"),
        "taylor": _with_gradients("GroupTaylorImportance"),
        "taylor (multivariable)": _with_gradients("GroupTaylorImportance", multivariable=True),
        "hessian": _hessian,
        "obdc": _obdc,
        "activation": _activation,
        "random": _plain("RandomImportance"),
    }


def _plain(name: str, **options: Any) -> Prepare:
    return lambda _model, _data: _make(name, **options)


def _make(name: str, **options: Any) -> Any:
    import torch_pruning as tp

    return getattr(tp.importance, name)(**options)


def _with_gradients(name: str, **options: Any) -> Prepare:
    def prepare(model: nn.Module, data: Images) -> Any:
        for pixels, labels in _batches(data):
            (F.cross_entropy(model(pixels), labels) * len(labels) / len(data)).backward()
        return _make(name, **options)

    return prepare


def _hessian(model: nn.Module, data: Images) -> Any:
    from torch.func import functional_call, grad, vmap

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], pixels: Tensor, label: Tensor) -> Tensor:
        outputs = functional_call(model, parameters, (pixels.unsqueeze(0),))
        return F.cross_entropy(outputs, label.unsqueeze(0))

    squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for pixels, labels in _batches(data):
        for name, gradients in vmap(grad(loss), (None, 0, 0))(parameters, pixels, labels).items():
            squares[name] += gradients.square().sum(0)
    for name, parameter in model.named_parameters():
        parameter.grad = squares[name] / len(data)
    return _make("GroupHessianImportance")


def _obdc(model: nn.Module, data: Images) -> Any:
    import torch_pruning as tp

    classifier = _classifier(model)
    importance = _make("OBDCImportance", num_classes=classifier.out_features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it registers hooks of a deprecated kind
        pruner = tp.pruner.BasePruner(model, data.pixels[:2], importance=importance, ignored_layers=[classifier])
        # as it is, it runs with attention only: for all other groups this gives None (1.6.1)
        pruner._downstream_node_as_root_if_attention = lambda group: group
        importance._prepare_model(model, pruner)
        for pixels, labels in _batches(data):
            F.cross_entropy(model(pixels), labels).backward()
            importance.step()
        importance._rm_hooks(model)
    return importance


def _activation(model: nn.Module, data: Images) -> Any:
    importance = _make("ActivationImportance")
    with torch.no_grad(), importance.compute_importance(model):
        model(data.pixels)  # at once: each run replaces what it learnt from the last
    return importance


def _batches(data: Images) -> list[tuple[Tensor, Tensor]]:
    return list(zip(data.pixels.split(64), data.labels.split(64), strict=True))


def _classifier(model: nn.Module) -> nn.Linear:
    (layer,) = (module for module in model.modules() if isinstance(module, nn.Linear))
    return layer
