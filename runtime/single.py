"""One process: the module runs as it is, only dropout draws the masks that any plan would draw."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autopar.compat import dynamo_config

from .compiled_dropout import CompiledDropout
from .eager_random import PartitionInvariantDropout
from .not_compiled import NotCompiledWarning, note_backend, why_not_compiled
from .random import draw_seed
from .step_clock import StepClock

Forward = Callable[..., Any]


class SingleProcess:
    """Calls of a module in a run of one process.

    With a `torch.compile` backend, its forward is compiled. One that draws dropout masks has to be
    one graph for that, else it runs op by op, with a warning that says why.
    """

    def __init__(self, backend: str | None = None) -> None:
        self.clock = StepClock()
        self.backend = backend
        self._draws: dict[bool, bool] = {}  # whether a call did so far, in evaluation, in training
        self._dropouts: tuple[Any, ...] | None = None  # those in the module
        self._compiled: Forward | None = None  # what draws nothing
        self._drawing: tuple[Forward, CompiledDropout] | None = None  # as one graph
        self._compiles = backend not in (None, "eager")  # forwards that draw

    def call(
        self,
        forward: Forward,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run the forward; where it draws dropout masks, by the global position of each element.

        Whether it draws any is found out in its first call: from then on a module without dropout
        runs with nothing in between. Evaluation with a dropout that is still on is training here.
        """
        self.clock.tick(module)

        def run(function: Forward) -> Any:
            return function(module, *args, **kwargs)

        if self._dropouts is None:
            self._dropouts = _dropouts_in(module)
        on = [dropout for dropout in self._dropouts if dropout.training]
        training = module.training or bool(on)
        draws = self._draws.get(training)
        if draws is False and not on:
            return self._without_masks(forward, run)
        undrawn = torch.get_rng_state()
        seed = draw_seed()
        drawn = torch.get_rng_state()
        # One device draws no seed for a forward without masks, nor may its own numbers be others.
        begun = drawn if draws or any(dropout.p > 0.0 for dropout in on) else undrawn
        torch.set_rng_state(begun)
        compiles = self._compiles and draws is not None
        draw = self._compiled_draw if compiles else _op_by_op
        calls, output = draw(seed, forward, run)
        if torch.equal(begun, torch.get_rng_state()):
            torch.set_rng_state(drawn if calls else undrawn)
        self._draws[training] = bool(draws) or calls > 0
        return output

    def _without_masks(self, forward: Forward, run: Callable[[Forward], Any]) -> Any:
        if self.backend in (None, "eager"):
            return run(forward)
        if self._compiled is None:
            self._compiled = torch.compile(forward, backend=str(self.backend))
        try:
            return run(self._compiled)
        except Exception as error:  # parts of it may have run: they cannot run again
            note_backend(error, forward)
            raise

    def _compiled_draw(
        self, seed: int, forward: Forward, run: Callable[[Forward], Any]
    ) -> tuple[int, Any]:
        """How many random calls the compiled forward made, and what it gave."""
        compiled, random = self._as_one_graph(forward)
        random.begin(seed)
        before = torch.get_rng_state()
        try:
            with dynamo_config(specialize_float=True):  # a probability is a constant
                output = run(compiled)
            return random.calls, output
        except Exception as error:
            if random.started:
                raise
            reason = why_not_compiled(error, forward)
        # Nothing has run yet. If the forward itself raises on these inputs, it does so now, and
        # later ones are compiled.
        torch.set_rng_state(before)
        calls, output = _op_by_op(seed, forward, run)
        self._compiles = False
        name = getattr(forward, "__qualname__", "forward")
        warnings.warn(
            f"{name} draws dropout masks and runs op by op, not compiled by {self.backend}: "
            f"{reason}",
            NotCompiledWarning,
            stacklevel=4,
        )
        return calls, output

    def _as_one_graph(self, forward: Forward) -> tuple[Forward, CompiledDropout]:
        if self._drawing is None:
            random = CompiledDropout(str(self.backend))
            self._drawing = torch.compile(forward, backend=random, fullgraph=True), random
        return self._drawing


def _op_by_op(seed: int, forward: Forward, run: Callable[[Forward], Any]) -> tuple[int, Any]:
    """How many random calls the forward made, and what it gave."""
    with PartitionInvariantDropout(seed) as mode:
        output = run(forward)
    return mode.calls, output


def _dropouts_in(module: nn.Module) -> tuple[Any, ...]:
    return tuple(m for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
