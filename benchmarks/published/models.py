"""The models of published runs as ordinary single-device modules: GPT, Llama and Nemotron.

A module takes token ids and targets of shape [batch, sequence] (int64) and returns the mean
cross-entropy. It is built on `meta` in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    `kind`: "gpt" (LayerNorm, GELU, learned positions), "llama" (RMSNorm, SwiGLU, rotary) or
    "nemotron" (LayerNorm, squared ReLU, rotary). `fused_attention`: one kernel for attention, else
    products around a softmax whose kernel also masks. `fused_linears`: one product makes queries,
    keys and values. `bias`, `dropout`, `tied`: as GPT-2's descendants have them.
    """

    kind: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    sequence: int
    fused_attention: bool = True
    fused_linears: bool = False
    bias: bool = False
    dropout: float = 0.0
    tied: bool = False

    @property
    def width(self) -> int:
        return self.hidden // self.heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of features of [batch, heads, sequence, head dim] by position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.c = c
        if c.fused_linears:
            both = c.heads + 2 * c.kv_heads
            self.projection = nn.Linear(c.hidden, both * c.width, bias=c.bias)
        else:
            self.query = nn.Linear(c.hidden, c.heads * c.width, bias=c.bias)
            self.key = nn.Linear(c.hidden, c.kv_heads * c.width, bias=c.bias)
            self.value = nn.Linear(c.hidden, c.kv_heads * c.width, bias=c.bias)
        self.out = nn.Linear(c.heads * c.width, c.hidden, bias=c.bias)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.c
        b, s, _ = x.shape
        q, k, v = self.project(x)
        if c.kind != "gpt":
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if c.fused_attention:
            grouped = c.kv_heads != c.heads
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            scores = torch.softmax(torch.matmul(q, k.transpose(2, 3)), dim=-1)
            y = torch.matmul(self.dropout(scores), v)
        out: Tensor = self.dropout(self.out(y.transpose(1, 2).reshape(b, s, c.heads * c.width)))
        return out

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch, heads, sequence, head dim] each."""
        c = self.c
        b, s, _ = x.shape
        if c.fused_linears:  # per group of heads: its queries, its keys, its values
            group = c.heads // c.kv_heads
            both = self.projection(x).view(b, s, c.kv_heads, (group + 2) * c.width)
            q, k, v = both.split([group * c.width, c.width, c.width], dim=-1)
            q = q.reshape(b, s, c.heads, c.width)
        else:
            q = self.query(x).view(b, s, c.heads, c.width)
            k = self.key(x).view(b, s, c.kv_heads, c.width)
            v = self.value(x).view(b, s, c.kv_heads, c.width)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.kind = c.kind
        if c.kind == "llama":
            self.gate = nn.Linear(c.hidden, c.ffn, bias=False)
        self.up = nn.Linear(c.hidden, c.ffn, bias=c.bias)
        self.down = nn.Linear(c.ffn, c.hidden, bias=c.bias)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.kind == "llama":
            y = F.silu(self.gate(x)) * y
        elif self.kind == "nemotron":
            y = torch.square(F.relu(y))
        else:
            y = F.gelu(y)
        out: Tensor = self.dropout(self.down(y))
        return out


def norm(c: Shape) -> nn.Module:
    return nn.RMSNorm(c.hidden) if c.kind == "llama" else nn.LayerNorm(c.hidden)


class Block(nn.Module):
    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.attention_norm, self.attention = norm(c), Attention(c)
        self.mlp_norm, self.mlp = norm(c), MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Decoder(nn.Module):
    """A language model; returns the mean cross-entropy of its targets."""

    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.learned_positions = c.kind == "gpt"
        self.tokens = nn.Embedding(c.vocab, c.hidden)
        if self.learned_positions:
            self.positions = nn.Parameter(torch.empty(c.sequence, c.hidden))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = norm(c)
        self.head = nn.Linear(c.hidden, c.vocab, bias=False)
        if c.tied:
            self.head.weight = self.tokens.weight
        half = c.width // 2
        self.register_buffer("cos", torch.empty(c.sequence, half), persistent=False)
        self.register_buffer("sin", torch.empty(c.sequence, half), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids)
        if self.learned_positions:
            x = x + self.positions
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().transpose(1, 2), targets)


def build(c: Shape, batch: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The module in bfloat16 and one batch, all on `meta`."""
    with torch.device("meta"):
        model = Decoder(c).to(torch.bfloat16).train()
        ids = torch.empty(batch, c.sequence, dtype=torch.int64)
        targets = torch.empty(batch, c.sequence, dtype=torch.int64)
    return model, (ids, targets)
