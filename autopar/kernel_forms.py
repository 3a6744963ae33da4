"""The Triton of autopar's own that a lowered program runs, in the forms that it runs it in."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx

from .ir.graph import Graph, Value, value_of, values_of
from .ir.lowered import (
    ALL_REDUCE_NORM,
    CLOSE,
    CROSS_ENTROPY,
    DROPOUT,
    ROUTED_GATHER,
    ROUTED_SCATTER,
    LoweredOp,
)
from .ir.mesh import Mesh
from .ir.pointwise import IDENTITY, Fusion, Pointwise
from .routed_forms import DTYPES, routed_forms
from .runtime.kernels import adamw, all_reduce_norm, cross_entropy_source, dropout
from .runtime.kernels.ahead import Specialisation
from .runtime.kernels.emit import Kernel
from .runtime.kernels.registry import kernel_module

Node = torch.fx.Node


@dataclass(frozen=True)
class OwnKernel:
    """A kernel of autopar's: its name in a plan, its form, and how many places run it."""

    use: str
    form: Specialisation
    places: int


def own_kernels(program: Graph, mesh: Mesh, uses: Sequence[str]) -> list[OwnKernel]:
    """What one rank launches of its lowered program with kernels in it, once each.

    `mesh` is the program's, `uses` are the names of the plan's kernels: that of the optimizer is
    not in the program. float64 has no form here.
    """
    found: dict[tuple[str, str, Kernel], OwnKernel] = {}
    for use, form in _launched(program, mesh, uses):
        key = (use, str(form), form.kernel)
        places = found[key].places if key in found else 0
        found[key] = OwnKernel(use, form, places + 1)
    return list(found.values())


def _launched(
    program: Graph, mesh: Mesh, uses: Sequence[str]
) -> Iterator[tuple[str, Specialisation]]:
    for node in program.calls():
        if node.target is ALL_REDUCE_NORM:
            yield from (("all_reduce_norm", form) for form in _norm(node, mesh))
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
        return "permute", routed_forms(node, dtype)
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


def _norm(node: Node, mesh: Mesh) -> list[Specialisation]:
    """All-reduce, residual and norm, with the epilogue, for the ranks of its group."""
    args: Any = node.args
    kwargs: Any = node.kwargs
    x, residual, weight, eps, group = args
    values = [value_of(n) for n in (x, residual, *([] if weight is None else [weight]))]
    out, total = (v.dtype for v in values_of(node))
    if any(dtype not in DTYPES for dtype in (out, total, *(v.dtype for v in values))):
        return []
    pointers = ("x_ptr", "residual_ptr", "weight_ptr")[: len(values)]
    kinds = {n: f"*{DTYPES[v.dtype]}" for n, v in zip(pointers, values, strict=True)}
    form = all_reduce_norm.form(
        DTYPES[values[0].dtype],
        values[0].int_shape()[-1],
        math.prod(mesh[axis].size for axis in group.axes),
        kwargs.get("epilogue", IDENTITY),
        weight is not None,
    )
    kinds |= {"y_ptr": f"*{DTYPES[out]}", "sum_ptr": f"*{DTYPES[total]}"}
    return [
        replace(
            form,
            signature={**form.signature, **kinds},
            constants={**form.constants, "EPS": eps, "RANK": 0},
        )
    ]


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
