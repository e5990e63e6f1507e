"""The networks that are lowered to every backend: five that see images, an encoder with a mask, an LSTM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import load_network, reestimated
from benchmarks.photographs import crops, efficientnet_lite0

__all__ = ["SUBJECTS", "Subject"]

_PHOTOGRAPHS = ("astronaut", "coffee", "rocket", "chelsea")
_IMAGES = 32
_TOKENS, _LENGTH, _WIDTH = 1000, 64, 128


class Subject(NamedTuple):
    """A network in evaluation mode.

    Attributes:
        inputs: an example of two samples.
        calibration: batches of what it is meant to see.
        integers: how it is quantized for speed. LSTMs have integer kernels in one mode alone. Roundings and ranges cost
            an engine no time: these are the soonest found.
    """

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    calibration: list[tuple[Tensor, ...]]
    integers: str = "quantize(round='nearest', observer='minmax')"


class Encoder(nn.Module):
    """Like BERT: embedded tokens, layers of attention under a mask, the first token's class.

    The mask is int64, 1 for tokens and 0 for padding, as tokenizers give it.
    """

    def __init__(self, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(_TOKENS, _WIDTH), nn.Embedding(_LENGTH, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH)
        self.layers = nn.ModuleList(EncoderLayer(heads) for _ in range(layers))
        self.head = nn.Linear(_WIDTH, 10)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        y = self.norm(self.tokens(tokens) + self.places(places))
        hidden = (1.0 - mask[:, None, None, :].to(y.dtype)) * -1e4
        for layer in self.layers:
            y = layer(y, hidden)
        logits: Tensor = self.head(y[:, 0])
        return logits


class EncoderLayer(nn.Module):
    """Attention and two linear layers, each behind a sum and a norm."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.view(y.shape[0], y.shape[1], self.heads, -1).transpose(1, 2)

        parts = (split(layer(x)) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(y))
        found: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return found


class Recurrent(nn.Module):
    """Two layers of LSTM over a sequence of features, and a class for the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, _WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(_WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        logits: Tensor = self.head(y[:, -1])
        return logits


def _seeing(name: str, make: Callable[[], nn.Module]) -> Subject:
    images = crops(_PHOTOGRAPHS, _IMAGES, seed=0)
    batches = list(images.split(16))
    model = make()
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) and name != "efficientnet_lite0":
        with torch.no_grad():
            # back into the library's own model, as users have it
            model.load_state_dict(reestimated(model, batches).state_dict())
    return Subject(name, model, (images[:2],), [(batch,) for batch in batches])


def _encoder() -> Subject:
    torch.manual_seed(0)
    model = Encoder().eval()
    batches = []
    for _ in range(4):
        lengths = torch.randint(8, _LENGTH + 1, (8, 1))
        mask = (torch.arange(_LENGTH) < lengths).long()
        batches.append((torch.randint(0, _TOKENS, (8, _LENGTH)) * mask, mask))
    return Subject("encoder", model, (batches[0][0][:2], batches[0][1][:2]), batches)


def _recurrent() -> Subject:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 50, 40),) for _ in range(4)]
    return Subject("lstm", Recurrent().eval(), (batches[0][0][:2],), batches, "quantize(mode='dynamic')")


def _library(name: str) -> Callable[[], nn.Module]:
    return lambda: load_network(name).model


SUBJECTS: Mapping[str, Callable[[], Subject]] = {
    "resnet18": partial(_seeing, "resnet18", _library("torchvision:resnet18")),
    "mobilenet_v3_small": partial(_seeing, "mobilenet_v3_small", _library("torchvision:mobilenet_v3_small")),
    "vit_tiny": partial(_seeing, "vit_tiny", _library("timm:vit_tiny_patch16_224")),
    "efficientnet_lite0": partial(_seeing, "efficientnet_lite0", efficientnet_lite0),
    "shufflenet": partial(_seeing, "shufflenet", _library("torchvision:shufflenet_v2_x1_0")),
    "encoder": _encoder,
    "lstm": _recurrent,
}
"""How each is made, by name."""
