"""Llama-3-8B's shape as an ordinary module, to be planned on a cluster that is not here.

    autopar plan examples/llama3_8b.py:llama3_8b --cluster 8x8xH100

Shapes: Llama 3 herd of models, arXiv:2407.21783, table 3.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    layers: int = 32
    dim: int = 4096
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 14336
    vocab: int = 128256
    sequence: int = 8192
    rope_base: float = 500000.0


def rotary(config: Config) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding, [sequence, head dim / 2] each."""
    half = config.dim // config.heads // 2
    frequency = config.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(config.sequence, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of features of [batch, heads, sequence, head dim] by position."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = c.heads, c.kv_heads, c.dim // c.heads
        self.query = nn.Linear(c.dim, c.dim, bias=False)
        self.key = nn.Linear(c.dim, c.kv_heads * self.width, bias=False)
        self.value = nn.Linear(c.dim, c.kv_heads * self.width, bias=False)
        self.out = nn.Linear(c.dim, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, d = x.shape
        q = self.query(x).view(b, s, self.heads, self.width).transpose(1, 2)
        k = self.key(x).view(b, s, self.kv_heads, self.width).transpose(1, 2)
        v = self.value(x).view(b, s, self.kv_heads, self.width).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(b, s, d))


class Block(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(c.dim)
        self.attention = Attention(c)
        self.mlp_norm = nn.RMSNorm(c.dim)
        self.gate = nn.Linear(c.dim, c.hidden, bias=False)
        self.up = nn.Linear(c.dim, c.hidden, bias=False)
        self.down = nn.Linear(c.hidden, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(c.vocab, c.dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim)
        self.head = nn.Linear(c.dim, c.vocab, bias=False)
        cos, sin = rotary(c)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def llama3_8b() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The module in bfloat16 and one global batch of 64 sequences."""
    config = Config()
    model = Llama(config).to(torch.bfloat16)
    ids = torch.zeros(64, config.sequence, dtype=torch.int64)
    targets = torch.zeros(64, config.sequence, dtype=torch.int64)
    return model, (ids, targets)
