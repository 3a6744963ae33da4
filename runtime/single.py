"""One process: the module runs as it is, only dropout draws the masks that any plan would draw."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import nn

from autopar.compat import compile_failure, dynamo_config

from .compiled_dropout import MaskedRun, UncompiledError, compiled_dropout
from .eager_random import PartitionInvariantDropout, within_a_forward
from .not_compiled import NotCompiledWarning, note_backend, why_not_compiled
from .random import draw_seed
from .step_clock import StepClock

_KNOWN = 256  # of what may be switched on, more is found out again

Forward = Callable[..., Any]
Run = Callable[[Forward], Any]


class SingleProcess:
    """Calls of a module in a run of one process.

    With a `torch.compile` backend, its forward is compiled. One that draws dropout masks has to be
    one graph for that, else it runs op by op, with a warning that says why.
    """

    def __init__(self, backend: str | None = None) -> None:
        self.clock = StepClock()
        self.backend = None if backend in (None, "eager") else backend
        self._draws: dict[Hashable, bool] = {}  # whether a call did so far, by what is switched on
        self._compiled: dict[bool, Forward] = {}  # by whether it has to be one graph
        self._compiles = self.backend is not None  # forwards that draw

    def call(
        self,
        forward: Forward,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run the forward; where it draws dropout masks, by the global position of each element.

        Their seed is what torch's generator would give next; it moves on by that number after a
        forward that drew masks, and only then. The forward's own random numbers are one device's.
        """
        self.clock.tick(module)

        def run(function: Forward) -> Any:
            return function(module, *args, **kwargs)

        if within_a_forward():  # of a module around this one, which numbers its calls
            return run(forward)
        undrawn = torch.get_rng_state()
        seed = draw_seed()
        torch.set_rng_state(undrawn)
        calls, output = self._run(seed, forward, switched_on(module, args, kwargs), run)
        if calls:
            draw_seed()
        return output

    def _run(self, seed: int, forward: Forward, on: Hashable, run: Run) -> tuple[int, Any]:
        """How many random calls the forward made, and what it gave.

        Whether it draws masks is found out op by op, once for what is switched on: after that,
        nothing takes the ops of one that draws none.
        """
        draws = self._draws.get(on)
        if draws is None or (draws and not self._compiles):
            calls, output = _op_by_op(seed, forward, run)
        elif draws:
            calls, output = self._with_masks(seed, forward, run)
        elif self.backend is None:
            calls, output = 0, run(forward)
        else:
            calls, output = self._without_masks(seed, forward, run)
        if len(self._draws) == _KNOWN:
            self._draws.clear()
        self._draws[on] = bool(draws) or calls > 0
        return calls, output

    def _without_masks(self, seed: int, forward: Forward, run: Run) -> tuple[int, Any]:
        """Should it draw masks all the same, by a number that changed, they are the right ones."""
        with MaskedRun(seed).current() as drawn:
            try:
                output = run(self._compiled_forward(forward, fullgraph=False))
            except Exception as error:  # parts of it may have run: they cannot run again
                if drawn.started or not isinstance(compile_failure(error)[1], UncompiledError):
                    note_backend(error, forward)
                    raise
                return _op_by_op(seed, forward, run)
        return drawn.calls, output

    def _with_masks(self, seed: int, forward: Forward, run: Run) -> tuple[int, Any]:
        before = torch.get_rng_state()
        with MaskedRun(seed).current() as drawn:
            try:
                with dynamo_config(specialize_float=True):  # a probability is a constant
                    output = run(self._compiled_forward(forward, fullgraph=True))
                return drawn.calls, output
            except Exception as error:
                if drawn.started:
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
            stacklevel=5,
        )
        return calls, output

    def _compiled_forward(self, forward: Forward, fullgraph: bool) -> Forward:
        if fullgraph not in self._compiled:
            backend = compiled_dropout(str(self.backend))
            made = torch.compile(forward, backend=backend, fullgraph=fullgraph)
            self._compiled[fullgraph] = made
        return self._compiled[fullgraph]


def _op_by_op(seed: int, forward: Forward, run: Run) -> tuple[int, Any]:
    """How many random calls the forward made, and what it gave."""
    with PartitionInvariantDropout(seed) as mode:
        output = run(forward)
    return mode.calls, output


def switched_on(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """What tells whether a forward draws masks, as far as numbers tell: which are above 0.

    They are those that modules have, and settings that they have; and flags among the arguments.
    """
    given = tuple(a for a in (*args, *kwargs.values()) if a is None or isinstance(a, bool))
    settings: dict[int, tuple[bool, ...]] = {}
    modules = []
    for child in module.modules():
        modules.append((type(child), _above_zero(vars(child))))
        for name, value in vars(child).items():
            if name in _OF_MODULES or isinstance(value, (nn.Module, torch.Tensor, type)):
                continue
            if id(value) not in settings and hasattr(value, "__dict__"):
                settings[id(value)] = _above_zero(vars(value))
    return given, tuple(modules), tuple(settings.values())


_OF_MODULES = frozenset(vars(nn.Module()))


def _above_zero(numbers: Mapping[str, Any]) -> tuple[bool, ...]:
    return tuple([n > 0 for n in numbers.values() if isinstance(n, (int, float))])
