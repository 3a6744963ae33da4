"""A transformer-free mixture of experts, top 2 of 4, in two ordinary ways to write it."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import Entry, Inputs, token_ids

VOCAB, LENGTH = 64, 16


class TopTwoGate(nn.Module):
    """Returns the weights of the experts per token [tokens, experts] and a balancing loss."""

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, experts, bias=False)
        self.experts = experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = F.softmax(self.proj(x), dim=-1)
        top, chosen = torch.topk(probabilities, 2, dim=-1)
        top = top / top.sum(dim=-1, keepdim=True)
        choice = F.one_hot(chosen, self.experts).to(x.dtype)  # tokens, 2, experts
        weights = (choice * top.unsqueeze(-1)).sum(dim=1)
        balance = (choice.sum(dim=1).mean(dim=0) * probabilities.mean(dim=0)).sum()
        return weights, self.experts * balance


class EinsumExperts(nn.Module):
    """Every expert sees every token; the gate's zeros drop what was not chosen."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(experts, dim, hidden) * dim**-0.5)
        self.w_out = nn.Parameter(torch.randn(experts, hidden, dim) * hidden**-0.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        h = F.gelu(torch.einsum("td,edf->etf", x, self.w_in))
        y = torch.einsum("etf,efd->etd", h, self.w_out)
        return torch.einsum("etd,te->td", y, weights)


class LoopExperts(nn.Module):
    """One module per expert, called in turn, masked by multiplication."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim))
            for _ in range(experts)
        )

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            weight = weights[:, index : index + 1]
            out += expert(x * (weight > 0)) * weight
        return out


class MoE(nn.Module):
    def __init__(
        self,
        make_experts: type[EinsumExperts] | type[LoopExperts],
        dim: int = 32,
        hidden: int = 64,
        experts: int = 4,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.gates = nn.ModuleList(TopTwoGate(dim, experts) for _ in range(layers))
        self.experts = nn.ModuleList(make_experts(dim, hidden, experts) for _ in range(layers))
        self.head = nn.Linear(dim, VOCAB)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        balance = x.new_zeros(())
        for norm, gate, experts in zip(self.norms, self.gates, self.experts, strict=True):
            h = norm(x)
            weights, gate_balance = gate(h)
            x = x + experts(h, weights)
            balance = balance + gate_balance
        logits = self.head(x.view(shape))
        loss: Tensor = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + 0.01 * balance
        return loss


def moe_batch(step: int, batch_size: int) -> Inputs:
    ids = token_ids(step, batch_size, LENGTH + 1, vocab=VOCAB)
    return (ids[:, :-1], ids[:, 1:]), {}


ENTRIES = (
    Entry("moe", partial(MoE, EinsumExperts), moe_batch),
    Entry("moe_index", partial(MoE, LoopExperts), moe_batch),
)
