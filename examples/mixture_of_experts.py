"""A mixture of experts as one writes it for one device, to be planned on many.

    autopar plan examples/mixture_of_experts.py:mixture_of_experts --cluster 8xH100

Every token goes to its two best experts, each of which has slots for so many tokens; a token that
finds its expert full is passed on by the residual alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, DIM, HIDDEN, EXPERTS, LAYERS, TOP = 32000, 1024, 4096, 64, 4, 2


class Experts(nn.Module):
    """Two-layer networks with stacked weights, one call for all: [experts, slots, dim]."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(EXPERTS, DIM, HIDDEN) * DIM**-0.5)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, HIDDEN, DIM) * HIDDEN**-0.5)

    def forward(self, slots: Tensor) -> Tensor:
        return torch.bmm(F.gelu(torch.bmm(slots, self.w_in)), self.w_out)


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, EXPERTS, bias=False)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        weight, expert = torch.topk(F.softmax(self.router(x), dim=-1), TOP, dim=-1)
        expert = expert.flatten()  # tokens * TOP
        capacity = 5 * TOP * tokens // (4 * EXPERTS)
        choice = F.one_hot(expert, EXPERTS)
        place = (choice.cumsum(0) * choice).sum(-1) - 1  # of the token in its expert's queue
        kept = (place < capacity).unsqueeze(-1)
        slot = expert * capacity + place.clamp(max=capacity - 1)
        copies = x.unsqueeze(1).expand(-1, TOP, -1).reshape(-1, DIM)
        slots = torch.zeros(EXPERTS * capacity, DIM, dtype=x.dtype, device=x.device)
        slots.index_add_(0, slot, copies * kept)  # the way to the experts
        done = self.experts(slots.view(EXPERTS, capacity, DIM)).view(-1, DIM)
        back = done[slot] * (kept * weight.reshape(-1, 1))  # and back
        return back.view(tokens, TOP, DIM).sum(1)


class Model(nn.Module):
    """Only what is of interest here: a real model has attention between the mixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(LAYERS))
        self.mixtures = nn.ModuleList(MoE() for _ in range(LAYERS))
        self.head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        for norm, mixture in zip(self.norms, self.mixtures, strict=True):
            x = x + mixture(norm(x))
        return F.cross_entropy(self.head(x), targets.flatten())


def mixture_of_experts() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The module in bfloat16 and one global batch of 64 sequences of 512 tokens."""
    ids = torch.zeros(64, 512, dtype=torch.int64)
    return Model().to(torch.bfloat16), (ids, ids.clone())
