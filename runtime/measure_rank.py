"""One rank of a plan, run by itself: its own program on its own shards, collectives stood in for.

So one device checks the compute of a plan for any number of them. Parameters and inputs are random
(`autopar.runtime.random_values`), groups have one member that exists (`autopar.runtime.alone`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autopar.errors import UserError
from autopar.ir.graph import Graph, value_of
from autopar.ir.mesh import Mesh
from autopar.units import bytes_text

from .alone import alone_groups
from .family_times import family_times
from .live_memory import free_bytes, peak_bytes
from .phase_clock import STAND_INS, PhaseClock
from .program import Program, load_program
from .random_values import given_or_random, random_tensor

PHASES = ("forward", "backward", "optimizer")
SEED = 0
HEADROOM = 0.95  # of the free memory may be used


@dataclass(frozen=True)
class Measured:
    """Medians over steps of one rank's training step, in seconds and bytes.

    `step_s` is that of all phases together; what stood in for collectives is in none of them, and
    given as `stand_ins_s`. `families` are kernel seconds of one watched step.
    """

    step_s: float
    forward_s: float
    backward_s: float
    optimizer_s: float
    stand_ins_s: float
    memory_bytes: int
    families: Mapping[str, float]
    steps: int


def check_device(name: str) -> torch.device:
    """The device of that name; raises UserError where this machine has none."""
    if name not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}", fix="use cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device that torch can use", fix="use cpu")
    if name == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def check_fits(needed: float, rank: int, device: torch.device) -> None:
    """Raise UserError where a rank needs more bytes than are free."""
    free = free_bytes(device) * HEADROOM
    if needed > free:
        raise UserError(
            f"rank {rank} needs about {bytes_text(needed)}, and {device.type} has "
            f"{bytes_text(free)} free: {bytes_text(needed - free)} too little",
            fix="measure a plan for more devices or a smaller batch, or use a larger device",
        )


class RankAlone:
    """A rank's lowered program with random parameters and inputs, and an optimizer of them."""

    def __init__(
        self,
        lowered: Graph,
        mesh: Mesh,
        rank: int,
        device: torch.device,
        *,
        given: Mapping[str, Tensor],
        bounds: Mapping[str, int],
        optimizer: str = "adamw",
        micro_batches: int = 1,
    ) -> None:
        """`given` are the inputs, buffers and constants that exist, by placeholder.

        `bounds` say below which number the integers of a placeholder have to be.
        """
        self.device = device
        self.clock = PhaseClock(device)
        self.micro_batches = micro_batches
        self._generator = torch.Generator(device).manual_seed(SEED)
        self.parameters: list[nn.Parameter] = []
        graph = self._with_constants(lowered, given, bounds)
        groups = alone_groups(graph, mesh, rank, self.clock)
        self.program: Program = load_program(graph, groups, device=device)
        self.arguments = self._arguments(graph, given, bounds)
        trained = [p for p in self.parameters if p.requires_grad]
        self.optimizer = make_optimizer(optimizer, trained, device)
        self._gradients: dict[int, Tensor] = {}

    def _with_constants(
        self, lowered: Graph, given: Mapping[str, Tensor], bounds: Mapping[str, int]
    ) -> Graph:
        """The graph with values in place of constants on `meta`."""
        graph = lowered.copy()
        for node in graph.placeholders("constant"):
            held = given.get(node.name, node.meta["tensor"])
            node.meta["tensor"] = given_or_random(
                held, value_of(node), self._generator, bounds, node.name
            )
        return graph

    def _arguments(
        self, graph: Graph, given: Mapping[str, Tensor], bounds: Mapping[str, int]
    ) -> list[Any]:
        """What the program is called with; parameters are collected."""
        found: list[Any] = []
        for node in graph.placeholders():
            role, names = node.meta["role"], node.meta["fqns"]
            if role == "seed":
                found.append(SEED)
            elif role == "constant":
                found.append(self.program.constants[names[0]])
            elif role == "param":
                value = value_of(node)
                x = random_tensor(value, self._generator, name=names[0])
                self.parameters.append(nn.Parameter(x, requires_grad=value.requires_grad))
                found.append(self.parameters[-1])
            else:
                value = value_of(node)
                x = given_or_random(given.get(node.name), value, self._generator, bounds, node.name)
                found.append(x.requires_grad_(value.requires_grad))
        return found

    # -- a step -----------------------------------------------------------------------------------

    def step(self) -> None:
        """Forward and backward of every micro-batch, and the update; nothing is waited for."""
        clock = self.clock
        for _ in range(self.micro_batches):
            with clock.phase("forward"):
                outputs = self.program.run(*self.arguments)[: self.program.outputs]
            with clock.phase("backward"):
                self._backward(outputs)
            del outputs
        with clock.phase("optimizer"):
            if self.optimizer is not None:
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self.optimizer is None:
            for parameter in self.parameters:
                parameter.grad = None

    def _backward(self, outputs: Sequence[Tensor]) -> None:
        """From the scalars among the outputs, or from given gradients if there are none."""
        trained = [y for y in outputs if y.requires_grad]
        losses = [y for y in trained if y.dim() == 0] or trained
        if losses:
            torch.autograd.backward(losses, [self._gradient(i, y) for i, y in enumerate(losses)])

    def _gradient(self, index: int, like: Tensor) -> Tensor:
        """The gradient of an output: ones, made once."""
        if index not in self._gradients:
            self._gradients[index] = torch.ones_like(like)
        return self._gradients[index]

    def tensors(self) -> list[Tensor]:
        """Everything that is kept between steps."""
        held = [a for a in self.arguments if isinstance(a, Tensor)]
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                held += [x for x in state.values() if isinstance(x, Tensor)]
        return [*held, *self._gradients.values()]

    @property
    def given_bytes(self) -> int:
        """Bytes of inputs, buffers and constants, of which the rank alone makes its own parts."""
        mine = set(map(id, self.parameters))
        return sum(a.nbytes for a in self.arguments if isinstance(a, Tensor) and id(a) not in mine)

    def measure(self, steps: int, warmup: int) -> Measured:
        """Run `warmup` steps, then time `steps` of them; memory and families take one each."""
        for _ in range(max(warmup, 1)):  # the first makes the optimizer's state
            self.step()
        self.clock.take()
        taken = []
        for _ in range(steps):
            self.step()
            taken.append(self.clock.take())
        memory = peak_bytes(self.step, self.device, self.tensors())
        families = family_times(self.step, self.device)
        self.clock.take()

        def median(names: Sequence[str]) -> float:
            return statistics.median(sum(t.get(n, 0.0) for n in names) for t in taken)

        stand_ins = [f"{phase} {STAND_INS}" for phase in PHASES]
        return Measured(
            step_s=median(PHASES),
            forward_s=median(["forward"]),
            backward_s=median(["backward"]),
            optimizer_s=median(["optimizer"]),
            stand_ins_s=median(stand_ins),
            memory_bytes=memory,
            families=families,
            steps=steps,
        )


def make_optimizer(
    kind: str, parameters: Sequence[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer | None:
    """The fused optimizer that a plan prices as `kind`; None for "none" or without parameters."""
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": partial(torch.optim.AdamW, fused=True),
        "adam": partial(torch.optim.Adam, fused=True),
        "sgd": partial(torch.optim.SGD, fused=True),
        "sgd_momentum": partial(torch.optim.SGD, momentum=0.9, fused=True),
        # Fused kernels of these two are not for every device.
        "adagrad": partial(torch.optim.Adagrad, fused=device.type == "cpu"),
        "rmsprop": partial(torch.optim.RMSprop, foreach=True),
    }
    if kind == "none" or not parameters:
        return None
    return makers.get(kind, makers["adamw"])(parameters, lr=1e-4)
