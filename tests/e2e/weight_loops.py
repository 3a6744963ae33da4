"""Loops that do with weights, gradients and attributes what tensors and modules allow.

Each returns what one device and many ranks must agree on; `make` makes a module parallel, or leaves
it as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import autopar
from autopar.errors import UserError
from tests.e2e.loops import Values, seed, state, whole

Make = Callable[[nn.Module], Any]
SCALE = {"now": 1.0}  # forward reads it


def halved(hidden: Tensor) -> Tensor:
    """Instead of a layer, from its 16 features to 8."""
    return hidden[:, ::2] * 0.5


def doubled(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """What the layer gives, twice."""
    old = layer.forward
    return lambda hidden: old(hidden) * 2


class Rates:
    """A namespace of numbers that forward reads."""

    loss = 1.0


class Small(nn.Module):
    """A loss, with a weight whose first dim no two ranks divide, and plain values that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.penalty = 0.0
        self.title = "small"

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        if self.title == "untitled":
            raise ValueError("a model needs a title")
        hidden = self.table(ids)
        hidden = hidden + self.down(self.up(hidden).relu())
        scores = self.norm(hidden) @ self.table.weight.t()
        loss = nn.functional.cross_entropy(scores, targets) * SCALE["now"]
        return Rates.loss * loss + self.penalty * scores.square().mean()


def small(make: Make, number: int = 0) -> Any:
    seed(number)
    return make(Small().double())


def batch(step: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(step))
    return ids[0], ids[1]


def steps(model: Any, optimizer: Any, first: int = 0, last: int = 2) -> list[float]:
    losses = []
    for step in range(first, last):
        loss = model(*batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def kept_from_before(make: Make) -> Values:
    """Momentum by hand, averages and a copy that are older than the plan."""
    model = small(make)
    momentum = [torch.zeros_like(p) for p in model.parameters()]
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    averaged = AveragedModel(model)
    losses = []
    for step in range(2):
        loss = model(*batch(step))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(loss.item())
        with torch.no_grad():
            for p, g, m in zip(model.parameters(), gradients, momentum, strict=True):
                m.mul_(0.9).add_(g)
                p -= 0.1 * m
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 0.1)
        averaged.update_parameters(model)
    for name, p in model.named_parameters():
        p.data = average[name]
    with torch.no_grad():
        losses += [model(*batch(5)).item(), averaged(*batch(5)).item()]
    return {"losses": losses, **state(model)}


def data_is_set(make: Make) -> Values:
    """`parameter.data = ...`, vectors of all parameters, single elements and rows."""
    model = small(make)
    optimizer = adamw(model)
    losses = steps(model, optimizer, 0, 1)
    for p in model.parameters():
        p.data = p.data * 0.9
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 0.9, model.parameters())
    with torch.no_grad():
        model.up.weight[0].zero_()
        model.up.weight[1:3] *= 2
        model.down.weight[:, 0] = 0.25
        model.table.weight[4, 2] = 1.5
        model.up.weight.t()[3].add_(0.5)
        model.norm.bias[::2] = 0.125
    losses += steps(model, optimizer, 1, 3)
    read = torch.tensor(model.up.weight.tolist(), dtype=torch.float64)
    assert (model.up.weight.detach().numpy() == read.numpy()).all()
    return {"losses": losses, "read": read, **state(model)}


def drawn_again(make: Make) -> Values:
    """Weights that are initialised again, noise on gradients and weights."""
    model = small(make)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = steps(model, optimizer, 0, 1)
    seed(3)
    model.up.reset_parameters()
    nn.init.orthogonal_(model.down.weight)
    nn.init.trunc_normal_(model.table.weight, std=0.02)
    model(*batch(1)).backward()
    for p in model.parameters():
        p.grad.add_(torch.randn_like(p.grad), alpha=0.01)
    optimizer.step()
    optimizer.zero_grad()
    return {"losses": [*losses, *steps(model, optimizer, 2, 3)], **state(model)}


def ordinary_tensors(make: Make) -> Values:
    """Masks and targets of weights that every rank has, penalties on weights beside the loss."""
    model = small(make)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    losses = []
    mask = torch.arange(128).view(16, 8).double() % 3
    for step in range(2):
        loss = model(*batch(step)) + 1e-2 * sum(p.square().sum() for p in model.parameters())
        loss = loss + 1e-3 * (model.up.weight - mask).abs().sum() + 1e-3 * model.down.weight.norm()
        loss.backward()
        model.up.weight.grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, **state(model)}


def values_change(make: Make) -> Values:
    """Attributes, globals and hooks that forward reads, and dtypes, change between steps."""
    model = small(make)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = steps(model, optimizer, 0, 1)
    model.penalty = 0.5
    losses += steps(model, optimizer, 1, 2)
    SCALE["now"] = 2.0
    losses += steps(model, optimizer, 2, 3)
    SCALE["now"], Rates.loss = 1.0, 3.0
    losses += steps(model, optimizer, 2, 3)
    Rates.loss = 1.0
    model.down.forward = halved
    losses += steps(model, optimizer, 2, 3)
    del model.down.forward
    model.down.forward = doubled(model.down)
    losses += steps(model, optimizer, 2, 3)
    del model.down.forward
    hook = model.up.register_forward_hook(lambda module, inputs, output: output * 2)
    losses += steps(model, optimizer, 3, 4)
    hook.remove()
    losses += steps(model, optimizer, 4, 5)
    exact = state(model)
    model.float()
    rounded = steps(model, optimizer, 5, 6)
    model.double()
    assert abs(rounded[0] - model(*batch(5)).item()) < 0.5
    return {"losses": losses, **exact}


def notes_of_rank_zero(make: Make) -> Values:
    """Rank 0 alone leaves on the model what forward reads, to no effect on its result."""
    model = small(make)
    optimizer = adamw(model)
    losses = steps(model, optimizer)
    for step in range(2):
        model.eval()
        with torch.no_grad():
            losses += [model(*batch(step)).item() for _ in range(2)]
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            model.title = f"best of {step}"
        with torch.no_grad():
            losses += [model(*batch(step)).item() for _ in range(2)]
        model.train()
        losses += steps(model, optimizer, step, step + 1)
    return {"losses": losses, **state(model)}


def layers_before_the_first_call(make: Make) -> Values:
    """Layers that are replaced after the model was made parallel, and before it has a plan."""
    model = small(make)
    torch.manual_seed(7)
    model.up = nn.Linear(8, 16).double()
    optimizer = adamw(model)
    return {"losses": steps(model, optimizer), **state(model)}


def copied_with_gradients(make: Make) -> Values:
    """A copy while there are gradients; hooks of the optimizer see the state of its step."""
    model = small(make)
    optimizer = adamw(model)
    norms: list[float] = []
    optimizer.register_step_post_hook(
        lambda own, *_: norms.append(own.state[model.up.weight]["exp_avg"].norm().item())
    )
    losses = steps(model, optimizer, 0, 1)
    model(*batch(1)).backward()
    other = copy.deepcopy(model)
    assert all(p.grad is None for p in other.parameters())
    kept = copy.deepcopy({n: p.grad for n, p in model.named_parameters()})
    optimizer.step()
    losses += steps(other, adamw(other), 2, 3)
    gradients = {f"{n} gradient": whole(g) for n, g in kept.items()}
    return {"losses": losses, "norms": norms, **gradients, **state(model)}


def wrong_indices(make: Make) -> Values:
    """A batch with an index that is in no table is the same error everywhere, and is survived."""
    model = small(make)
    optimizer = adamw(model)
    losses = steps(model, optimizer, 0, 1)
    said, random = [], torch.get_rng_state()
    for place in (0, 1):
        given = [t.clone() for t in batch(1)]
        given[place][0] = 11
        try:
            model(*given).backward()
        except (IndexError, RuntimeError) as error:
            said.append(type(error).__name__)
    unmoved = float(torch.equal(random, torch.get_rng_state()))
    optimizer.zero_grad()
    losses += steps(model, optimizer, 1)
    return {"said": " ".join(said), "unmoved": unmoved, "losses": losses}


def on_one_rank(make: Make) -> Values:
    """Rank 0 alone compares weights with ordinary tensors: nobody else has to take part."""
    model = small(make)
    optimizer = adamw(model)
    losses = steps(model, optimizer, 0, 1)
    before = state(model)
    losses += steps(model, optimizer, 1, 2)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        for name, parameter in model.named_parameters():
            change = parameter.detach() - before[name]
            change *= before[name]
            assert repr(parameter) and repr(change)
    return {"losses": [*losses, *steps(model, optimizer, 2)], **state(model)}


def printed(make: Make) -> Values:
    """What logs say of weights and gradients, and comparisons."""
    model = small(make)
    optimizer = adamw(model)
    losses = steps(model, optimizer, 0, 1)
    model(*batch(1)).backward()
    lines = []
    for name, p in model.named_parameters():
        lines.append(f"{name} {p.norm():.6f} {p.detach().mean():>9.6f} {p.grad.abs().max():.3e}")
        lines.append(f"{torch.isfinite(p.grad).all()} {p.detach().std().item():.6f} {p.shape}")
    kept = model.up.weight.detach().clone()
    lines.append(str([torch.equal(kept, model.up.weight), (kept == model.up.weight).all().item()]))
    optimizer.step()
    lines.append(str([torch.equal(kept, model.up.weight), torch.allclose(kept, model.up.weight)]))
    total = torch.zeros((), dtype=torch.float64)
    for p in model.parameters():
        total += p.detach().square().sum()
    with torch.inference_mode():
        losses += [model.up.weight.norm().item(), total.item()]
    return {"lines": "\n".join(lines), "losses": losses}


def written_from_numpy(make: Make) -> Values:
    """Rows and all of weights from arrays that change later, masks on gradients."""
    model = small(make)
    optimizer = adamw(model)
    losses = steps(model, optimizer, 0, 1)
    for p in model.parameters():
        array = torch.arange(p.numel(), dtype=torch.float64).view(p.shape).numpy() * 1e-3
        p.data = torch.from_numpy(array.copy())
        p.data[0] = torch.as_tensor(array[0] + 0.5)
        p.data.add_(torch.from_numpy(array))
    model.down.weight.data[model.down.weight.data.abs() < 0.05] = 0
    model(*batch(1)).backward()
    for p in model.parameters():
        p.grad.mul_(torch.arange(p.numel()).view(p.shape) % 3)
    optimizer.step()
    optimizer.zero_grad()
    return {"losses": [*losses, *steps(model, optimizer, 2, 4)], **state(model)}


LOOPS: dict[str, Callable[[Make], Values]] = {
    loop.__name__: loop
    for loop in (
        kept_from_before,
        data_is_set,
        drawn_again,
        ordinary_tensors,
        values_change,
        notes_of_rank_zero,
        layers_before_the_first_call,
        copied_with_gradients,
        wrong_indices,
        on_one_rank,
        printed,
        written_from_numpy,
    )
}


def run_weight_loop(name: str, options: dict[str, Any] | None) -> Values:
    """Pickled by name: what the ranks are asked to run; on one device without options."""
    if options is None:
        return LOOPS[name](lambda module: module)
    return LOOPS[name](lambda module: autopar.parallelize(module, **options))


@autopar.parallelize(strategy="zero")
class Decorated(Small):
    pass


def refused_without_memory() -> str:
    """What was made of parameters that had no memory meets them when they have."""
    seed(0)
    model: Any = Decorated()
    average = [p.detach().clone() for p in model.parameters()]
    steps(model, adamw(model), 0, 1)
    try:
        average[1].lerp_(model.up.weight.detach(), 0.1)
    except UserError as error:
        return str(error)
    return "nothing"


def _by_gradient(model: Any, value: float) -> None:
    model(*batch(0)).backward()
    model.up.weight.grad = model.up.weight.grad * torch.full((8,), value).double()
    adamw(model).step()


def _by_average(model: Any, value: float) -> None:
    average = model.up.weight.detach().clone()
    average.lerp_(torch.full((16, 8), value).double(), 0.5)
    model.up.weight.data[1:].copy_(average[1:])


WRITES: dict[str, Callable[[Any, float], Any]] = {
    "data": lambda model, v: setattr(model.up.weight, "data", torch.full((16, 8), v).double()),
    "row": lambda model, v: model.up.weight.data[0].copy_(torch.full((8,), v)),
    "gradient": _by_gradient,
    "average": _by_average,
    "state dict": lambda model, v: model.up.load_state_dict(
        {"weight": torch.full((16, 8), v).double(), "bias": torch.zeros(16).double()}
    ),
}


def refused(options: dict[str, Any]) -> list[str]:
    """The errors of what a plan cannot follow."""
    model = small(lambda module: autopar.parallelize(module, **options))
    steps(model, adamw(model), 0, 1)
    said = []
    try:
        model.up.weight.data = torch.zeros(4, 8).double()
    except UserError as error:
        said.append(str(error))
    for write in WRITES.values():
        write(model, float(torch.distributed.get_rank()))
        try:
            model(*batch(0))
        except UserError as error:
            said.append(str(error))
        for p in model.parameters():
            p.data = torch.ones(p.shape).double()
    model.up = nn.Linear(8, 16).double()
    try:
        model(*batch(0))
    except UserError as error:
        said.append(str(error))
    return said


def refused_then_right() -> tuple[list[str], list[float]]:
    """The errors of models that are not the same on all ranks, and the losses when they are."""
    model = small(autopar.parallelize)
    optimizer = adamw(model)
    losses = steps(model, optimizer, 0, 1)
    first = torch.distributed.get_rank() == 0
    said = []
    for name, wrong, right in (
        ("penalty", 0.5, 0.0),  # while no rank has a capture of it
        ("penalty", 0.5, 0.0),
        ("title", "untitled", "small"),
    ):
        setattr(model, name, wrong if first else right)
        try:
            steps(model, optimizer, 1, 2)
        except (UserError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
        setattr(model, name, right)
    return said, losses + steps(model, optimizer, 1)
