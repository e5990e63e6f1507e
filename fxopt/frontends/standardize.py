"""Rewrites what hides its computation into modules that tracing can look into, before a model is captured.

- `nn.MultiheadAttention` becomes linears and `scaled_dot_product_attention` (the docstring of
  `fxopt.frontends.attention.Attention` tells where each parameter goes).
- `nn.Transformer` and its parts become plain layers without fused fast paths; their parameters keep their names.
- Parametrized tensors (`torch.nn.utils.parametrize`, and the older weight and spectral norm hooks) are computed once
  and become plain parameters, in evaluation mode only: "conv.parametrizations.weight.original0" and its like become
  "conv.weight".
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxopt.frontends.attention import Attention
from fxopt.frontends.transformer import TRANSFORMER_PARTS

__all__ = ["standardize"]


def standardize(model: nn.Module) -> nn.Module:
    """The model with traceable modules in place of opaque ones.

    Modules that do something the replacement cannot (hooks, subclasses, `add_bias_kv`, `add_zero_attn`) are left alone.

    Args:
        model: a private copy; it is changed. Parameters stay the same objects except where they are computed or split.

    Returns:
        The model, or what replaces it if it is such a module itself.
    """
    for module in list(model.modules()):
        if not module.training:
            _bake(module)
    model = _replace(model, {module: Attention(module) for module in _attentions(model)})
    for original, part in TRANSFORMER_PARTS.items():
        found = [module for module in model.modules() if type(module) is original and not _has_hooks(module)]
        model = _replace(model, {module: part(module) for module in found if _is_open(module)})
    return model


def _attentions(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if Attention.represents(module)]


def _is_open(module: nn.Module) -> bool:
    """Whether all attention below a module was replaced, so that looking into it leads somewhere."""
    return not any(isinstance(child, nn.MultiheadAttention) for child in module.modules())


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Puts each replacement wherever its original is registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def _bake(module: nn.Module) -> None:
    """Turns a module's computed tensors into plain parameters of their present value."""
    if parametrize.is_parametrized(module):
        _bake_parametrizations(module)
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm | SpectralNorm):
            remove = nn.utils.remove_weight_norm if isinstance(hook, WeightNorm) else nn.utils.remove_spectral_norm
            remove(module, hook.name)


def _bake_parametrizations(module: Any) -> None:
    # parametrize.remove_parametrizations would take the tensor off the class, which copies of the module share.
    computed = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    parameters = {name: list(module.parametrizations[name].parameters(recurse=False)) for name in computed}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in computed.items():
        if parameters[name]:
            trains = any(parameter.requires_grad for parameter in parameters[name])
            module.register_parameter(name, nn.Parameter(value, requires_grad=trains))
        else:
            module.register_buffer(name, value)
