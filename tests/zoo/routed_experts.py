"""Mixtures of experts that send tokens to experts, in three ordinary single-device ways to write it.

By a dense mask (one-hot dispatch and combine einsums, a capacity per sequence), by scattering into
slots (one capacity for the batch), and by sorting the tokens by expert.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import Entry
from .experts import LENGTH, VOCAB, moe_batch


class Experts(nn.Module):
    """Two-layer networks with stacked weights: [experts, slots, dim] to the same."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(experts, dim, hidden) * dim**-0.5)
        self.w_out = nn.Parameter(torch.randn(experts, hidden, dim) * hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(F.gelu(torch.bmm(x, self.w_in)), self.w_out)


class Router(nn.Module):
    """Returns the weights and the indices of the top experts of every token, and a balancing loss."""

    def __init__(self, dim: int, experts: int, top: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, experts, bias=False)
        self.experts, self.top = experts, top

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = F.softmax(self.proj(x), dim=-1)
        weights, chosen = torch.topk(probabilities, self.top, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        share = F.one_hot(chosen, self.experts).to(x.dtype).sum(-2).flatten(0, -2).mean(0)
        balance = self.experts * (share * probabilities.flatten(0, -2).mean(0)).sum()
        return weights, chosen, balance


class MaskDispatch(nn.Module):
    """One-hot dispatch and combine einsums; every sequence has its own capacity per expert."""

    def __init__(self, dim: int, hidden: int, experts: int, top: int, capacity: float) -> None:
        super().__init__()
        self.router = Router(dim, experts, top)
        self.inner = Experts(dim, hidden, experts)
        self.experts, self.top, self.capacity = experts, top, capacity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, dim = x.shape
        weights, chosen, balance = self.router(x)
        capacity = math.ceil(self.capacity * self.top * length / self.experts)
        choice = F.one_hot(chosen, self.experts)  # batch, length, top, experts
        flat = choice.flatten(1, 2)
        place = ((flat.cumsum(1) - 1) * flat).sum(-1)  # batch, length * top
        slot = F.one_hot(place.clamp(max=capacity - 1), capacity).to(x.dtype)
        slot = slot * (place < capacity).unsqueeze(-1)
        slot = slot.view(batch, length, self.top, capacity)
        dispatch = torch.einsum("bske,bskc->bsec", choice.to(x.dtype), slot)
        combine = torch.einsum("bske,bskc,bsk->bsec", choice.to(x.dtype), slot, weights)
        sent = torch.einsum("bsec,bsd->ebcd", dispatch, x)
        done = self.inner(sent.reshape(self.experts, batch * capacity, dim))
        done = done.view(self.experts, batch, capacity, dim)
        return torch.einsum("ebcd,bsec->bsd", done, combine), balance


class ScatterDispatch(nn.Module):
    """Tokens are added into the slots of their experts and read back from there."""

    def __init__(self, dim: int, hidden: int, experts: int, top: int, capacity: float) -> None:
        super().__init__()
        self.router = Router(dim, experts, top)
        self.inner = Experts(dim, hidden, experts)
        self.experts, self.top, self.capacity = experts, top, capacity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape, dim = x.shape, x.shape[-1]
        x = x.reshape(-1, dim)
        weights, chosen, balance = self.router(x)
        tokens = x.shape[0]
        capacity = int(4 * self.capacity) * self.top * tokens // (4 * self.experts)
        expert = chosen.flatten()  # tokens * top
        choice = F.one_hot(expert, self.experts)
        place = (choice.cumsum(0) * choice).sum(-1) - 1
        kept = (place < capacity).unsqueeze(-1)
        slot = expert * capacity + place.clamp(max=capacity - 1)
        copies = x.unsqueeze(1).expand(-1, self.top, -1).reshape(-1, dim)
        slots = torch.zeros(self.experts * capacity, dim, dtype=x.dtype, device=x.device)
        slots.index_add_(0, slot, copies * kept)
        done = self.inner(slots.view(self.experts, capacity, dim)).view(-1, dim)
        back = done[slot] * (kept * weights.reshape(-1, 1))
        return back.view(tokens, self.top, dim).sum(1).view(shape), balance


class SortDispatch(nn.Module):
    """Tokens are sorted by expert, put into its slots in that order, and added back in place."""

    def __init__(self, dim: int, hidden: int, experts: int, top: int, capacity: float) -> None:
        super().__init__()
        self.router = Router(dim, experts, top)
        self.inner = Experts(dim, hidden, experts)
        self.experts, self.top, self.capacity = experts, top, capacity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape, dim = x.shape, x.shape[-1]
        x = x.reshape(-1, dim)
        weights, chosen, balance = self.router(x)
        tokens = x.shape[0]
        capacity = int(4 * self.capacity) * self.top * tokens // (4 * self.experts)
        order = chosen.flatten().argsort(stable=True)
        expert, token = chosen.flatten()[order], order // self.top
        counts = F.one_hot(expert, self.experts).sum(0)
        first = counts.cumsum(0) - counts
        place = torch.arange(tokens * self.top, device=x.device) - first[expert]
        kept = (place < capacity).unsqueeze(-1)
        place = place.clamp(max=capacity - 1)
        slots = torch.zeros(self.experts, capacity, dim, dtype=x.dtype, device=x.device)
        slots = slots.index_put((expert, place), x[token] * kept, accumulate=True)
        done = self.inner(slots)[expert, place]
        scaled = done * (kept * weights.flatten()[order].unsqueeze(-1))
        return torch.zeros_like(x).index_add(0, token, scaled).view(shape), balance


Dispatch = type[MaskDispatch] | type[ScatterDispatch] | type[SortDispatch]


class RoutedMoE(nn.Module):
    """Embedding, residual mixtures of experts, head; forward returns the loss."""

    def __init__(
        self,
        dispatch: Dispatch,
        dim: int = 32,
        hidden: int = 64,
        experts: int = 4,
        layers: int = 2,
        top: int = 2,
        capacity: float = 1.25,
        vocab: int = VOCAB,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.experts = nn.ModuleList(
            dispatch(dim, hidden, experts, top, capacity) for _ in range(layers)
        )
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        balance = x.new_zeros(())
        for norm, experts in zip(self.norms, self.experts, strict=True):
            y, more = experts(norm(x))
            x, balance = x + y, balance + more
        logits = self.head(x)
        loss: Tensor = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + 0.01 * balance
        return loss


ENTRIES = (
    Entry("moe_mask", partial(RoutedMoE, MaskDispatch), moe_batch),
    Entry("moe_scatter", partial(RoutedMoE, ScatterDispatch), moe_batch),
    Entry("moe_sort", partial(RoutedMoE, SortDispatch), moe_batch),
)
__all__ = ["ENTRIES", "LENGTH", "MaskDispatch", "RoutedMoE", "ScatterDispatch", "SortDispatch"]
