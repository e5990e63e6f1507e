"""Multi-head attention that can be traced: linears, and `scaled_dot_product_attention` between them.

`nn.MultiheadAttention` branches on ranks and masks and hides its projections in one function call; this module computes
the same from the same parameters with every step visible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional
from torch import fx, nn
from torch.fx.proxy import TraceError

__all__ = ["Attention", "linear_of", "plain_attention"]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keeps torch from its fast path for attention, which cannot be traced, and leaves out what is padding."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class Attention(nn.Module):
    """What an `nn.MultiheadAttention` computes, called the same way.

    Where the parameters of the original are found:

        in_proj_weight, in_proj_bias              in_proj.weight, in_proj.bias (the same objects)
        q_proj_weight, k_proj_weight, ...         q_proj.weight, k_proj.weight, ... (the same objects)
        in_proj_bias, if kdim or vdim differ      q_proj.bias, k_proj.bias, v_proj.bias (thirds of it: new parameters)
        out_proj.weight, out_proj.bias            out_proj.weight, out_proj.bias (the same objects)

    While being traced, inputs that are not `batch_first` are taken to have a batch axis, and masks must be constants.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.embed_dim = original.embed_dim
        self.num_heads = original.num_heads
        self.head_dim = original.head_dim
        self.dropout = original.dropout
        self.batch_first = original.batch_first
        bias = original.in_proj_bias
        if original.in_proj_weight is not None:
            self.in_proj: nn.Linear | None = linear_of(original.in_proj_weight, bias)
        else:
            self.in_proj = None
            weights = (original.q_proj_weight, original.k_proj_weight, original.v_proj_weight)
            thirds = (None, None, None) if bias is None else bias.detach().chunk(3)
            for name, weight, third in zip("qkv", weights, thirds, strict=True):
                kept = None if third is None else nn.Parameter(third.clone(), requires_grad=bias.requires_grad)
                self.add_module(f"{name}_proj", linear_of(weight, kept))
        self.out_proj = linear_of(original.out_proj.weight, original.out_proj.bias)
        self.train(original.training)

    @staticmethod
    def represents(original: nn.Module) -> bool:
        """Whether this module computes what `original` does: no extra keys and values, no subclass, no hooks."""
        return (
            type(original) is nn.MultiheadAttention
            and original.bias_k is None
            and original.bias_v is None
            and not original.add_zero_attn
            and not original._forward_hooks
            and not original._forward_pre_hooks
        )

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Any]:
        """See `nn.MultiheadAttention`: the attended values, and the attention weights or None."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        sequence_first = not self.batch_first and (isinstance(query, fx.Proxy) or query.dim() == 3)
        q, k, v = self._project(query, key, value)
        if sequence_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        q, k, v = (item.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2) for item in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = self._weights(q, k, mask, dropout) if need_weights else None
        if weights is not None and dropout:
            attended = weights @ v  # the weights handed out are the ones that were dropped
        else:
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output = attended.transpose(-3, -2).flatten(-2)
        if sequence_first:
            output = output.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=-3)
        if self.training and self.batch_first:
            # sequence first in memory, as torch has it: a dropout behind it draws its random zeros in that order
            return self.out_proj(output.transpose(0, 1).contiguous()).transpose(0, 1), weights
        return self.out_proj(output), weights

    def _project(self, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        if self.in_proj is None:
            projections = (self.get_submodule(f"{name}_proj") for name in "qkv")
            q, k, v = (project(item) for project, item in zip(projections, (query, key, value), strict=True))
            return q, k, v
        if query is key and key is value:
            q, k, v = self.in_proj(query).chunk(3, dim=-1)
            return q, k, v
        weight = _traced(query, self.in_proj, "weight")
        bias = _traced(query, self.in_proj, "bias")
        width = self.embed_dim
        parts = []
        for index, item in enumerate((query, key, value)):
            part = None if bias is None else bias.narrow(0, index * width, width)
            parts.append(torch.nn.functional.linear(item, weight.narrow(0, index * width, width), part))
        return parts[0], parts[1], parts[2]

    def _weights(self, q: Any, k: Any, mask: Any, dropout: float) -> Any:
        scores = (q * (1.0 / math.sqrt(self.head_dim))) @ k.transpose(-2, -1)
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        return torch.nn.functional.dropout(weights, dropout) if dropout else weights

    def _mask(self, attn_mask: Any, key_padding_mask: Any) -> Any:
        """Both masks as one that is added to the scores, of shape (batch or 1, heads or 1, queries, keys)."""
        if isinstance(attn_mask, fx.Proxy) or isinstance(key_padding_mask, fx.Proxy):
            raise TraceError("whether an attention mask that is an input is boolean or additive cannot be traced")
        mask = None
        if attn_mask is not None:
            mask = self._additive(attn_mask)
            if mask.dim() == 3:
                mask = mask.reshape(-1, self.num_heads, *mask.shape[1:])
        if key_padding_mask is not None:
            padding = self._additive(key_padding_mask)
            padding = padding[:, None, None, :] if padding.dim() == 2 else padding
            mask = padding if mask is None else mask + padding
        return mask

    def _additive(self, mask: torch.Tensor) -> torch.Tensor:
        dtype = self.out_proj.weight.dtype
        if mask.dtype != torch.bool:
            return mask.to(dtype)
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """An `nn.Linear` that owns these very parameters; weight is of shape (outputs, inputs)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.register_parameter("weight", _parameter(weight))
    linear.register_parameter("bias", None if bias is None else _parameter(bias))
    return linear


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=tensor.requires_grad)


def _traced(like: Any, module: nn.Module, name: str) -> Any:
    """A parameter; while being traced, a node that reads it: slices of itself would be burnt in as constants."""
    parameter = getattr(module, name)
    if parameter is None or not isinstance(like, fx.Proxy):
        return parameter
    tracer = like.tracer
    assert isinstance(tracer, fx.Tracer)
    return tracer.create_proxy("get_attr", f"{tracer.path_of_module(module)}.{name}", (), {})
