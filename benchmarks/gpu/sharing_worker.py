"""One rank of `benchmarks.gpu.sharing`: `python -m benchmarks.gpu.sharing_worker JOB.json`."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import autopar

from .models import Block


class DropoutGPT(nn.Module):
    """A GPT with dropout after the embedding and after every block."""

    def __init__(self, vocab: int, dim: int, layers: int, heads: int, sequence: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, dim), nn.Embedding(sequence, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        x = F.dropout(x, 0.1, self.training)
        for block in self.blocks:
            x = F.dropout(block(x), 0.1, self.training)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Losses of some steps, and the plan's mesh."""
    device = torch.device(job["device"])
    vocab, dim, layers, sequence = (128, 32, 1, 16) if job["tiny"] else (8192, 512, 4, 256)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model = DropoutGPT(vocab, dim, layers, 4, sequence)  # drawn on the host: the same anywhere
    ids = torch.randint(0, vocab, (8, sequence + 1))
    batch = (ids[:, :-1].to(device), ids[:, 1:].to(device))
    module: Any = autopar.parallelize(
        model.to(device),
        strategy=job["strategy"],
        kernels=job["kernels"],
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    torch.manual_seed(1)
    losses = []
    for _ in range(job["steps"]):
        loss = module(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    plan = module.autopar.plan
    return {"losses": losses, "mesh": str(plan.mesh) if plan is not None else "one process"}


def main(path: str) -> None:
    """Run one rank's job; rank 0 writes the answer."""
    job = json.loads(Path(path).read_text())
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if job["device"] == "cuda":
        torch.cuda.set_device(job["rank"] % torch.cuda.device_count())
    dist.init_process_group(
        "cpu:gloo,cuda:gloo" if job["device"] == "cuda" else "gloo",
        init_method=f"file://{job['store']}",
        rank=job["rank"],
        world_size=job["nproc"],
    )
    found = train(job)
    if job["rank"] == 0:
        Path(job["out"]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
