"""Graphs as text that people read and passes are tested with; printed text parses back.

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
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
import torch.fx

from .expressions import parse_expression
from .graph import Graph, Size, Value, tensor_inputs, values_of
from .lowered import (
    COLLECTIVES,
    LOWERED_OPS,
    Collective,
    GroupRef,
    LoweredOp,
    Region,
    Route,
    ShardSpec,
    SwapSpec,
)
from .mesh import Axis, Mesh
from .pointwise import Fusion, Pointwise, parse_pointwise
from .registry import rule_for
from .sharding import REDUCTIONS, WHOLE, Sharding, Split

Env = Mapping[str, torch.fx.Node]

ROLES = ("param", "buffer", "input", "constant", "received", "prepared", "combined")

_DTYPES: dict[str, torch.dtype] = {
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
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_WORDS: dict[str, Any] = {
    **_DTYPES,
    **COLLECTIVES,
    **{
        name: getattr(torch, name)
        for name in (
            "contiguous_format",
            "channels_last",
            "channels_last_3d",
            "preserve_format",
            "strided",
            "sparse_coo",
            "sparse_csr",
            "sparse_csc",
            "sparse_bsr",
            "sparse_bsc",
            "jagged",
        )
    },
    "True": True,
    "False": False,
    "None": None,
    "...": ...,
    "inf": math.inf,
    "-inf": -math.inf,
    "nan": math.nan,
}

_RECORDS: dict[str, type[Any]] = {
    "ShardSpec": ShardSpec,
    "SwapSpec": SwapSpec,
    "Region": Region,
    "Route": Route,
    "Split": Split,
    "Fusion": Fusion,
}

_MAKERS: dict[str, Callable[..., Any]] = {
    "slice": slice,
    "device": torch.device,
    "complex": complex,
    "pointwise": parse_pointwise,
}

_INT = re.compile(r"-?\d+\Z")
_FLOAT = re.compile(r"-?(\d+\.\d*|\d+(\.\d*)?[eE][+-]?\d+)\Z")
_CONSTRUCTOR = re.compile(r"([A-Za-z]\w*)\((.*)\)\Z", re.DOTALL)
_KEYWORD = re.compile(r"([A-Za-z_]\w*)=(?!=)")
_SOURCE = re.compile(r"\S.*:\d+\Z")


# Printing -----------------------------------------------------------------------------------------


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
        case _ if type(arg).__name__ in _RECORDS:
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
    value, expected = node.meta["value"], _inputs_require_grad(node)

    def one(item: Value | None) -> str:
        return "None" if item is None else print_value(item, expected and _can_grad(item.dtype))

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


def _can_grad(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _inputs_require_grad(node: torch.fx.Node) -> bool:
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


# Parsing ------------------------------------------------------------------------------------------


def parse_graph(text: str) -> Graph:
    """Graph of a printed text, whose mesh line (if any) is dropped; see `parse_program`."""
    return parse_program(text)[1]


def parse_program(text: str) -> tuple[Mesh | None, Graph]:
    """Mesh (None if the text names none) and graph of a printed text.

    Blank lines and lines that start with `#` are skipped. Raises ValueError with the line at fault.
    """
    fx, env, mesh = torch.fx.Graph(), dict[str, torch.fx.Node](), None
    done: Graph | None = None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            if done is not None:
                raise ValueError("nothing may follow the return")
            if line.startswith("mesh "):
                mesh = parse_mesh(line)
            elif re.match(r"return\b", line):
                done = _parse_output(line, fx, env)
            else:
                _parse_node(line, fx, env)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}\n    {line}") from error
    if done is None:
        raise ValueError("the text has no `return` line")
    return mesh, done


def parse_mesh(text: str) -> Mesh:
    """Mesh of `mesh dp=2@1 x tp=4` (`@1`: the axis crosses level 1); raises ValueError."""
    body = text.strip().removeprefix("mesh ").strip()
    if body == "single":
        return Mesh(())
    axes: list[Axis] = []
    for part in body.split(" x "):
        match = re.fullmatch(r"\s*(\w+)=(\d+)(?:@(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"cannot read mesh axis {part!r}")
        axes.append(Axis(match[1], int(match[2]), int(match[3] or 0)))
    return Mesh(tuple(axes))


def parse_sharding(text: str) -> Sharding:
    """Sharding of `[dp, -, 3:tp*64] +cp max(ep) ~pp`, the inverse of `str`; raises ValueError."""
    match = re.fullmatch(r"\s*\[([^\]]*)\](.*)", text, re.DOTALL)
    if match is None:
        raise ValueError(f"cannot read sharding {text.strip()!r}")
    splits = tuple(_parse_split(part) for part in match[1].split(",")) if match[1].strip() else ()
    partial: dict[str, str] = {}
    varying: list[str] = []
    for word in match[2].split():
        reduced = re.fullmatch(r"(\w+)\((\w+)\)", word)
        if reduced is not None and reduced[1] in REDUCTIONS:
            partial[reduced[2]] = reduced[1]
        elif re.fullmatch(r"[+~]\w+", word):
            if word[0] == "+":
                partial[word[1:]] = "sum"
            else:
                varying.append(word[1:])
        else:
            raise ValueError(f"cannot read {word!r} in sharding {text.strip()!r}")
    return Sharding(splits, tuple(sorted(partial.items())), tuple(varying))


def _parse_split(text: str) -> Split:
    if text.strip() == "-":
        return WHOLE
    match = re.fullmatch(r"\s*(?:(\d+):)?(\w+(?:&\w+)*)(?:\*(\d+))?\s*", text)
    if match is None:
        raise ValueError(f"cannot read split {text.strip()!r}")
    return Split(tuple(match[2].split("&")), int(match[1] or 1), int(match[3] or 1))


def parse_value(text: str, requires_grad: bool = False) -> Value:
    """Type of `f32[b, 512] @ [dp, -] grad`; raises ValueError.

    `requires_grad` is what a floating value has where the text does not say.
    """
    match = re.match(r"\s*(\w+)\[", text)
    end = _closing(text, match.end() - 1) if match else 0
    if match is None:
        raise ValueError(f"cannot read type {text.strip()!r}")
    dtype, rest = _parse_dtype(match[1]), text[end + 1 :].strip()
    flag = requires_grad and _can_grad(dtype)
    for word, says in (("nograd", False), ("grad", True)):
        if re.search(rf"(^|\s){word}$", rest):
            rest, flag = rest.removesuffix(word).strip(), says
            break
    if rest and not rest.startswith("@"):
        raise ValueError(f"cannot read {rest!r} after the type {text[: end + 1].strip()!r}")
    shape = tuple(_parse_size(part) for part in _split(text[match.end() : end]))
    return Value(shape, dtype, parse_sharding(rest[1:]) if rest else None, flag)


def _parse_dtype(name: str) -> torch.dtype:
    dtype = _DTYPES.get(name, getattr(torch, name, None))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def _parse_size(text: str) -> Size:
    return int(text) if _INT.match(text) else parse_expression(text)


def _parse_node(line: str, fx: torch.fx.Graph, env: dict[str, torch.fx.Node]) -> None:
    head = re.match(r"%(\w+)\s*(:?)\s*", line)
    if head is None:
        raise ValueError("a line is `%name: type = target(...)`, `return ...` or `mesh ...`")
    name, body = head[1], line[head.end() :]
    if name in env:
        raise ValueError(f"%{name} is defined twice")
    role = re.match(rf"({'|'.join(ROLES)})(\s|$)", body) if head[2] else None
    if role is not None:
        node = fx.create_node("placeholder", name, name=name)
        kind, quote, fqns = body[role.end() :].partition('"')
        node.meta.update(_meta(role=role[1], fqns=tuple(map(json.loads, _split(quote + fqns)))))
    else:
        kind, equals, call = body.partition("= ")
        if not equals:
            raise ValueError(f"%{name} is neither a placeholder ({', '.join(ROLES)}) nor a call")
        node = _parse_call(name, call, fx, env)
    node.name = name  # FX renames what hides a builtin: `input`
    env[name] = node
    if kind.strip() != "?":
        node.meta["value"] = _parse_node_value(kind.strip(), _inputs_require_grad(node))


def _parse_node_value(text: str, requires_grad: bool) -> Value | tuple[Value | None, ...] | None:
    if not text:
        return None
    if not text.startswith("("):
        return parse_value(text, requires_grad)
    items = _split(text[1 : _closing(text, 0)])
    return tuple(None if i == "None" else parse_value(i, requires_grad) for i in items)


def _meta(**known: Any) -> dict[str, Any]:
    return {"source": "", "stack": "", "module": "", "region": None, **known}


def _parse_call(name: str, text: str, fx: torch.fx.Graph, env: Env) -> torch.fx.Node:
    start = text.find("(")
    if start < 0:
        raise ValueError(f"%{name} is not a call: {text!r}")
    end = _closing(text, start)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for part in _split(text[start + 1 : end]):
        keyword = _KEYWORD.match(part)
        if keyword is not None:
            kwargs[keyword[1]] = parse_argument(part[keyword.end() :], env)
        else:
            args.append(parse_argument(part, env))
    rest, _, comment = text[end + 1 :].partition("# ")
    region = rest.strip().removeprefix("region=")
    if rest.strip() and region == rest.strip():
        raise ValueError(f"cannot read {rest.strip()!r} after the call")
    target = text[:start].strip()
    if target == "get_attr":
        node = fx.create_node("get_attr", args[0], name=name)
    else:
        node = fx.create_node("call_function", parse_target(target), tuple(args), kwargs, name)
    last = re.split(r"\s{2,}", comment.strip())[-1]
    node.meta.update(
        _meta(
            source=last if _SOURCE.match(last) else "",
            region=parse_argument(region, env) if region else None,
        )
    )
    return node


def _parse_output(line: str, fx: torch.fx.Graph, env: Env) -> Graph:
    body, _, updates = line.removeprefix("return").partition("; update ")
    results = [parse_argument(part, env) for part in _split(body)]
    outputs = len(results)
    mutated: list[str] = []
    for part in _split(updates):
        match = re.fullmatch(r"%(\w+)\s*<-\s*(.*)", part)
        if match is None:
            raise ValueError(f"cannot read update {part!r}")
        mutated.append(match[1])
        results.append(parse_argument(match[2], env))
    fx.output(tuple(results))
    return Graph(fx, outputs, tuple(mutated))


def parse_target(text: str) -> Callable[..., Any]:
    """Target of a call; raises ValueError where there is none of that name."""
    if text == "getitem":
        return operator.getitem
    if text in LOWERED_OPS:
        return LOWERED_OPS[text]
    space, _, name = text.partition(".")
    if text.startswith("py:"):
        raise ValueError(
            f"{text.removeprefix('py:')!r} is a Python callable, which text cannot say"
        )
    found: Any = None
    if space == "operator":
        found = getattr(operator, name, None)
    elif space == "torch" and name.startswith("sym_"):
        found = getattr(torch, name, None)
    elif re.fullmatch(r"\w+\.\w+(\.\w+)?", text):
        op, _, overload = name.partition(".")
        packet = getattr(getattr(torch.ops, space), op, None)
        found = getattr(packet, overload or "default", None)
    if found is None:
        raise ValueError(f"unknown op {text!r}")
    target: Callable[..., Any] = found
    return target


def parse_argument(text: str, env: Env) -> Any:
    """Argument of a call, its nodes looked up in `env`; raises ValueError."""
    text = text.strip()
    if text in _WORDS:
        return _WORDS[text]
    if _INT.match(text):
        return int(text)
    if _FLOAT.match(text):
        return float(text)
    if text[:1] == "%":
        if text[1:] not in env:
            raise ValueError(f"{text} is not defined above")
        return env[text[1:]]
    if text[:1] in ("(", "[", "{") and _closing(text, 0) == len(text) - 1:
        items = _split(text[1:-1])
        if text[0] == "[":
            return [parse_argument(item, env) for item in items]
        if text[0] == "{":
            pairs = [_split(item, ":") for item in items]
            return {parse_argument(k, env): parse_argument(v, env) for k, v in pairs}
        if not items or len(items) > 1 or text[1:-1].rstrip().endswith(","):
            return tuple(parse_argument(item, env) for item in items)
    return _parse_special(text, env)


def _parse_special(text: str, env: Env) -> Any:
    """Strings, shardings, groups, constructors, other dtypes and sympy expressions."""
    if text[:1] == '"':
        return json.loads(text)
    if text[:1] == "@":
        return parse_sharding(text[1:])
    if text[:1] == "<":
        return GroupRef(tuple(axis for axis in text[1:-1].split("&") if axis))
    match = _CONSTRUCTOR.match(text)
    if match is not None and _closing(text, match.end(1)) == len(text) - 1:
        name, items = match[1], _split(match[2])
        if name == "opaque":
            raise ValueError(f"{items[0]} is an object that text cannot say")
        if name in _MAKERS:
            return _MAKERS[name](*(parse_argument(item, env) for item in items))
        if name in _RECORDS:
            named = [item for item in items if _KEYWORD.match(item)]
            plain = [parse_argument(item, env) for item in items[: len(items) - len(named)]]
            fields = [item.split("=", 1) for item in named]
            return _RECORDS[name](*plain, **{k: parse_argument(v, env) for k, v in fields})
    if isinstance(getattr(torch, text, None), torch.dtype):
        return getattr(torch, text)
    return parse_expression(text)


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`; raises ValueError."""
    depth, at = 0, start
    while at < len(text):
        if text[at] == '"':
            at = _string_end(text, at)
            continue
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if not depth:
            return at
        at += 1
    raise ValueError(f"{text[start]!r} is never closed in {text[start:]!r}")


def _string_end(text: str, start: int) -> int:
    """Index after the JSON string that starts at `start`."""
    return int(json.JSONDecoder().raw_decode(text, start)[1])


def _split(text: str, separator: str = ",") -> list[str]:
    """Parts of `text` between separators outside brackets and strings, stripped; a last empty part
    (after a trailing comma) is dropped."""
    parts, start, at = [], 0, 0
    while at < len(text):
        if text[at] == '"':
            at = _string_end(text, at)
        elif text[at] in "([{":
            at = _closing(text, at) + 1
        else:
            if text[at] == separator:
                parts.append(text[start:at].strip())
                start = at + 1
            at += 1
    parts.append(text[start:].strip())
    return parts if parts[-1] else parts[:-1]
