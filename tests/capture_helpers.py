"""Compare a captured graph with the module it was captured from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from autopar.capture import Capture
from autopar.ir.graph import values_of
from autopar.ir.interpret import evaluate, run_nodes

Loss = Callable[[Any], Tensor]


def placeholder_tensors(captured: Capture, module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """A tensor for each placeholder of the graph, from the module, the inputs and the constants."""
    owned: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    owned.update(module.named_buffers(remove_duplicate=False))
    remaining = iter(inputs)
    tensors = []
    for node in captured.graph.placeholders():
        role = node.meta["role"]
        if role == "input":
            tensors.append(next(remaining))
        elif role == "constant":
            tensors.append(node.meta["tensor"])
        else:
            tensors.append(owned[node.meta["fqns"][0]])
    return tensors


def sum_of(output: Any) -> Tensor:
    """A loss for any output: the sum of all its floating tensors."""
    from autopar.capture.structure import take_apart

    total = torch.zeros((), dtype=torch.float64)
    for i, tensor in enumerate(take_apart(output)[0]):
        if tensor.is_floating_point():
            total = total + (i + 1) * tensor.double().square().sum()
    return total


def assert_equals_eager(
    captured: Capture,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss = sum_of,
    tolerance: float = 1e-12,
) -> Any:
    """Loss, gradients and buffers of the graph are those of the module; so are its types.

    Returns the graph's output in the structure of the module's.
    """
    kwargs = kwargs or {}
    eager, parts = copy.deepcopy(module), copy.deepcopy(module)
    torch.manual_seed(0)
    output = eager(*args, **kwargs)
    expected = loss(output)

    inputs = captured.flatten(args, kwargs)
    sizes = captured.bind(inputs)
    assert sizes is not None, "the capture does not fit this batch"
    torch.manual_seed(0)
    env = run_nodes(captured.graph, placeholder_tensors(captured, parts, inputs))
    results = env[captured.graph.output_node]
    rebuilt = captured.unflatten(results[: captured.graph.outputs])
    actual = loss(rebuilt)

    assert type(rebuilt) is type(output)
    assert_close("loss", actual, expected, tolerance)
    assert_gradients_equal(eager, parts, expected, actual, tolerance)
    new_buffers = dict(zip(captured.graph.mutated, results[captured.graph.outputs :], strict=True))
    names = {node.meta["fqns"][0]: node.name for node in captured.graph.placeholders("buffer")}
    unchanged = dict(parts.named_buffers())
    for name, buffer in eager.named_buffers():
        new = new_buffers.get(names[name], unchanged[name])
        assert not new.requires_grad
        assert_close(name, new, buffer, tolerance)
    assert_types(env, sizes)
    return rebuilt


def assert_gradients_equal(
    eager: nn.Module, parts: nn.Module, expected: Tensor, actual: Tensor, tolerance: float
) -> None:
    assert actual.requires_grad == expected.requires_grad
    if not expected.requires_grad:
        return
    expected.backward()  # type: ignore[no-untyped-call]
    actual.backward()  # type: ignore[no-untyped-call]
    for (name, p), q in zip(eager.named_parameters(), parts.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert_close(f"gradient of {name}", q.grad, p.grad, tolerance)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )


def assert_types(env: Mapping[torch.fx.Node, Any], sizes: dict[sympy.Symbol, int]) -> None:
    """Every node's result has the shape, dtype and requires_grad that its value says."""
    for node, result in env.items():
        if node.op != "call_function":
            continue
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        for value, tensor in zip(values_of(node), tensors, strict=True):
            shape = tuple(
                evaluate(size, sizes) if isinstance(size, sympy.Expr) else size
                for size in value.shape
            )
            where = f"%{node.name} = {node.target}"
            assert (shape, value.dtype) == (tuple(tensor.shape), tensor.dtype), where
            assert value.requires_grad == tensor.requires_grad, where
