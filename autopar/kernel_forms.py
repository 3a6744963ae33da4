"""The Triton of autopar's own that a lowered program runs, in the forms that it runs it in."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx

from .ir.graph import Graph, Value, value_of
from .ir.lowered import CLOSE, CROSS_ENTROPY, DROPOUT, ROUTED_GATHER, ROUTED_SCATTER, LoweredOp
from .ir.pointwise import Fusion, Pointwise
from .runtime.kernels import adamw, cross_entropy_source, dropout, permute
from .runtime.kernels.ahead import Specialisation
from .runtime.kernels.emit import Kernel
from .runtime.kernels.registry import kernel_module

Node = torch.fx.Node
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class OwnKernel:
    """A kernel of autopar's: its name in a plan, its form, and how many places run it."""

    use: str
    form: Specialisation
    places: int


def own_kernels(program: Graph, uses: Sequence[str]) -> list[OwnKernel]:
    """What one rank launches of its lowered program with kernels in it, once each.

    `uses` are the names of the plan's kernels: that of the optimizer is not in the program. float64
    has no form here.
    """
    found: dict[tuple[str, str, Kernel], OwnKernel] = {}
    for use, form in _launched(program, uses):
        key = (use, str(form), form.kernel)
        places = found[key].places if key in found else 0
        found[key] = OwnKernel(use, form, places + 1)
    return list(found.values())


def _launched(program: Graph, uses: Sequence[str]) -> Iterator[tuple[str, Specialisation]]:
    for node in program.calls():
        if not isinstance(node.target, LoweredOp) or node.kwargs.get("kernel") is None:
            continue
        if node.target is CLOSE:  # the message that was opened
            continue
        use, forms = _of_node(node)
        for form in forms:
            yield use, form
    if "adamw" in uses:
        for dtype in sorted({v.dtype for v in _trained(program)}, key=str):
            kernel = adamw.emit(adamw.Form(param=dtype, grad=dtype, state=dtype))
            yield from (("adamw", f) for f in adamw.specialisations() if f.kernel == kernel)


def _of_node(node: Node) -> tuple[str, list[Specialisation]]:
    kernel: Any = node.kwargs["kernel"]
    tensors = [value_of(n) for n in node.all_input_nodes if isinstance(n.meta["value"], Value)]
    floats = [v.dtype for v in tensors if v.dtype.is_floating_point]
    dtype = DTYPES.get(floats[0] if floats else torch.float64, "")
    if not dtype:
        return "", []
    if node.target is DROPOUT:
        return "dropout", _dropout(node, kernel, dtype)
    if node.target is CROSS_ENTROPY:
        return "cross_entropy", _cross_entropy(kernel, dtype)
    if kernel == "int8":
        return "int8", _alike("int8", f"*{dtype}")
    if node.target in (ROUTED_GATHER, ROUTED_SCATTER):
        return "permute", _routed(node, dtype)
    # What is packed is copied, whatever it means.
    return "pack", _alike("pack", f"*i{8 * floats[0].itemsize}")


def _dropout(node: Node, fusion: Fusion, dtype: str) -> list[Specialisation]:
    extras: Any = node.kwargs.get("extras", ())
    inputs = {"x": node.args[0], **{f"a{i}": n for i, n in enumerate(extras)}}
    wanted = tuple(
        name
        for name, n in inputs.items()
        if isinstance(n, torch.fx.Node) and value_of(n).requires_grad
    )
    kernels = [dropout.emit(fusion)]
    if wanted:
        kernels.append(dropout.emit_backward(fusion, wanted))
    return [_fitted(k, dropout.specialisations(), dtype) for k in kernels]


def _cross_entropy(program: Pointwise, dtype: str) -> list[Specialisation]:
    kernels = [
        cross_entropy_source.emit(program),
        cross_entropy_source.emit_combine(),
        cross_entropy_source.emit_backward(program),
    ]
    forms = kernel_module("cross_entropy").specialisations()
    return [_fitted(k, forms, dtype) for k in kernels]


def _routed(node: Node, dtype: str) -> list[Specialisation]:
    """Rows gathered and added up; those that are weighed meanwhile by the kernel that does both."""
    width = value_of(node).int_shape()[-1]
    forms = _alike("permute", f"*{dtype}")
    if "weight" in node.kwargs:
        forms += _alike("combine", f"*{dtype}")
    found = []
    for form in forms:
        constants = dict(form.constants)
        if form.kernel.name in ("permute", "sum_segments"):
            summed = form.kernel.name == "sum_segments"
            tile_bytes = permute.SUM_TILE_BYTES if summed else permute.TILE_BYTES
            rows, block = permute.tile(width, 4 if dtype == "fp32" else 2, tile_bytes)
            constants.update(WIDTH=width, ROWS=rows, BLOCK=block)
        found.append(replace(form, constants=constants))
    return found


def _alike(name: str, pointer: str) -> list[Specialisation]:
    """The first form of each kernel of a module whose data, its first pointers, are of a type."""
    found: dict[str, Specialisation] = {}
    for form in kernel_module(name).specialisations():
        data = list(form.signature.values())
        first = data[:1] if name == "pack" else data
        if pointer in first or form.kernel.name == "int8_reduce":
            found.setdefault(form.kernel.name, form)
    return list(found.values())


def _fitted(kernel: Kernel, forms: Sequence[Specialisation], dtype: str) -> Specialisation:
    """The form of `kernel` that is as those of its name: further tensors are of `dtype`."""
    named = [f for f in forms if f.kernel.name == kernel.name]
    like = next((f for f in named if f"*{dtype}" in f.signature.values()), named[0])
    (function,) = (
        s
        for s in ast.parse(kernel.source).body
        if isinstance(s, ast.FunctionDef) and s.name == kernel.name
    )
    signature: dict[str, str] = {}
    for argument in function.args.args:
        if argument.annotation is None and argument.arg not in like.constants:
            known = like.signature.get(argument.arg, f"*{dtype}")
            signature[argument.arg] = known
    pointers = [n for n, kind in signature.items() if kind == f"*{dtype}"]
    aligned = [n for n in like.aligned if n in signature]
    aligned = list(dict.fromkeys((*aligned, *pointers)))
    return replace(like, kernel=kernel, signature=signature, aligned=tuple(aligned))


def _trained(program: Graph) -> Iterator[Value]:
    for node in program.placeholders("param"):
        value = node.meta["value"]
        if isinstance(value, Value) and value.requires_grad and value.dtype in DTYPES:
            yield value
