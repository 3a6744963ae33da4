"""One rank's training step on micro-batches, behind the loss that an ordinary loop sees.

The forward of the user's loop runs the forwards and backwards of all micro-batches; the loss it
returns has one autograd node, whose backward gives every parameter its gradient times what the
backward of the user's loop begins with. So hooks, gradient accumulation, clipping and scalers see
one gradient per step, and a second backward raises what it raises for any graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autopar.compat import keeps_graph
from autopar.errors import UserError

from .step_parts import BodyPart, Engine
from .step_piece import Key, PartProgram, PartRun, load_part

__all__ = ["FIRST_SCALE", "Key", "LocalEngine", "PartProgram", "PartRun", "Step", "load_part"]

FIRST_SCALE = 65536.0  # what torch.amp.GradScaler begins with


class LocalEngine:
    """Runs a model that is in one piece: forward and backward of one micro-batch after another."""

    def train(self, parts: Sequence[BodyPart], micro_batches: int) -> None:
        """Forward and backward of all micro-batches."""
        (part,) = parts
        for k in range(micro_batches):
            (objective,) = part.run(k, ())
            objective.backward()  # type: ignore[no-untyped-call]

    def evaluate(self, parts: Sequence[BodyPart], micro_batches: int) -> None:
        """Forward of all micro-batches."""
        (part,) = parts
        for k in range(micro_batches):
            part.run(k, ())


class Step:
    """One rank's step: the pieces that it has, and the engine that runs them.

    `loss` says which of the user's results is the loss (None without gradients), and
    `differentiable` which of them have a gradient on one device. `scale` is the gradient that the
    backwards inside begin with: 1, unless half precision could lose small gradients. Then it is
    what the user's last backward began with (a GradScaler's scale, say), and where that changes the
    step is run again with it, so that it overflows where one device overflows.
    """

    def __init__(self, parts: Sequence[PartProgram], engine: Engine, micro_batches: int) -> None:
        self.parts, self.engine, self.micro_batches = tuple(parts), engine, micro_batches
        self.half = any(part.half for part in parts)
        self.scale = FIRST_SCALE if self.half else 1.0
        self.loss, self.differentiable = parts[-1].loss, parts[-1].differentiable

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the pieces of this rank read."""
        found: dict[str, None] = {}
        for part in self.parts:
            for program in (part.prologue, part.body, part.tail):
                named = (n[0] for role, n in program.placeholders if role == "param")
                found.update(dict.fromkeys(named))
        return tuple(found)

    @property
    def schedule(self) -> str:
        """Digest of the collectives of all programs: equal on all ranks that run the same ones."""
        return " ".join(part.schedule for part in self.parts)

    @property
    def is_random(self) -> bool:
        return any(part.is_random for part in self.parts)

    def run(
        self, parameters: Mapping[str, Tensor], given: Mapping[Key, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """What the user's code returns for a batch, and new values of buffers.

        `parameters` are this rank's local tensors by name; where gradients are on, the loss has a
        backward that gives them theirs. `given` has inputs, buffers and the seed by role and name.
        """
        trained = torch.is_grad_enabled() and self.loss is not None
        if not trained:
            with torch.no_grad():
                return self._forward(parameters, given, training=False)[:2]
        for value in given.values():
            if isinstance(value, Tensor) and value.requires_grad:
                raise UserError(
                    "an input of the model requires a gradient, which a step on micro-batches "
                    "does not compute",
                    fix="detach the input, or run without micro-batches",
                )
        call = _Call(self, tuple(parameters), given)
        outputs = _Whole.apply(call, *parameters.values())  # type: ignore[no-untyped-call]
        made = tuple(outputs[call.place[i]] if i in call.place else x for i, x in call.rest)
        call.rest = []  # the call may live as long as the loss
        return made, call.updates

    def _forward(
        self, parameters: Mapping[str, Tensor], given: Mapping[Key, Any], training: bool
    ) -> tuple[tuple[Any, ...], dict[str, Tensor], dict[str, Tensor]]:
        """Outputs, new buffers and gradients (times the internal scale)."""
        known = {**given, **{("param", name): p for name, p in parameters.items()}}
        runs = [PartRun(p, known, self.micro_batches, self.scale, training) for p in self.parts]
        device = next((p.device.type for p in parameters.values()), "cpu")
        with torch.autocast(device, enabled=False):  # the programs have their casts
            for run in runs:
                run.prepare()
            bodies = [run.body() for run in runs]
            with torch.set_grad_enabled(training):
                engine = self.engine
                (engine.train if training else engine.evaluate)(bodies, self.micro_batches)
            del bodies
            outputs, updates = self.finish(runs)
            gradients = self.gradients(runs) if training else {}
        return outputs, updates, gradients

    def gradients(self, runs: Sequence[PartRun]) -> dict[str, Tensor]:
        """The gradient of every parameter of this rank that has one, by name."""
        found: dict[str, Tensor] = {}
        for run in runs:
            for name, gradient in run.gradients().items():
                found[name] = found[name] + gradient if name in found else gradient
        return found

    def finish(self, runs: Sequence[PartRun]) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """Results of the last piece; new buffers of all of them."""
        outputs: tuple[Any, ...] = ()
        updates: dict[str, Tensor] = {}
        for run in runs:
            outputs, new = run.finish()
            updates |= new
        return outputs, updates


@dataclass
class _Call:
    """One call of a step: what goes into its autograd node beside tensors, and what comes out."""

    step: Step
    names: tuple[str, ...]
    given: Mapping[Key, Any]
    rest: list[tuple[int, Any]] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)
    updates: dict[str, Tensor] = field(default_factory=dict)


class _Whole(torch.autograd.Function):
    """All of a step as one node of the user's graph."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *parameters: Tensor) -> tuple[Tensor, ...]:
        step = call.step
        named = dict(zip(call.names, parameters, strict=True))
        with torch.enable_grad():
            outputs, call.updates, gradients = step._forward(named, call.given, training=True)
        call.rest = list(enumerate(outputs))
        tensors: list[Tensor] = []
        for i, value in call.rest:
            if isinstance(value, Tensor):
                call.place[i] = len(tensors)
                tensors.append(value.detach())
        assert step.loss is not None
        ctx.step, ctx.loss = step, call.place[step.loss]
        ctx.has = tuple(name in gradients for name in call.names)
        ctx.scale, ctx.names = step.scale, call.names
        ctx.again = (named, call.given) if step.half else None
        ctx.save_for_backward(*(gradients[name] for name in call.names if name in gradients))
        ctx.set_materialize_grads(False)
        fixed = [tensors[at] for i, at in call.place.items() if not step.differentiable[i]]
        ctx.mark_non_differentiable(*fixed)
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UserError(
                "gradients of gradients (create_graph=True) are asked for, and the backward of the "
                "micro-batches is over",
                fix="plan without a pipeline and micro-batches, or leave create_graph out",
            )
        seed = given[ctx.loss]
        if any(g is not None for i, g in enumerate(given) if i != ctx.loss):
            raise UserError(
                "a gradient arrives for a result that is not the loss, and the backward of the "
                "micro-batches is over",
                fix="add all terms of the loss inside forward, return their sum, and call backward "
                "on that",
            )
        gradients = list(ctx.saved_tensors)
        if seed is None:
            return None, *(None for _ in ctx.has)
        step: Step = ctx.step
        asked = float(seed) if step.half else ctx.scale
        if asked != ctx.scale and math.isfinite(asked) and asked != 0.0:
            step.scale = asked
            parameters, known = ctx.again
            with torch.enable_grad():
                _, _, found = step._forward(parameters, known, training=True)
            gradients = [found[name] for name in ctx.names if name in found]
        else:
            _scale(gradients, seed, ctx.scale, in_place=not keeps_graph())
        queue = iter(gradients)
        return None, *(next(queue) if has else None for has in ctx.has)


def _scale(gradients: list[Tensor], seed: Tensor, scale: float, in_place: bool) -> None:
    """Multiply gradients by `seed / scale`; what is kept for another backward is not written."""
    factor = seed.double() / scale
    on_cpu = factor.device.type == "cpu"
    if on_cpu and float(factor) == 1.0 and in_place:
        return
    for i, gradient in enumerate(gradients):
        ratio: Any = float(factor) if on_cpu else factor.to(gradient.dtype)
        gradients[i] = gradient.mul_(ratio) if in_place else gradient * ratio
