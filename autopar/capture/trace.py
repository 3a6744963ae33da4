"""Second half of capture: dynamo's graph as functional ATen ops, before dispatch."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from autopar import compat

from .autocast import ambient_autocast, functional_mode
from .autograd_function import TracedFunctions
from .replay import Replay, State
from .symbols import NeedsStaticError
from .torch_level import TorchGraph


@dataclasses.dataclass(frozen=True)
class Traced:
    """An ATen graph of one call.

    Its placeholders are `TorchGraph.inputs`, in order. Its outputs are what forward returns, then
    the new values of the buffers `assigned`, then that of each input in `written` (positions).
    """

    graph: torch.fx.GraphModule
    functions: TracedFunctions
    outputs: int
    assigned: tuple[str, ...]
    written: tuple[int, ...]
    shape_env: Any


def trace(captured: TorchGraph, device_type: str) -> Traced:
    """Trace dynamo's graph on fake tensors, keeping composite ops whole."""
    module = captured.module
    fake_mode = module.meta["fake_mode"]
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    values = [n.meta["example_value"] for n in placeholders]
    values += [fake_mode.from_tensor(t) for t in captured.inputs[len(values) :]]
    tensors = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    grad = torch.is_grad_enabled()
    state = State(grad, [ambient_autocast(device_type)], TracedFunctions())
    written: list[int] = []

    def forward(*fakes: Tensor) -> list[Tensor]:
        arguments = list(values)
        for i, fake in zip(tensors, fakes, strict=True):
            arguments[i] = compat.to_functional(fake)
        replay = Replay(module, state)
        results = replay.run(*arguments[: len(placeholders)], enable_io_processing=False)
        wanted = (*captured.results, *captured.buffers.values())
        chosen = [results[i] if i >= 0 else arguments[-1 - i] for i in wanted]
        flat = [compat.from_functional(result) for result in chosen]
        for i, fake in zip(tensors, fakes, strict=True):
            now = compat.from_functional(arguments[i])
            if now is not fake:
                written.append(i)
                flat.append(now)
        return flat

    with _tracing(fake_mode, device_type, state):
        graph = compat.make_fx(
            forward, pre_dispatch=True, record_module_stack=False, _allow_non_fake_inputs=True
        )(*(values[i] for i in tensors))
    if len(tensors) != len(values):
        raise NeedsStaticError
    return Traced(
        graph,
        state.functions,
        len(captured.results),
        tuple(captured.buffers),
        tuple(written),
        fake_mode.shape_env,
    )


@contextlib.contextmanager
def _tracing(fake_mode: Any, device_type: str, state: State) -> Iterator[None]:
    mode = functional_mode(lambda: state.autocast[-1])
    off = (
        contextlib.nullcontext()
        if device_type == "meta"
        else torch.autocast(device_type, enabled=False)
    )
    with (
        warnings.catch_warnings(),
        compat.outside_inference_mode(),
        torch.no_grad(),
        off,
        torch.fx.traceback.preserve_node_meta(),
        fake_mode,
        compat.python_dispatcher(),
        compat.shapes_of_lstm(),
        mode,
    ):
        warnings.simplefilter("ignore")
        yield
