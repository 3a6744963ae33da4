"""Training loops as people write them; each returns what one device and many ranks must agree on.

Every loop is called with a strategy, on ranks and in a single process alike. Ranks seed themselves
differently on purpose: rank 0's seeds and first parameters count.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import autopar
from autopar.compat import local_of
from tests.zoo import ZOO
from tests.zoo.language import GPT

VOCAB, LENGTH = 101, 16
Values = dict[str, Any]


def seed(n: int) -> None:
    torch.manual_seed(n + (100 * dist.get_rank() if dist.is_initialized() else 0))


def plain_gpt(dropout: float = 0.0) -> nn.Module:
    seed(0)
    return GPT(VOCAB, dropout=dropout, layers=1, context=LENGTH).double()


def gpt(strategy: str, dropout: float = 0.0) -> Any:
    return autopar.parallelize(plain_gpt(dropout), strategy=strategy)


def batch(step: int, size: int = 8, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCAB, (size, length + 1), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def whole(value: Any) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def state(model: nn.Module) -> Values:
    found = {name: value.clone() for name, value in model.state_dict().items()}
    assert not any(isinstance(value, DTensor) for value in found.values())
    return found


def steps(model: Any, optimizer: torch.optim.Optimizer, n: int = 3, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + n):
        loss = model(*batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def with_optimizer(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[str], Values]:
    def loop(strategy: str) -> Values:
        model = gpt(strategy)
        optimizer = make(model.parameters())
        return {"losses": steps(model, optimizer), **state(model)}

    return loop


def optimizer_made_first(strategy: str) -> Values:
    model = plain_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert autopar.parallelize(model, strategy=strategy) is model
    return {"losses": steps(model, optimizer), **state(model)}


def clipped(strategy: str) -> Values:
    model = gpt(strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    for step in range(3):
        model(*batch(step)).backward()
        norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": torch.stack(norms), **state(model)}


def scheduled(strategy: str) -> Values:
    model = gpt(strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=4)
    losses = []
    for step in range(3):
        losses += steps(model, optimizer, 1, step)
        scheduler.step()
    return {"losses": losses, "lr": scheduler.get_last_lr(), **state(model)}


def accumulated(strategy: str) -> Values:
    model = gpt(strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        (model(*batch(step)) / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    return state(model)


class Shared(nn.Module):
    """Two parameters with one gradient, one whose gradient is expanded, a head without a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8))
        self.delta = nn.Parameter(torch.randn(8, 8))
        self.shift = nn.Parameter(torch.randn(6))
        self.unused = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = (x @ (self.table + self.delta)).relu()
        return hidden.square().mean() + self.shift.sum(), self.unused(hidden)


def shared_gradients(strategy: str) -> Values:
    seed(0)
    model: Any = autopar.parallelize(Shared().double(), strategy=strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 8, dtype=torch.float64, generator=generator)
        (model(x)[0] / 2).backward()
        if step % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return state(model)


def two_forwards(strategy: str) -> Values:
    model = gpt(strategy)
    first = model(*batch(0))
    second = model(*batch(1))
    (first + 2 * second).backward()
    return {n: whole(p.grad) for n, p in model.named_parameters()}


def loss_outside(strategy: str) -> Values:
    model = gpt(strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        ids, targets = batch(step)
        logits = model(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss = loss + 1e-3 * sum(p.square().sum() for p in model.parameters() if p.dim() > 3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, **state(model)}


def batch_sizes(strategy: str) -> Values:
    """Ragged last batch, a batch smaller than the mesh, other sequence lengths."""
    model = gpt(strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step, (size, length) in enumerate([(8, 16), (5, 16), (1, 16), (8, 7), (3, 9), (8, 16)]):
        loss = model(*batch(step, size, length))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, **state(model)}


def evaluated(strategy: str) -> Values:
    """Evaluation first, and again between training steps, with dropout."""
    model = gpt(strategy, dropout=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seed(1)
    losses = []
    for step in range(3):
        model.eval()
        with torch.no_grad():
            losses.append(model(*batch(10)).item())
        with torch.inference_mode():
            losses.append(model(batch(11)[0]).sum().item())
        model.train()
        losses += steps(model, optimizer, 1, step)
    return {"losses": losses, **state(model)}


def checkpointed(strategy: str) -> Values:
    """`load_state_dict` before the first step, after it, and into a model under another plan."""
    torch.manual_seed(5)
    given = {n: torch.randn_like(v) * 0.02 for n, v in plain_gpt().state_dict().items()}
    given["head.weight"] = given["wte.weight"]
    model = gpt(strategy)
    model.load_state_dict({n: _from_rank_zero(v) for n, v in given.items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = steps(model, optimizer)
    saved, saved_optimizer = state(model), copy.deepcopy(optimizer.state_dict())
    losses += steps(model, optimizer, first=3)
    model.load_state_dict(saved)
    optimizer.load_state_dict(saved_optimizer)
    losses += steps(model, optimizer, first=3)
    other = gpt("data")
    other.load_state_dict(saved)
    resumed = torch.optim.AdamW(other.parameters(), lr=1e-2)
    resumed.load_state_dict(saved_optimizer)
    losses += steps(other, resumed, first=3)
    assert losses[3:6] == losses[6:9]
    return {"losses": losses, **state(model), **{f"other.{n}": v for n, v in state(other).items()}}


def _from_rank_zero(value: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.broadcast(value, 0)
    return value


def frozen(strategy: str) -> Values:
    model = plain_gpt()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("blocks")
    model = autopar.parallelize(model, strategy=strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = steps(model, optimizer, 2)
    assert model.wte.weight.grad is None
    for parameter in model.parameters():
        parameter.requires_grad = True
    losses += steps(model, optimizer, 2, first=2)
    return {"losses": losses, **state(model)}


class Unused(nn.Module):
    """A parameter that forward does not read, checkpointed layers, an attribute that it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.unused = nn.Parameter(torch.randn(8, 8))
        self.aux_loss: Any = None

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        for layer in self.layers:
            x = checkpoint(lambda y, f=layer: torch.tanh(f(y)), x, use_reentrant=False)
        self.aux_loss = x.square().mean()
        return x.mean() * scale


def one_after_another(strategy: str) -> Values:
    """The memory of a first model is collected in the middle of a step of the second."""
    first = gpt(strategy)
    losses = steps(first, torch.optim.AdamW(first.parameters(), lr=1e-2), 1)
    first.cycle = first  # its memory is left to the garbage collector
    gone = weakref.ref(first)
    del first
    second = gpt(strategy)
    optimizer = torch.optim.AdamW(second.parameters(), lr=1e-2)
    optimizer.register_step_post_hook(lambda *_: gc.collect())
    losses += steps(second, optimizer)
    assert gone() is None
    return {"losses": losses, **state(second)}


def side_effects(strategy: str) -> Values:
    seed(0)
    model: Any = autopar.parallelize(Unused().double(), strategy=strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        loss = model(x, scale=2.0) + 0.1 * model.aux_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.item(), model.aux_loss.item()]
    assert model.unused.grad is None
    return {"losses": losses, **state(model)}


def huggingface(strategy: str) -> Values:
    entry = ZOO["hf_llama"]
    seed(0)
    model: Any = autopar.parallelize(entry.double(entry.build()), strategy=strategy)
    _, kwargs = entry.inputs(0)
    output = model(**kwargs)
    output.loss.backward()
    logits = model(input_ids=kwargs["input_ids"]).logits
    return {
        "loss": output["loss"].item(),
        "type": type(output).__name__,
        "logits": logits.detach(),
        **{n: whole(p.grad) for n, p in model.named_parameters()},
    }


@autopar.parallelize
class Decorated(GPT):
    """A docstring."""


class Derived(Decorated):
    pass


def decorated_class(strategy: str) -> Values:
    del strategy
    seed(0)
    model: Any = Decorated(VOCAB, layers=1, context=LENGTH)
    assert isinstance(model, Decorated) and isinstance(model, GPT)
    assert type(model).__name__ == "Decorated" and type(model).__doc__ == "A docstring."
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():  # initialised again, after it was made parallel
            parameter.normal_(std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = steps(model, optimizer)
    derived = Derived(VOCAB, layers=1, context=LENGTH).double()
    derived.load_state_dict(model.state_dict())
    return {"losses": losses, "derived": derived(*batch(9)).item(), **state(model)}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(6, 8, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.head(self.layers(x)[0]), x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.layers = nn.GRU(6, 6, 2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found, last = self.layers(self.up(x))
        return found.square().mean() + last.sum()


def gated(options: dict[str, Any]) -> Values:
    """In the last batches, some ranks have no row of a micro-batch."""
    seed(0)
    model: Any = autopar.parallelize(Gated().double(), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for rows in (4, 2, 1):
        x = torch.randn(rows, 4, 6, generator=torch.Generator().manual_seed(rows))
        loss = model(x.double())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, **state(model)}


def recurrent(strategy: str) -> Values:
    """Recurrent layers read a list of their parameters; of some batches, ranks have no row."""
    seed(0)
    model: Any = autopar.parallelize(Recurrent(), strategy=strategy).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(8, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = []
    for rows in (8, 3, 1):
        loss = model(x[:rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(model.eval()(x).item())
    return {"losses": losses, **state(model)}


def copied(strategy: str) -> Values:
    """Deep copies (an average of the weights, say) are parallel modules of their own."""
    model = gpt(strategy)
    early = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = steps(model, optimizer, 2)
    average = copy.deepcopy(model)
    losses += steps(model, optimizer, 2, first=2)
    with torch.no_grad():
        for mine, his in zip(average.parameters(), model.parameters(), strict=True):
            mine.lerp_(his, 0.5)
        losses += [average(*batch(7)).item(), early(*batch(7)).item(), model(*batch(7)).item()]
    return {"losses": losses, **state(average)}


def dropout_masks(strategy: str) -> Values:
    model = gpt(strategy, dropout=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seed(3)
    losses = steps(model, optimizer, 3)
    return {"losses": losses, **state(model)}


def autocast(strategy: str) -> Values:
    seed(0)
    model: Any = autopar.parallelize(GPT(VOCAB, layers=1, context=LENGTH), strategy=strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"bf16": losses}


def scaled(strategy: str) -> Values:
    """Loss scaling under fp16, with a gradient that is not finite on one rank only."""
    seed(0)
    model: Any = autopar.parallelize(GPT(VOCAB, layers=1, context=LENGTH), strategy=strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    losses, scales = [], []
    for step in range(5):
        with torch.autocast("cpu", torch.float16):
            loss = model(*batch(step))
        scaler.scale(loss).backward()
        if step == 1 and (not dist.is_initialized() or dist.get_rank() == 1):
            gradient = model.wte.weight.grad
            (local_of(gradient) if isinstance(gradient, DTensor) else gradient)[0, 0] = torch.inf
        if step != 3:
            scaler.unscale_(optimizer)
        if step == 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert scales[:2] == [1024.0, 512.0]
    return {"fp16": losses, "scales": torch.tensor(scales)}


def inductor(strategy: str) -> Values:
    backend = "inductor" if dist.is_initialized() else None
    seed(0)
    entry = ZOO["mlp"]
    model: Any = autopar.parallelize(entry.build().double(), strategy=strategy, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        loss = entry.step_loss(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, **state(model)}


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(6, 16), nn.Linear(16, 48)
        self.norm, self.score = nn.LayerNorm(16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        q, k, v = self.mix(self.norm(hidden)).chunk(3, -1)
        mixed = torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v
        scored: Tensor = self.score((hidden + nn.functional.softplus(mixed)).mean(1))
        return scored


def gradient_penalty(strategy: str) -> Values:
    """The norm of the gradient of the input is in the loss (Gulrajani et al. 2017)."""
    torch.manual_seed(1)
    model: Any = autopar.parallelize(Critic().double(), strategy=strategy)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        x = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(step)).double()
        x.requires_grad_()
        score = model(x)
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        loss = score.mean() + ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, **state(model)}


def inductor_gpt(strategy: str) -> Values:
    backend = "inductor" if dist.is_initialized() else None
    model: Any = autopar.parallelize(plain_gpt(0.1), strategy=strategy, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seed(2)
    return {"losses": steps(model, optimizer), **state(model)}


LOOPS: dict[str, Callable[[str], Values]] = {
    "adamw": with_optimizer(lambda p: torch.optim.AdamW(p, lr=1e-2)),
    "adamw_foreach": with_optimizer(lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True)),
    "adamw_fused": with_optimizer(lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)),
    "sgd_momentum": with_optimizer(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
}
LOOPS |= {
    loop.__name__: loop
    for loop in (
        optimizer_made_first,
        clipped,
        recurrent,
        scheduled,
        accumulated,
        shared_gradients,
        two_forwards,
        loss_outside,
        batch_sizes,
        evaluated,
        checkpointed,
        frozen,
        one_after_another,
        side_effects,
        huggingface,
        decorated_class,
        copied,
        dropout_masks,
        autocast,
        scaled,
        inductor,
        gradient_penalty,
        inductor_gpt,
    )
}


def run_loop(name: str, strategy: str) -> Values:
    """Pickled by name: what the ranks are asked to run."""
    return LOOPS[name](strategy)


def differences(mine: Values, reference: Values, tolerance: float) -> Iterator[str]:
    """What is not the same, as sentences; tensors relative to their own largest element."""
    assert mine.keys() == reference.keys()
    for name, wanted in reference.items():
        got = mine[name]
        if isinstance(wanted, (str, int)):
            if got != wanted:
                yield f"{name}: {got!r}, not {wanted!r}"
            continue
        a = torch.as_tensor(got, dtype=torch.float64)
        b = torch.as_tensor(wanted, dtype=torch.float64)
        if a.shape != b.shape:
            yield f"{name}: shape {tuple(a.shape)}, not {tuple(b.shape)}"
            continue
        error = (a - b).abs().max() / b.abs().max().clamp(min=1e-3)
        if not error <= tolerance:
            yield f"{name} differs by {error:.1e}"
