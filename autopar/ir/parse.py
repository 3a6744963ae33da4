"""Graphs of the text that `text` prints: its inverse."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx

from .brackets import closing_bracket, split_outside
from .expressions import parse_expression
from .graph import Graph, Size, Value
from .lowered import COLLECTIVES, LOWERED_OPS, GroupRef
from .mesh import Axis, Mesh
from .pointwise import parse_pointwise
from .sharding import REDUCTIONS, WHOLE, Sharding, Split
from .text import DTYPES, RECORDS, can_grad, inputs_require_grad

Env = Mapping[str, torch.fx.Node]

ROLES = ("param", "buffer", "input", "constant", "received", "prepared", "combined")

_WORDS: dict[str, Any] = {
    **DTYPES,
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
    end = closing_bracket(text, match.end() - 1) if match else 0
    if match is None:
        raise ValueError(f"cannot read type {text.strip()!r}")
    dtype, rest = _parse_dtype(match[1]), text[end + 1 :].strip()
    flag = requires_grad and can_grad(dtype)
    for word, says in (("nograd", False), ("grad", True)):
        if re.search(rf"(^|\s){word}$", rest):
            rest, flag = rest.removesuffix(word).strip(), says
            break
    if rest and not rest.startswith("@"):
        raise ValueError(f"cannot read {rest!r} after the type {text[: end + 1].strip()!r}")
    shape = tuple(_parse_size(part) for part in split_outside(text[match.end() : end]))
    return Value(shape, dtype, parse_sharding(rest[1:]) if rest else None, flag)


def _parse_dtype(name: str) -> torch.dtype:
    dtype = DTYPES.get(name, getattr(torch, name, None))
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
        node.meta.update(
            _meta(role=role[1], fqns=tuple(map(json.loads, split_outside(quote + fqns))))
        )
    else:
        kind, equals, call = body.partition("= ")
        if not equals:
            raise ValueError(f"%{name} is neither a placeholder ({', '.join(ROLES)}) nor a call")
        node = _parse_call(name, call, fx, env)
    node.name = name  # FX renames what hides a builtin: `input`
    env[name] = node
    if kind.strip() != "?":
        node.meta["value"] = _parse_node_value(kind.strip(), inputs_require_grad(node))


def _parse_node_value(text: str, requires_grad: bool) -> Value | tuple[Value | None, ...] | None:
    if not text:
        return None
    if not text.startswith("("):
        return parse_value(text, requires_grad)
    items = split_outside(text[1 : closing_bracket(text, 0)])
    return tuple(None if i == "None" else parse_value(i, requires_grad) for i in items)


def _meta(**known: Any) -> dict[str, Any]:
    return {"source": "", "stack": "", "module": "", "region": None, **known}


def _parse_call(name: str, text: str, fx: torch.fx.Graph, env: Env) -> torch.fx.Node:
    start = text.find("(")
    if start < 0:
        raise ValueError(f"%{name} is not a call: {text!r}")
    end = closing_bracket(text, start)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for part in split_outside(text[start + 1 : end]):
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
    results = [parse_argument(part, env) for part in split_outside(body)]
    outputs = len(results)
    mutated: list[str] = []
    for part in split_outside(updates):
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
    if text[:1] in ("(", "[", "{") and closing_bracket(text, 0) == len(text) - 1:
        items = split_outside(text[1:-1])
        if text[0] == "[":
            return [parse_argument(item, env) for item in items]
        if text[0] == "{":
            pairs = [split_outside(item, ":") for item in items]
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
    if match is not None and closing_bracket(text, match.end(1)) == len(text) - 1:
        name, items = match[1], split_outside(match[2])
        if name == "opaque":
            raise ValueError(f"{items[0]} is an object that text cannot say")
        if name in _MAKERS:
            return _MAKERS[name](*(parse_argument(item, env) for item in items))
        if name in RECORDS:
            named = [item for item in items if _KEYWORD.match(item)]
            plain = [parse_argument(item, env) for item in items[: len(items) - len(named)]]
            fields = [item.split("=", 1) for item in named]
            return RECORDS[name](*plain, **{k: parse_argument(v, env) for k, v in fields})
    if isinstance(getattr(torch, text, None), torch.dtype):
        return getattr(torch, text)
    return parse_expression(text)
