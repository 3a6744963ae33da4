"""First half of capture: the user's forward as one graph of torch calls, through dynamo."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import autopar.ops  # noqa: F401 (registers torch.ops.autopar)
from autopar import compat
from autopar.errors import UserError

from .explain import PYTHON_RANDOM, source_of
from .side_effects import Attribute, attributes_of, observe
from .structure import Structure, constants, take_apart
from .symbols import Dynamic, NeedsStaticError


@dataclasses.dataclass(frozen=True)
class TorchGraph:
    """What dynamo captured.

    `inputs` are the real tensors behind the placeholders of `module`, in their order. `result` is
    what forward returns: leaf `i` is output `results[i]` of the graph, or an input of it (then
    `results[i]` is `-1 - position`). `attributes` has further leaves, that forward assigns to
    attributes; `buffers` says so, per name, of the buffers that it assigns to.
    """

    module: torch.fx.GraphModule
    inputs: tuple[Tensor, ...]
    result: Structure
    results: tuple[int, ...]
    attributes: tuple[Attribute, ...]
    buffers: Mapping[str, int]


def bind_arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of forward by name, defaults filled in, so that equal calls look equal."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def capture_torch_graph(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Sequence[Dynamic]
) -> TorchGraph:
    """Capture `module(*args, **kwargs)`, the `dynamic` sizes being symbolic.

    Raises dynamo's exceptions, `NeedsStaticError` where forward returns a symbolic number, and
    UserError where it draws numbers in Python.
    """
    with _dynamo_settings(), _cumulative_batch_norms(module), _marked(dynamic):
        captured: Any = compat.dynamo_graph_capture(module, args, kwargs)
    _refuse_python_random(captured.graph)
    ordered = (*args, *kwargs.values())
    inputs = tuple(captured._dynamo_bytecode_flatten(*ordered))
    outputs = next(n for n in captured.graph.nodes if n.op == "output").args[0]
    markers: list[Any] = [
        torch.empty(0, device="meta") if _is_tensor(node) else _Number() for node in outputs
    ]
    returned, effects = observe(
        module, captured, lambda: captured._dynamo_bytecode_unflatten(tuple(markers), ordered)
    )
    tensors, result = take_apart(returned)
    symbolic = (_Number, torch.SymInt, torch.SymFloat)
    if any(isinstance(value, symbolic) for value in constants(result)):
        raise NeedsStaticError

    def number(tensor: Tensor) -> int:
        known = next((i for i, t in enumerate(tensors) if t is tensor), None)
        if known is None:
            tensors.append(tensor)
        return len(tensors) - 1 if known is None else known

    attributes = attributes_of(effects, number)
    leaves = [*tensors, *effects.buffers.values()]
    # Returned, but never touched by the graph: an argument, parameter or buffer passed through.
    known = {id(tensor) for tensor in (*inputs, *markers)}
    inputs += tuple(tensor for tensor in leaves if id(tensor) not in known)
    positions = {id(tensor): -1 - i for i, tensor in enumerate(inputs)}
    positions.update({id(marker): i for i, marker in enumerate(markers)})
    return TorchGraph(
        captured,
        inputs,
        result,
        tuple(positions[id(t)] for t in tensors),
        attributes,
        {name: positions[id(t)] for name, t in effects.buffers.items()},
    )


def _refuse_python_random(graph: torch.fx.Graph) -> None:
    """Raise UserError if Dynamo has made inputs of numbers that forward draws in Python."""
    for node in graph.nodes:
        if node.op == "placeholder" and node.name.startswith("random_value_"):
            what, fix = PYTHON_RANDOM
            raise UserError(what, source_of(node.meta.get("stack_trace") or "") or None, fix)


class _Number:
    """Stands for a symbolic number that the graph returns."""


def _is_tensor(node: object) -> bool:
    return isinstance(node, torch.fx.Node) and isinstance(node.meta.get("example_value"), Tensor)


@contextlib.contextmanager
def _dynamo_settings() -> Iterator[None]:
    with (
        compat.any_arguments(),
        compat.masks_as_given(),
        compat.dynamo_ignores(_logging_functions()),
        compat.dynamo_config(
            assume_static_by_default=True,
            automatic_dynamic_shapes=False,
            specialize_int=True,
            specialize_float=True,
            allow_rnn=True,
            capture_scalar_outputs=False,
            capture_dynamic_output_shape_ops=False,
            suppress_errors=False,
            verbose=False,
        ),
        warnings.catch_warnings(),
    ):
        yield


def _logging_functions() -> list[Callable[..., Any]]:
    names = ("debug", "info", "warning", "warn", "error", "critical", "exception", "log")
    once = ("warning_once", "info_once", "warning_advice")  # Hugging Face adds these
    functions: list[Callable[..., Any]] = [
        getattr(logging.Logger, name) for name in (*names, *once) if hasattr(logging.Logger, name)
    ]
    functions += [getattr(logging, name) for name in names if hasattr(logging, name)]
    return [*functions, warnings.warn]


@contextlib.contextmanager
def _marked(dynamic: Sequence[Dynamic]) -> Iterator[None]:
    """Mark sizes as dynamic, and leave no trace of it on the user's tensors."""
    tensors = {id(tensor): tensor for size in dynamic for tensor in size.tensors}
    before = [(tensor, dict(vars(tensor))) for tensor in tensors.values()]
    try:
        for size in dynamic:
            mark = torch._dynamo.maybe_mark_dynamic if size.optional else torch._dynamo.mark_dynamic
            for tensor in size.tensors:
                mark(tensor, size.dim)
        yield
    finally:
        for tensor, attributes in before:
            vars(tensor).clear()
            vars(tensor).update(attributes)


@contextlib.contextmanager
def _cumulative_batch_norms(module: nn.Module) -> Iterator[None]:
    """Let `BatchNorm(momentum=None)` compute its factor as a tensor; torch reads it as a number."""
    patched = [
        m
        for m in module.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        and m.momentum is None
        and m.training
        and m.running_mean is not None
    ]
    try:
        for m in patched:
            m.forward = _cumulative_forward(m)  # type: ignore[method-assign,assignment]
        yield
    finally:
        for m in patched:
            del m.forward


def _cumulative_forward(m: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        m._check_input_dim(x)
        m.num_batches_tracked.add_(1)
        factor = 1.0 / m.num_batches_tracked
        y, mean, var = torch.ops.autopar.batch_norm(
            x, m.weight, m.bias, m.running_mean, m.running_var, True, 1.0, m.eps
        )
        m.running_mean.copy_((1 - factor) * m.running_mean + factor * mean)
        m.running_var.copy_((1 - factor) * m.running_var + factor * var)
        return y  # type: ignore[no-any-return]

    return forward
