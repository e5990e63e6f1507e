"""`nn.Transformer` and its parts without the fused fast paths, so that tracing sees the layers.

Each class computes what its namesake in `torch.nn` does, from the same submodules under the same names, and is called
the same way. What the originals check, and the hints about causal masks (the mask itself decides), are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["TRANSFORMER_PARTS", "Part"]


class Part(nn.Module):
    """A module built over the submodules and settings of its original."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._modules.update(original._modules)
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class Transformer(Part):
    """See `nn.Transformer`."""

    def forward(
        self,
        src: Any,
        tgt: Any,
        src_mask: Any = None,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        src_key_padding_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Any:
        """See `nn.Transformer`."""
        del src_is_causal, tgt_is_causal, memory_is_causal
        memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask)
        return self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
        )


class Encoder(Part):
    """See `nn.TransformerEncoder`."""

    layers: nn.ModuleList

    def forward(
        self, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool | None = None
    ) -> Any:
        """See `nn.TransformerEncoder`."""
        del is_causal
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        norm = self._modules.get("norm")
        return src if norm is None else norm(src)


class Decoder(Part):
    """See `nn.TransformerDecoder`."""

    layers: nn.ModuleList

    def forward(
        self,
        tgt: Any,
        memory: Any,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Any:
        """See `nn.TransformerDecoder`."""
        del tgt_is_causal, memory_is_causal
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
            )
        norm = self._modules.get("norm")
        return tgt if norm is None else norm(tgt)


class _Layer(Part):
    activation: Callable[[Any], Any]
    norm_first: bool

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self.norm_first = original.norm_first
        if "activation" not in self._modules:
            self.activation = original.activation

    def _feed_forward(self, x: Any, dropout: nn.Module) -> Any:
        return dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class EncoderLayer(_Layer):
    """See `nn.TransformerEncoderLayer`."""

    def forward(self, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False) -> Any:
        """See `nn.TransformerEncoderLayer`."""
        del is_causal
        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask}
        if self.norm_first:
            src = src + self._attend(self.norm1(src), masks)
            return src + self._feed_forward(self.norm2(src), self.dropout2)
        src = self.norm1(src + self._attend(src, masks))
        return self.norm2(src + self._feed_forward(src, self.dropout2))

    def _attend(self, x: Any, masks: dict[str, Any]) -> Any:
        return self.dropout1(self.self_attn(x, x, x, need_weights=False, **masks)[0])


class DecoderLayer(_Layer):
    """See `nn.TransformerDecoderLayer`."""

    def forward(
        self,
        tgt: Any,
        memory: Any,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Any:
        """See `nn.TransformerDecoderLayer`."""
        del tgt_is_causal, memory_is_causal
        own = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask}
        cross = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask}
        if self.norm_first:
            tgt = tgt + self._attend(self.norm1(tgt), own)
            tgt = tgt + self._attend_memory(self.norm2(tgt), memory, cross)
            return tgt + self._feed_forward(self.norm3(tgt), self.dropout3)
        tgt = self.norm1(tgt + self._attend(tgt, own))
        tgt = self.norm2(tgt + self._attend_memory(tgt, memory, cross))
        return self.norm3(tgt + self._feed_forward(tgt, self.dropout3))

    def _attend(self, x: Any, masks: dict[str, Any]) -> Any:
        return self.dropout1(self.self_attn(x, x, x, need_weights=False, **masks)[0])

    def _attend_memory(self, x: Any, memory: Any, masks: dict[str, Any]) -> Any:
        return self.dropout2(self.multihead_attn(x, memory, memory, need_weights=False, **masks)[0])


# A container comes after its parts: it is left alone where one of them had to be.
TRANSFORMER_PARTS: dict[type[nn.Module], type[Part]] = {
    nn.TransformerEncoderLayer: EncoderLayer,
    nn.TransformerDecoderLayer: DecoderLayer,
    nn.TransformerEncoder: Encoder,
    nn.TransformerDecoder: Decoder,
    nn.Transformer: Transformer,
}
