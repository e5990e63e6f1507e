"""Small networks of the kinds that backends are compared on."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenEncoder(nn.Module):
    """Tokens and a mask of those that are padding; gives a vector a token and one for all. int64 and bool inputs."""

    def __init__(self, width: int = 32, words: int = 50) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.randn(16, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(tokens) + self.places[: tokens.shape[1]]
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        kept = (~padding).unsqueeze(-1)
        return x, (x * kept).sum(1) / kept.sum(1)

    @staticmethod
    def sample(batch: int, *, words: int = 50, length: int = 12) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(batch)
        tokens = torch.randint(0, words, (batch, length), generator=generator)
        return tokens, torch.arange(length) >= torch.randint(2, length + 1, (batch, 1), generator=generator)


class Recurrent(nn.Module):
    """An LSTM over a sequence, and a linear layer over what it gives at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 24, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps, _ = self.lstm(x)
        return self.head(steps[:, -1]), steps
