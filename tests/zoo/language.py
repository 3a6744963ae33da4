"""GPT and Llama as their users write them."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import Entry, Inputs, random, token_ids

IGNORED = -100


class CausalAttention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).split(d, dim=2)
        q = q.view(b, t, self.heads, d // self.heads).transpose(1, 2)
        k = k.view(b, t, self.heads, d // self.heads).transpose(1, 2)
        v = v.view(b, t, self.heads, d // self.heads).transpose(1, 2)
        p = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(b, t, d)
        out: Tensor = self.dropout(self.proj(y))
        return out


class GPTBlock(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = CausalAttention(dim, heads, dropout, attention_dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))
        return out


class GPT(nn.Module):
    """Tied embeddings; returns the loss when it is given targets, else the logits."""

    def __init__(
        self,
        vocab: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        dim: int = 32,
        layers: int = 2,
        heads: int = 4,
        context: int = 32,
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, dim)
        self.wpe = nn.Embedding(context, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            GPTBlock(dim, heads, dropout, attention_dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.dropout(self.wte(ids) + self.wpe(positions))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=IGNORED
        )


def language_batch(vocab: int, length: int, step: int, batch_size: int) -> Inputs:
    """Next-token pairs; the first rows have more ignored targets than the last ones."""
    ids = token_ids(step, batch_size, length + 1, vocab=vocab)
    targets = ids[:, 1:].clone()
    share = torch.linspace(0.8, 0.0, batch_size).unsqueeze(1)
    targets[torch.rand(targets.shape, generator=random(step, 2)) < share] = IGNORED
    return (ids[:, :-1].contiguous(), targets), {}


def ids_only(vocab: int, length: int, step: int, batch_size: int) -> Inputs:
    (ids, _), kwargs = language_batch(vocab, length, step, batch_size)
    return (ids,), kwargs


def targets_only(vocab: int, length: int, step: int, batch_size: int) -> Tensor:
    (_, targets), _ = language_batch(vocab, length, step, batch_size)
    assert isinstance(targets, Tensor)
    return targets


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class LlamaAttention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.wq = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.wk(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        repeats = self.heads // self.kv_heads
        k = k.repeat_interleave(repeats, dim=1)
        v = v.repeat_interleave(repeats, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.wo(y.transpose(1, 2).reshape(b, t, -1))
        return out


class LlamaBlock(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attention = LlamaAttention(dim, heads, kv_heads)
        self.norm2 = nn.RMSNorm(dim, eps=1e-5)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        h = self.norm2(x)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


class Llama(nn.Module):
    """RoPE, grouped-query attention, SwiGLU, RMSNorm (hand-written and torch's); untied head."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, vocab: int, dim: int = 32, layers: int = 2, heads: int = 4, kv_heads: int = 2
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(LlamaBlock(dim, 88, heads, kv_heads) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, vocab, bias=False)
        half = dim // heads // 2
        angles = torch.outer(torch.arange(64.0), 10000.0 ** (-torch.arange(half) / half))
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        return logits, token_cross_entropy(logits, targets)


def loss_of_pair(output: tuple[Tensor, Tensor]) -> Tensor:
    return output[1]


ENTRIES = (
    Entry(
        "gpt",
        partial(GPT, vocab=50257, dropout=0.1),
        partial(language_batch, 50257, 8),
        has_dropout=True,
    ),
    Entry(
        "gpt_attention_dropout",
        partial(GPT, vocab=101, dropout=0.1, attention_dropout=0.1),
        partial(language_batch, 101, 16),
        has_dropout=True,
    ),
    Entry(
        "gpt_outside",
        partial(GPT, vocab=101),
        partial(ids_only, 101, 16),
        token_cross_entropy,
        partial(targets_only, 101, 16),
    ),
    Entry("llama", partial(Llama, vocab=128), partial(language_batch, 128, 16), loss_of_pair),
)
