"""Training loops as people write them, under plans of several micro-batches.

Each returns what one device and many ranks must agree on; `parallel` is None on one device, else
the text of the plan.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import autopar
from autopar.errors import UserError
from autopar.plan import plan_from_json
from tests.e2e.loops import VOCAB, Values, batch, seed, state, steps, whole
from tests.zoo.language import GPT

Plain = Callable[[], nn.Module]


def gpt(dropout: float = 0.0) -> nn.Module:
    seed(0)
    return GPT(VOCAB, dropout=dropout, layers=2, context=16).double()


def made(plain: nn.Module, plan: str | None, **options: Any) -> Any:
    """The module on one device, or under a plan."""
    given = plan_from_json(plan) if plan is not None else None
    return autopar.parallelize(plain, plan=given, **options)


def adamw(plan: str | None) -> Values:
    model = made(gpt(), plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    return {"losses": steps(model, optimizer), **state(model)}


def dropout(plan: str | None) -> Values:
    model = made(gpt(0.3), plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seed(3)
    return {"losses": steps(model, optimizer), **state(model)}


def accumulated(plan: str | None) -> Values:
    """Gradients add up over calls; each loss is divided by the user."""
    model = made(gpt(), plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        (model(*batch(step)) / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    return state(model)


def clipped(plan: str | None) -> Values:
    """`clip_grad_norm_` gives one device's norm; a schedule sets the rates."""
    model = made(gpt(), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
    norms = []
    for step in range(3):
        model(*batch(step)).backward()
        norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {"norms": torch.stack(norms), "lr": scheduler.get_last_lr(), **state(model)}


def ignored(plan: str | None) -> Values:
    """Targets that are ignored, most of them in one micro-batch."""
    model = made(gpt(), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(2):
        ids, targets = batch(step)
        targets = targets.clone()
        targets[: 2 + step, 3:] = -100
        targets[-1, :5] = -100
        loss = model(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, **state(model)}


def batch_sizes(plan: str | None) -> Values:
    """A ragged last batch, one of a single row, one that no count of micro-batches divides."""
    model = made(gpt(), plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, size in enumerate((8, 6, 1, 7, 16, 8)):
            loss = model(*batch(step, size))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return {"losses": losses, **state(model)}


def evaluated(plan: str | None) -> Values:
    """Evaluation before and between steps: with and without a loss, under both modes."""
    model = made(gpt(0.2), plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seed(1)
    losses = []
    for step in range(2):
        model.eval()
        with torch.no_grad():
            losses.append(model(*batch(10)).item())
        with torch.inference_mode():
            losses.append(model(batch(11)[0]).sum().item())
        model.train()
        with torch.no_grad():
            losses.append(model(*batch(12)).item())
        losses += steps(model, optimizer, 1, step)
    return {"losses": losses, **state(model)}


def hooked(plan: str | None) -> Values:
    """Hooks of parameters and of the module run once per step, and may change gradients."""
    model = made(gpt(), plan)
    calls: list[str] = []
    norms: list[float] = []

    def halved(gradient: Tensor) -> Tensor:
        calls.append("gradient")
        return gradient / 2

    def after(parameter: Tensor) -> None:
        calls.append("accumulated")
        norms.append(whole(parameter.grad).norm().item())

    model.head.weight.register_hook(halved)
    model.norm.weight.register_post_accumulate_grad_hook(after)

    def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append("after")
        return output * 2

    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.register_forward_hook(doubled)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = steps(model, optimizer, 2)
    return {"losses": losses, "norms": norms, "calls": " ".join(sorted(calls)), **state(model)}


def backward_twice(plan: str | None) -> Values:
    """A second backward raises; with `retain_graph` it adds the same gradients again."""
    model = made(gpt(), plan)
    loss = model(*batch(0))
    loss.backward(retain_graph=True)
    once = {n: whole(p.grad) for n, p in model.named_parameters()}
    (2 * loss).backward()
    thrice = {f"{n} thrice": whole(p.grad) for n, p in model.named_parameters()}
    try:
        loss.backward()
        said = "nothing"
    except RuntimeError as error:
        said = str(error)[:60]
    return {"said": said, **once, **thrice}


def two_forwards(plan: str | None) -> Values:
    model = made(gpt(), plan)
    first, second = model(*batch(0)), model(*batch(1))
    (first + 2 * second).backward()
    return {n: whole(p.grad) for n, p in model.named_parameters()}


def resumed(plan: str | None) -> Values:
    """`state_dict` of model and optimizer, and back, into another model."""
    model = made(gpt(), plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = steps(model, optimizer, 2)
    saved, moments = state(model), optimizer.state_dict()
    other = made(gpt(), plan)
    other.load_state_dict(saved)
    again = torch.optim.AdamW(other.parameters(), lr=1e-2)
    again.load_state_dict(moments)
    losses += steps(other, again, 2, first=2)
    return {"losses": losses, **state(other)}


def single() -> nn.Module:
    """The same in float32."""
    return gpt().float()


def autocast(plan: str | None) -> Values:
    model = made(single(), plan)
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


def scaled(plan: str | None) -> Values:
    """GradScaler: a first scale that overflows half precision, a loss that is infinite, growth."""
    model = made(single(), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=3)
    losses, scales = [], []
    for step in range(12):
        with torch.autocast("cpu", torch.float16):
            loss = model(*batch(step))
        scaler.scale(loss * (float("inf") if step == 9 else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert scales[0] < 2.0**26 and scales[9] < scales[8], scales
    return {"scales": " ".join(map(str, scales)), "losses": losses}


LOOPS: dict[str, Callable[[str | None], Values]] = {
    loop.__name__: loop
    for loop in (
        adamw,
        dropout,
        accumulated,
        clipped,
        ignored,
        batch_sizes,
        evaluated,
        hooked,
        backward_twice,
        two_forwards,
        resumed,
        autocast,
        scaled,
    )
}


def run_micro_loop(name: str, plan: str | None) -> Values:
    """Pickled by name: what the ranks are asked to run."""
    return LOOPS[name](plan)


class Metrics(nn.Module):
    """A loss with what people return beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        scores = self.layer(x)
        loss = nn.functional.cross_entropy(scores, y)
        hits = (scores.argmax(-1) == y).sum()
        return {"loss": loss, "scores": scores, "hits": hits, "perplexity": loss.detach().exp()}


class Normed(nn.Module):
    """Batch normalisation, whose statistics depend on who is in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.last(self.norm(self.first(x)).relu()), y)


def normed_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(4, (16,), generator=generator)


def normed(plan: str | None, micro_batches: int) -> Values:
    """Statistics of each micro-batch: what a loop over them gives on one device."""
    seed(0)
    plain = Normed().double()
    model = made(plain, plan, micro_batch_statistics=True) if plan is not None else plain
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(3):
        x, y = normed_batch(step)
        if plan is not None:
            loss = model(x, y)
            loss.backward()
            losses.append(loss.item())
        else:
            parts = [
                model(a, b) / micro_batches
                for a, b in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True)
            ]
            torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]
            losses.append(sum(part.item() for part in parts))
        optimizer.step()
        optimizer.zero_grad()
    kept = {n: v for n, v in state(model).items() if "num_batches" not in n}
    return {"losses": losses, **kept}


def limited(memory_limit: float | None) -> tuple[int, Values]:
    """How many micro-batches a limit on memory brings, and what one device computes."""
    seed(0)
    plain = GPT(VOCAB, layers=2, context=16)
    model: Any = autopar.parallelize(plain, memory_limit=memory_limit)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(3):
        loss = model(*batch(step, 64))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    plan = model.autopar.plan
    return 1 if plan is None else plan.micro_batches, {"losses": losses}


def refused_model(plan: str) -> str:
    seed(0)
    model = made(Normed().double(), plan)
    try:
        model(*normed_batch(0))
    except UserError as error:
        return str(error)
    return "nothing"


def refused_gradient(plan: str | None) -> str:
    """The error of a backward from something else than the loss."""
    seed(0)
    model = made(Metrics().double(), plan)
    x = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = model(x, torch.arange(8) % 4)
    out["loss"].backward()
    again = model(x, torch.arange(8) % 4)
    try:
        (again["loss"] + again["scores"].square().mean()).backward()
    except UserError as error:
        return str(error)
    return "nothing"
