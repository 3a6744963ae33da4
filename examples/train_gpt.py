"""Train a byte-level GPT on the sources of Python's own standard library.

An ordinary single-device script: the decorator is its only trace of parallelism.

    python examples/train_gpt.py                              # one device
    autopar run examples/train_gpt.py --nproc 4               # four ranks, the same losses
    torchrun --nproc_per_node 4 examples/train_gpt.py         # the same
"""

import argparse
import json
import os
import statistics
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import autopar

VOCABULARY = 256  # bytes
CORPUS_BYTES = 4 << 20


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(d, dim=2)
        q, k, v = (y.view(b, t, self.heads, d // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.proj(y.transpose(1, 2).reshape(b, t, d)))
        out: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))
        return out


@autopar.parallelize
class GPT(nn.Module):
    """About 10 million parameters at the default sizes."""

    def __init__(self, dim: int = 320, layers: int = 8, heads: int = 5, context: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Embedding(context, dim)
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block(dim, heads, 0.1) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.dropout(self.tokens(ids) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1))


def read_corpus() -> Tensor:
    """The standard library's .py files, in a fixed order, as bytes."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= CORPUS_BYTES:
            break
    return torch.frombuffer(text[:CORPUS_BYTES], dtype=torch.uint8)


def get_batch(corpus: Tensor, size: int, length: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """The global batch: the same on every rank."""
    starts = torch.randint(len(corpus) - length, (size,), generator=g)
    rows = corpus[starts.unsqueeze(1) + torch.arange(length + 1)].long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def train(arguments: argparse.Namespace) -> None:
    is_first = int(os.environ.get("RANK", "0")) == 0
    torch.manual_seed(arguments.seed)
    corpus = read_corpus()
    model = GPT(context=arguments.seq)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    generator = torch.Generator().manual_seed(arguments.seed)
    losses: list[float] = []
    times: list[float] = []
    # Optional: the first call of the model would plan as well; here the plan is seen before it.
    example = get_batch(
        corpus, arguments.batch, arguments.seq, torch.Generator().manual_seed(arguments.seed)
    )
    model.autopar.prepare(*example)
    model.autopar.print_plan()
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        disable=not is_first,
    )
    with progress:
        bar = progress.add_task("", total=arguments.steps, loss=float("nan"))
        for _ in range(arguments.steps):
            start = time.perf_counter()
            ids, targets = get_batch(corpus, arguments.batch, arguments.seq, generator)
            loss = model(ids, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            warm_up.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            times.append(time.perf_counter() - start)
            progress.update(bar, advance=1, loss=losses[-1])
    if is_first:
        model.autopar.print_timing()
        print(f"median step {statistics.median(times):.3f} s, last loss {losses[-1]:.4f}")
        if arguments.losses_out:
            record = {"losses": losses, "step_s": times}
            arguments.losses_out.write_text(json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small byte-level GPT.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16, help="sequences in the global batch")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--losses-out", type=Path, help="write losses and step times as JSON")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
