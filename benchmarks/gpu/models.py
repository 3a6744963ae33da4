"""The models of the single-GPU accuracy benchmark: ordinary modules that return the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.llama3_8b import Config, Llama


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(d, dim=2)
        q, k, v = (y.view(b, t, self.heads, d // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class GPT2(nn.Module):
    """GPT-2 (Radford et al., 2019, table 2: 12 layers of width 768), its vocabulary padded.

    124 M parameters, embedding and head tied; no dropout.
    """

    def __init__(
        self, vocab: int = 50304, dim: int = 768, layers: int = 12, heads: int = 12, t: int = 1024
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, dim), nn.Embedding(t, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def tied(config: Config) -> Llama:
    """A Llama whose head is its embedding."""
    model = Llama(config)
    model.head.weight = model.tokens.weight
    return model


@dataclass(frozen=True)
class Subject:
    """A model to time: `build()` on torch's default device, ids below `vocab`."""

    build: Callable[[], nn.Module]
    vocab: int
    batch: int
    sequence: int


# Shapes of the 1 B model: Llama 3.2 1B, huggingface.co/meta-llama/Llama-3.2-1B config.json.
LLAMA_1B = Config(
    layers=16, dim=2048, heads=32, kv_heads=8, hidden=8192, vocab=128256, sequence=2048
)
TINY_LLAMA = Config(layers=1, dim=64, heads=4, kv_heads=2, hidden=128, vocab=256, sequence=64)

SUBJECTS = {
    "gpt2-124m": Subject(GPT2, 50304, 16, 1024),
    "llama-1b": Subject(lambda: tied(LLAMA_1B), LLAMA_1B.vocab, 4, 2048),
}
TINY = {
    "gpt2-124m": Subject(lambda: GPT2(256, 64, 1, 4, 64), 256, 2, 64),
    "llama-1b": Subject(lambda: tied(TINY_LLAMA), 256, 2, 64),
}
