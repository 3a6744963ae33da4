"""The models on which predicted and measured step times are compared: small enough for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import GPT, MODELS, Batch, Recommender, WideMLP


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight
        return out


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions, then a gated MLP."""

    def __init__(self, dim: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, dim // heads
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, groups * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, groups * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.norm1(x)
        q = _rotate(self.wq(y).view(b, t, self.heads, self.head_dim).transpose(1, 2), cos, sin)
        k = _rotate(self.wk(y).view(b, t, self.groups, self.head_dim).transpose(1, 2), cos, sin)
        v = self.wv(y).view(b, t, self.groups, self.head_dim).transpose(1, 2)
        k = k.repeat_interleave(self.heads // self.groups, dim=1)
        v = v.repeat_interleave(self.heads // self.groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).reshape(b, t, -1))
        y = self.norm2(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Llama(nn.Module):
    def __init__(self, vocab: int = 4096, dim: int = 384, layers: int = 4, heads: int = 8) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(LlamaBlock(dim, heads, heads // 2, 1024) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head_dim = dim // heads

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        half = self.head_dim // 2
        frequency = 10000.0 ** (-torch.arange(half, device=ids.device) / half)
        angle = torch.arange(ids.shape[1], device=ids.device)[:, None] * frequency
        cos, sin = (torch.cat((f, f), dim=-1) for f in (angle.cos(), angle.sin()))
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class BertBlock(nn.Module):
    """Post-norm encoder block with attention over all positions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            w(x).view(b, t, -1, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        x = self.norm1(x + self.wo(y.transpose(1, 2).reshape(b, t, -1)))
        out: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return out


class Bert(nn.Module):
    """Masked-token prediction; the head shares the embedding's weight."""

    def __init__(self, vocab: int = 4096, dim: int = 256, layers: int = 4, context: int = 64):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(BertBlock(dim, 4) for _ in range(layers))
        self.transform = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        logits = F.linear(F.gelu(self.transform(x)), self.tokens.weight, self.bias)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class MixtureOfExperts(nn.Module):
    """Two residual layers of experts, each token weighted over all of them (dense mask)."""

    def __init__(self, dim: int = 256, hidden: int = 512, experts: int = 8, layers: int = 2):
        super().__init__()
        self.routers = nn.ModuleList(nn.Linear(dim, experts, bias=False) for _ in range(layers))
        self.up = nn.ParameterList(torch.randn(experts, dim, hidden) / 16 for _ in range(layers))
        self.down = nn.ParameterList(torch.randn(experts, hidden, dim) / 22 for _ in range(layers))
        self.head = nn.Linear(dim, 64)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for router, up, down in zip(self.routers, self.up, self.down, strict=True):
            weights = torch.softmax(router(x), dim=-1)
            hidden = F.gelu(torch.einsum("td,edh->eth", x, up))
            x = x + torch.einsum("eth,ehd,te->td", hidden, down, weights)
        return F.cross_entropy(self.head(x), labels)


@dataclass(frozen=True)
class ValidationModel:
    """A module and its global batch; `batch_of` takes a seeded generator."""

    name: str
    build: Callable[[], nn.Module]
    batch_of: Callable[[torch.Generator], Batch]


def text_batch(batch: int, length: int, vocab: int) -> Callable[[torch.Generator], Batch]:
    """Makes token ids and the ids that follow them, int64 [batch, length] each."""

    def make(g: torch.Generator) -> Batch:
        ids = torch.randint(vocab, (batch, length + 1), generator=g)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    return make


def _vectors(batch: int, dim: int) -> Callable[[torch.Generator], Batch]:
    return lambda g: (torch.randn(batch, dim, generator=g), torch.randn(batch, dim, generator=g))


def _items(rows: int) -> Callable[[torch.Generator], Batch]:
    return lambda g: (
        torch.randint(rows, (256,), generator=g),
        torch.randint(rows, (256, 8), generator=g),
        torch.randn(256, 16, generator=g),
        (torch.rand(256, generator=g) < 0.3).float(),
    )


def _tokens(g: torch.Generator) -> Batch:
    return torch.randn(512, 256, generator=g), torch.randint(64, (512,), generator=g)


VALIDATION_MODELS = {
    model.name: model
    for model in (
        ValidationModel("gpt", lambda: GPT(layers=4), text_batch(8, 128, 8192)),
        ValidationModel("mlp_wide", lambda: WideMLP(1280, 5120), _vectors(8, 1280)),
        ValidationModel("mlp_small", lambda: WideMLP(768, 3072), _vectors(256, 768)),
        ValidationModel("resnet", MODELS["resnet"].build, MODELS["resnet"].batch),
        ValidationModel("rec", lambda: Recommender(rows=300_000), _items(300_000)),
        ValidationModel("llama", Llama, text_batch(8, 128, 4096)),
        ValidationModel("bert", Bert, text_batch(16, 64, 4096)),
        ValidationModel("moe", MixtureOfExperts, _tokens),
    )
}
