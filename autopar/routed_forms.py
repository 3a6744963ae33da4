"""The kernels that a lowered program runs for rows that go to their owners and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.fx

from .ir.graph import value_of
from .ir.lowered import ROUTED_GATHER
from .ir.pointwise import IDENTITY, Pointwise, parse_pointwise
from .runtime.kernels import combine, permute
from .runtime.kernels.ahead import Specialisation
from .runtime.kernels.emit import Kernel

Node = torch.fx.Node
DTYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
)
_ADDED = parse_pointwise("add(x, a0)")  # `runtime.dispatch`: sums are added to what was there

_TILE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "permute": permute.TILE_BYTES,
        "sum_segments": permute.SUM_TILE_BYTES,
        "combine": combine.TILE_BYTES,
        "combine_backward": combine.TILE_BYTES,
    }
)


@dataclass(frozen=True)
class _Launch:
    """A kernel and the constants that it has besides its tile; `tensors` not of the rows' dtype."""

    kernel: Kernel
    constants: Mapping[str, int]
    tensors: Mapping[str, str] = field(default_factory=dict)


def routed_forms(node: Node, dtype: str) -> list[Specialisation]:
    """What a routed gather or scatter launches, forward and, where it is trained, backward.

    `dtype` (`fp32`, `bf16`, `fp16`) is that of the rows.
    """
    width = value_of(node).int_shape()[-1]
    launches = _gathered(node) if node.target is ROUTED_GATHER else _scattered(node)
    return [_form(launch, width, dtype) for launch in launches]


def _gathered(node: Node) -> Iterator[_Launch]:
    args: Any = node.args
    kwargs: Any = node.kwargs
    trained = value_of(args[0]).requires_grad
    yield _Launch(permute.emit(), {"SLOTS": 1})
    if trained and len(args) <= 4:  # the gradient of a table with a padding row is in torch
        yield _Launch(permute.emit_sum(), {"SLOTS": 1})
    if "weight" not in kwargs:
        return
    weight, extras = kwargs["weight"], kwargs.get("extras", ())
    epilogue: Pointwise = kwargs.get("epilogue", IDENTITY)
    kinds = {"out": kwargs["dtype"], "g": kwargs["dtype"], "weight": value_of(weight).dtype}
    kinds |= {f"a{i}": value_of(n).dtype for i, n in enumerate(extras)}
    kinds |= {f"d{name}": kind for name, kind in kinds.items()}
    tensors = {f"{name}_ptr": f"*{DTYPES[kind]}" for name, kind in kinds.items() if kind in DTYPES}
    yield _Launch(combine.emit(epilogue, True), {"K": kwargs["ways"]}, tensors)
    slopes = {f"a{i}": n for i, n in enumerate(extras) if value_of(n).requires_grad}
    wanted = [name for name in slopes if str(epilogue.derivative(name)) != combine.ONE]
    wanted += ["weight"] if value_of(weight).requires_grad else []
    wanted += ["y"] if trained else []
    if wanted:
        kernel = combine.emit_backward(epilogue, True, tuple(wanted))
        yield _Launch(kernel, {"K": kwargs["ways"]}, tensors)


def _scattered(node: Node) -> Iterator[_Launch]:
    args: Any = node.args
    kwargs: Any = node.kwargs
    values, adds = args[2], bool(args[5]) if len(args) > 5 else kwargs.get("accumulate", False)
    weight, ways = kwargs.get("weight"), kwargs.get("ways", 0)
    yield _Launch(permute.emit(weighted=weight is not None), {"SLOTS": max(ways, 1)})
    if adds:
        yield _Launch(permute.emit_sum(_ADDED), {"SLOTS": 1})
    else:
        yield _Launch(permute.emit(default=True), {"SLOTS": 1})
    weighs = weight is not None and value_of(weight).requires_grad
    if not value_of(values).requires_grad and not weighs:
        return
    yield _Launch(permute.emit(), {"SLOTS": 1})
    if ways and value_of(values).requires_grad:
        yield _Launch(combine.emit(IDENTITY, weight is not None), {"K": ways})
    if weighs:
        yield _Launch(combine.emit_backward(IDENTITY, True, ("weight",)), {"K": ways})


def _form(launch: _Launch, width: int, dtype: str) -> Specialisation:
    """With the tile that the runtime takes for rows of this width."""
    itemsize = 4 if dtype == "fp32" else 2
    tile_bytes = _TILE_BYTES[launch.kernel.name]
    made = permute.form(launch.kernel, dtype, tile_bytes)
    rows, block = permute.tile(width, itemsize, tile_bytes)
    constants = {"WIDTH": width, "ROWS": rows, "BLOCK": block, **launch.constants}
    if launch.kernel.name == "combine_backward":
        constants |= combine.whole_rows(width, itemsize, launch.constants["K"])
    known = {n: kind for n, kind in launch.tensors.items() if n in made.signature}
    return replace(made, signature={**made.signature, **known}, constants=constants)
