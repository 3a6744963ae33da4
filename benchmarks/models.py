"""The four benchmark models: ordinary single-device code that returns the loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            w(x).view(b, t, -1, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.wo(y.transpose(1, 2).reshape(b, t, -1))
        return out


class GPTBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class GPT(nn.Module):
    def __init__(
        self,
        vocab: int = 8192,
        dim: int = 512,
        layers: int = 6,
        heads: int = 8,
        context: int = 128,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(GPTBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class MLPBlock(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.gelu(self.up(x)))
        return out


class WideMLP(nn.Module):
    def __init__(self, dim: int = 4096, hidden: int = 16384) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MLPBlock(dim, hidden) for _ in range(2))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(x, target)


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
        return F.relu(y + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """ResNet-18's eight blocks, narrow, for 32x32 images."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks, previous = [], width
        for stage in range(4):
            for i in range(2):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(ResidualBlock(previous, width << stage, stride))
                previous = width << stage
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(previous, classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)), inplace=True)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)), labels)


class Recommender(nn.Module):
    """One large item table, looked up for a user's history, and a small network."""

    def __init__(self, rows: int = 1_000_000, dim: int = 64, hidden: int = 512) -> None:
        super().__init__()
        self.items = nn.Embedding(rows, dim)
        self.net = nn.Sequential(
            nn.Linear(2 * dim + 16, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, item: Tensor, history: Tensor, dense: Tensor, click: Tensor) -> Tensor:
        features = (self.items(item), self.items(history).mean(dim=1), dense)
        logits = self.net(torch.cat(features, dim=-1)).squeeze(-1)
        return F.binary_cross_entropy_with_logits(logits, click)


Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class BenchModel:
    """`parameters_bytes`: of one replica, a table's dense gradient counted in."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    parameters_bytes: int
    exact_baselines: bool = True  # False where batch statistics make DDP another computation


def _gpt_batch(g: torch.Generator) -> Batch:
    ids = torch.randint(8192, (16, 129), generator=g)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _mlp_batch(dim: int) -> Callable[[torch.Generator], Batch]:
    return lambda g: (torch.randn(8, dim, generator=g), torch.randn(8, dim, generator=g))


def _resnet_batch(g: torch.Generator) -> Batch:
    return torch.randn(32, 3, 32, 32, generator=g), torch.randint(10, (32,), generator=g)


def _rec_batch(g: torch.Generator) -> Batch:
    return (
        torch.randint(1_000_000, (256,), generator=g),
        torch.randint(1_000_000, (256, 8), generator=g),
        torch.randn(256, 16, generator=g),
        (torch.rand(256, generator=g) < 0.3).float(),
    )


MODELS = {
    model.name: model
    for model in (
        BenchModel("gpt", GPT, _gpt_batch, 110 << 20),
        BenchModel("mlp", WideMLP, _mlp_batch(4096), 1 << 30),
        BenchModel("mlp_quarter", lambda: WideMLP(2048, 8192), _mlp_batch(2048), 256 << 20),
        BenchModel("resnet", ResNet, _resnet_batch, 43 << 20, exact_baselines=False),
        BenchModel("rec", Recommender, _rec_batch, 420 << 20),
    )
}
