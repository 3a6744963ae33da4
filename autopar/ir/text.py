"""Graphs as text that people read and passes are tested with; `parse` reads it back.

One line per node::

    mesh dp=2 x tp=2
    %w: param f32[512, 256] @ [tp, -] grad "fc.weight", "tied.weight"
    %x: input f32[b, 256] @ [dp, -] "x"
    %y: f32[b, 512] @ [dp, tp] = aten.linear(%x, %w)   # bi,oi->bo  model.py:31
    %p: (f32[b], i64[b]) = aten.max.dim(%y, 1)   # model.py:32
    return %y; update %running_mean <- %m

A type is `dtype[sizes]`, then `@ sharding` where there is one. `grad` or `nograd` follows where
`requires_grad` is not what one would expect: False for a placeholder; for a call, whether the dtype
is floating and some tensor input requires grad. A node without a tensor value has no type, a node
without metadata the type `?`. Target `aten.mm` is the default overload.

Not in the text: stack traces, module paths, a placeholder's target where it differs from its name,
and assumptions of sympy symbols: parsing makes positive integers, but `u0`, `u1`... (unbacked)
plain integers. Python callables other than `operator`'s and `torch.sym_*` print as
`py:module.name`, other objects as `opaque("Type")`; neither parses.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from typing import Any

import sympy
import torch
import torch.fx

from .graph import Graph, Value, tensor_inputs, values_of
from .lowered import (
    Collective,
    GroupRef,
    LoweredOp,
    Region,
    Route,
    ShardSpec,
    SwapSpec,
)
from .mesh import Mesh
from .pointwise import Fusion, Pointwise
from .registry import rule_for
from .sharding import Sharding, Split

# Names of dtypes in text; others print as torch names them.
DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8e4m3fn": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2,
    "c64": torch.complex64,
    "c128": torch.complex128,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u64": torch.uint64,
    "u32": torch.uint32,
    "u16": torch.uint16,
    "u8": torch.uint8,
    "bool": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Dataclasses that are arguments, by the name that text has for them.
RECORDS: dict[str, type[Any]] = {
    "ShardSpec": ShardSpec,
    "SwapSpec": SwapSpec,
    "Region": Region,
    "Route": Route,
    "Split": Split,
    "Fusion": Fusion,
}


def print_graph(graph: Graph, mesh: Mesh | None = None, rules: bool = False) -> str:
    """Text of a graph, one line per node, without a final newline.

    With `mesh` a first line says it; with `rules` each call's comment has its sharding rule.
    """
    lines = [] if mesh is None else [_print_mesh(mesh)]
    for node in graph.fx.nodes:
        if node.op == "output":
            lines.append(_print_output(graph, node))
        else:
            lines.append(print_node(node, rules))
    return "\n".join(lines)


def print_node(node: torch.fx.Node, rules: bool = False) -> str:
    """Line of one node other than the output; raises ValueError on a module or method call."""
    if node.op == "placeholder":
        parts = [node.meta.get("role") or "input", _print_node_value(node)]
        parts.append(", ".join(json.dumps(name) for name in node.meta.get("fqns", ())))
        return f"%{node.name}: " + " ".join(part for part in parts if part)
    if node.op == "get_attr":
        call = f"get_attr({json.dumps(node.target)})"
    elif node.op == "call_function":
        arguments = [print_argument(arg) for arg in node.args]
        arguments += [f"{name}={print_argument(arg)}" for name, arg in node.kwargs.items()]
        call = f"{_print_target(node.target)}({', '.join(arguments)})"
    else:
        raise ValueError(f"%{node.name} is a {node.op}, which graphs do not have")
    kind = _print_node_value(node)
    line = f"%{node.name}{': ' if kind else ''}{kind} = {call}"
    if node.meta.get("region") is not None:
        line += f" region={print_argument(node.meta['region'])}"
    comments = [_print_rule(node) if rules else "", node.meta.get("source") or ""]
    comment = "  ".join(text for text in comments if text)
    return f"{line}   # {comment}" if comment else line


def print_value(value: Value, requires_grad: bool = False) -> str:
    """Text of a type: `f32[b, 512] @ [dp, -]`.

    `grad` or `nograd` is added where `value.requires_grad` is not `requires_grad`.
    """
    text = f"{_print_dtype(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if value.sharding is not None:
        text += f" @ {value.sharding}"
    if value.requires_grad != requires_grad:
        text += " grad" if value.requires_grad else " nograd"
    return text


def print_argument(arg: object) -> str:
    """Text of one argument of a call."""
    plain = _print_plain(arg)
    if plain is not None:
        return plain
    match arg:
        case torch.fx.Node():
            return f"%{arg.name}"
        case list():
            return f"[{', '.join(map(print_argument, arg))}]"
        case tuple():
            items = ", ".join(map(print_argument, arg))
            return f"({items},)" if len(arg) == 1 else f"({items})"
        case dict():
            items = ", ".join(f"{print_argument(k)}: {print_argument(v)}" for k, v in arg.items())
            return f"{{{items}}}"
        case slice():
            return f"slice({', '.join(map(print_argument, (arg.start, arg.stop, arg.step)))})"
        case Sharding():
            return f"@ {arg}"
        case GroupRef():
            return repr(arg)
        case Pointwise():
            return f"pointwise({json.dumps(str(arg))})"
        case _ if type(arg).__name__ in RECORDS:
            return _print_record(arg)
    return f"opaque({json.dumps(type(arg).__name__)})"


def _print_plain(arg: object) -> str | None:
    """Text of an argument that is not made of other arguments, or None."""
    match arg:
        case None | bool() | int() | float():
            return repr(arg)
        case complex():
            return f"complex({arg.real!r}, {arg.imag!r})"
        case str():
            return json.dumps(arg)
        case torch.dtype():
            return _print_dtype(arg)
        case torch.memory_format() | torch.layout():
            return str(arg).removeprefix("torch.")
        case torch.device():
            return f"device({json.dumps(str(arg))})"
        case sympy.Basic() | Collective():
            return str(arg)
    return "..." if arg is ... else None


def _print_record(arg: Any) -> str:
    """Text of a dataclass: fields without a default by position, others only if they differ."""
    items: list[str] = []
    for field in dataclasses.fields(arg):
        value = getattr(arg, field.name)
        if field.default is dataclasses.MISSING:
            items.append(print_argument(value))
        elif value != field.default:
            items.append(f"{field.name}={print_argument(value)}")
    return f"{type(arg).__name__}({', '.join(items)})"


def _print_dtype(dtype: torch.dtype) -> str:
    return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def _print_target(target: object) -> str:
    match target:
        case torch._ops.OpOverload():
            return str(target).removesuffix(".default")
        case LoweredOp():
            return target.name
    if target is operator.getitem:
        return "getitem"
    name = getattr(target, "__name__", type(target).__name__)
    if target is getattr(operator, name, None):
        return f"operator.{name}"
    if name.startswith("sym_") and target is getattr(torch, name, None):
        return f"torch.{name}"
    return f"py:{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', name)}"


def _print_node_value(node: torch.fx.Node) -> str:
    if "value" not in node.meta:
        return "?"
    value, expected = node.meta["value"], inputs_require_grad(node)

    def one(item: Value | None) -> str:
        return "None" if item is None else print_value(item, expected and can_grad(item.dtype))

    if isinstance(value, tuple):
        items = ", ".join(map(one, value))
        return f"({items},)" if len(value) == 1 else f"({items})"
    return "" if value is None else one(value)


def _print_output(graph: Graph, node: torch.fx.Node) -> str:
    (results,) = node.args
    entries = [print_argument(arg) for arg in results]  # type: ignore[union-attr]
    line = f"return {', '.join(entries[: graph.outputs])}".rstrip()
    if graph.mutated:
        pairs = zip(graph.mutated, entries[graph.outputs :], strict=True)
        line += "; update " + ", ".join(f"%{name} <- {new}" for name, new in pairs)
    return line


def _print_rule(node: torch.fx.Node) -> str:
    if node.op != "call_function" or "value" not in node.meta:
        return ""
    found = rule_for(node)
    rule = found if found is not None else node.meta.get("rule")
    return "" if rule is None else str(rule)


def _print_mesh(mesh: Mesh) -> str:
    axes = [f"{a.name}={a.size}" + (f"@{a.level}" if a.level else "") for a in mesh]
    return f"mesh {' x '.join(axes) or 'single'}"


def can_grad(dtype: torch.dtype) -> bool:
    """Whether tensors of a dtype can require grad: floating and complex ones."""
    return dtype.is_floating_point or dtype.is_complex


def inputs_require_grad(node: torch.fx.Node) -> bool:
    """Whether a floating output of the node is expected to require grad."""
    if node.op != "call_function":
        return False
    match node.args:
        case (torch.fx.Node() as whole, int() as index) if node.target is operator.getitem:
            item = dict(enumerate(_as_tuple(whole.meta.get("value")))).get(index)
            return isinstance(item, Value) and item.requires_grad
    return any(value.requires_grad for arg in tensor_inputs(node) for value in values_of(arg))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
