"""The graph that every pass reads and writes: an FX graph with a typed value per node.

Node metadata keys that autopar owns:

- `value`: a `Value`, a tuple of `Value | None` (multi-output ops), or None (non-tensors).
- `role` (placeholders): "param", "buffer", "input" or "constant".
- `fqns` (placeholders): tuple of the names that share this tensor (`("wte.weight",
  "lm_head.weight")` for tied weights); for inputs a single readable name (`"kwargs.input_ids"`).
- `source`: `"model.py:31"`, the user's line that made the node, or "".
- `stack`: the full stack trace text, or "".
- `module`: dotted path of the module instance that made the node, or "".
- `region`: id of the activation-checkpointing region the node belongs to, or None.
- `recompute`: a `Recomputed` where the backward runs the node again, or None (`ir.recomputed`).

Graphs are functional: no op mutates its inputs. The output node holds one flat tuple: the user's
outputs first, then the new value of every mutated buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import sympy
import torch
import torch.fx

from .sharding import Sharding

Size: TypeAlias = int | sympy.Expr


@dataclass(frozen=True)
class Value:
    """Type of a tensor in the graph.

    `shape` is the *global* shape, whose sizes may be sympy expressions in the captured symbols
    until `specialise` makes them integers. `requires_grad` says whether autograd flows through it.
    """

    shape: tuple[Size, ...]
    dtype: torch.dtype
    sharding: Sharding | None = None
    requires_grad: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)

    def numel(self) -> Size:
        n: Size = 1
        for size in self.shape:
            n = n * size
        return n

    def with_sharding(self, sharding: Sharding | None) -> Value:
        return replace(self, sharding=sharding)

    def int_shape(self) -> tuple[int, ...]:
        """The shape as integers; raises TypeError while a size is symbolic."""
        return tuple(int(size) for size in self.shape)


@dataclass(frozen=True)
class Graph:
    """An FX graph plus what autopar must know of it beyond the nodes.

    `outputs` is the number of leading output-node entries that the user's code returns; entry
    `outputs + i` of the output node is the new value of `mutated[i]` (a buffer's placeholder name).
    `spent` says that nobody needs the graph as it is: who asks for a copy to change has it itself.
    """

    fx: torch.fx.Graph
    outputs: int
    mutated: tuple[str, ...] = ()
    spent: bool = False

    def placeholders(self, role: str | None = None) -> list[torch.fx.Node]:
        return [
            node
            for node in self.fx.nodes
            if node.op == "placeholder" and (role is None or node.meta["role"] == role)
        ]

    def calls(self) -> Iterator[torch.fx.Node]:
        for node in self.fx.nodes:
            if node.op == "call_function":
                yield node

    @property
    def output_node(self) -> torch.fx.Node:
        found: torch.fx.Node = next(n for n in reversed(self.fx.nodes) if n.op == "output")
        return found

    def copy(self) -> Graph:
        """A copy whose nodes and metadata dicts are independent of this graph's.

        A spent graph gives itself.
        """
        if self.spent:
            return self
        new = torch.fx.Graph()
        env: dict[torch.fx.Node, torch.fx.Node] = {}
        for node in self.fx.nodes:
            env[node] = new.node_copy(node, lambda n: env[n])
            env[node].meta = dict(node.meta)
        return replace(self, fx=new)


def value_of(node: torch.fx.Node) -> Value:
    """The single tensor value of a node; raises TypeError if it has none or several."""
    value = node.meta["value"]
    if not isinstance(value, Value):
        raise TypeError(f"%{node.name} has no single tensor value: {value!r}")
    return value


def values_of(node: torch.fx.Node) -> tuple[Value, ...]:
    """All tensor values of a node, none for non-tensors."""
    value = node.meta.get("value")
    if isinstance(value, Value):
        return (value,)
    if isinstance(value, tuple):
        return tuple(v for v in value if isinstance(v, Value))
    return ()


def tensor_inputs(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Tensor-valued input nodes in argument order (lists flattened), repeats kept.

    `getitem` nodes on a multi-output op have that op as their single input.
    """
    found: list[torch.fx.Node] = []
    _add_tensors(node.args, found)
    if node.kwargs:
        _add_tensors(node.kwargs.values(), found)
    return found


def _add_tensors(items: Iterable[object], found: list[torch.fx.Node]) -> None:
    for item in items:
        if isinstance(item, torch.fx.Node):
            if values_of(item):
                found.append(item)
        elif isinstance(item, (list, tuple)):
            _add_tensors(item, found)
        elif isinstance(item, dict):
            _add_tensors(item.values(), found)
