"""Turn a trace into a `Graph`: roles, values, symbolic sizes, sources; tensor ops only."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from autopar.errors import UserError
from autopar.ir.graph import Graph, Size, Value, value_of

from .autograd_function import AutogradFunctionOp
from .explain import NUMBER_FROM_TENSOR, SHAPE_FROM_TENSOR, source_of
from .simplify import simplify
from .symbols import NeedsStaticError
from .trace import Traced


@dataclasses.dataclass(frozen=True)
class Role:
    """What a placeholder of a trace is: param, buffer, input or constant, under which names.

    `order` is its place among those of the same role.
    """

    role: str
    fqns: tuple[str, ...]
    order: int
    requires_grad: bool = False
    tensor: Tensor | None = None


def typed_graph(
    traced: Traced,
    roles: Sequence[Role],
    unused: Sequence[tuple[Role, Value]],
    rename: Mapping[sympy.Symbol, sympy.Symbol],
    module_names: Mapping[int, str],
) -> Graph:
    """The `Graph` of a trace.

    `roles[i]` belongs to placeholder `i`; `unused` are parameters, buffers and inputs that forward
    does not read. Symbols are renamed by `rename`; `module_names` maps ids of modules to paths.
    """
    return _Builder(traced, roles, unused, rename, module_names).build()


class _Builder:
    def __init__(
        self,
        traced: Traced,
        roles: Sequence[Role],
        unused: Sequence[tuple[Role, Value]],
        rename: Mapping[sympy.Symbol, sympy.Symbol],
        module_names: Mapping[int, str],
    ) -> None:
        self.traced = traced
        self.roles = roles
        self.unused = unused
        self.rename = dict(rename)
        self.module_names = module_names
        self.graph = torch.fx.Graph()
        self.env: dict[torch.fx.Node, Any] = {}
        self.names: dict[str, str] = {}  # placeholder by fully qualified name

    def build(self) -> Graph:
        self._placeholders()
        for node in self.traced.graph.graph.nodes:
            if node.op == "call_function":
                self.env[node] = self._call(node)
        output = next(n for n in self.traced.graph.graph.nodes if n.op == "output")
        results = [self.env[n] for n in output.args[0]]
        kept = results[: self.traced.outputs]
        mutated: dict[str, torch.fx.Node] = {}
        names = [*self.traced.assigned, *(self.roles[i].fqns[0] for i in self.traced.written)]
        for i in self.traced.written:
            self._check_written(self.roles[i])
        for name, result in zip(names, results[self.traced.outputs :], strict=True):
            # Assigned ones come first: `self.n += 1` writes a buffer and assigns it.
            mutated.setdefault(self.names[name], self._detached(result))
        results = [*kept, *mutated.values()]
        self.graph.output(tuple(results)).meta.update(_EMPTY_META, value=None)
        remove_dead_code(self.graph)
        return Graph(self.graph, outputs=self.traced.outputs, mutated=tuple(mutated))

    # Placeholders

    def _placeholders(self) -> None:
        traced = [n for n in self.traced.graph.graph.nodes if n.op == "placeholder"]
        entries: list[tuple[Role, Value, torch.fx.Node | None]] = [
            (role, self._value(node.meta["val"], role.requires_grad), node)
            for role, node in zip(self.roles, traced, strict=True)
        ]
        entries += [(role, value, None) for role, value in self.unused]
        attributes = [n for n in self.traced.graph.graph.nodes if n.op == "get_attr"]
        entries += [self._constant(node, len(entries) + i) for i, node in enumerate(attributes)]
        for wanted in ("param", "buffer", "constant", "input"):
            for role, value, node in sorted(entries, key=lambda entry: entry[0].order):
                if role.role == wanted:
                    new = self._placeholder(role, value)
                    if node is not None:
                        self.env[node] = new

    def _placeholder(self, role: Role, value: Value) -> torch.fx.Node:
        name = self._identifier(role.fqns[0])
        new = self.graph.create_node("placeholder", name, name=name)
        new.meta.update(_EMPTY_META, value=value, role=role.role, fqns=role.fqns)
        self.names.update(dict.fromkeys(role.fqns, new.name))
        if role.tensor is not None:
            new.meta["tensor"] = role.tensor
        return new

    def _constant(self, node: torch.fx.Node, order: int) -> tuple[Role, Value, torch.fx.Node]:
        tensor: Any = self.traced.graph
        for part in str(node.target).split("."):
            tensor = getattr(tensor, part)
        constant = getattr(tensor, "constant", None)
        tensor = constant if constant is not None else tensor
        value = Value(tuple(tensor.shape), tensor.dtype)
        return Role("constant", (str(node.target),), order, tensor=tensor), value, node

    @staticmethod
    def _identifier(fqn: str) -> str:
        name = re.sub(r"\W", "_", fqn)
        return name if name.isidentifier() else f"_{name}"

    def _check_written(self, role: Role) -> None:
        if role.role == "buffer":
            return
        name = role.fqns[0]
        fixes = {
            "param": "update parameters in the optimizer, or make it a buffer with register_buffer",
            "input": f"write into a copy: {name} = {name}.clone()",
            "constant": "register the tensor with register_buffer",
        }
        kind = {"param": "parameter", "input": "input", "constant": "tensor attribute"}[role.role]
        raise UserError(f"forward writes into its {kind} {name}", fix=fixes[role.role])

    # Calls

    def _call(self, node: torch.fx.Node) -> Any:
        fake = node.meta.get("val")
        if isinstance(fake, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
            return self._number(fake, node)
        if fake is None or node.target is torch.ops.aten._assert_tensor_metadata.default:
            return None  # checks, profiling, mode switches
        target, args, kwargs = node.target, self._map(node.args), self._map(node.kwargs)
        function = self.traced.functions.of(target)
        if function is not None:
            target, args = function, tuple(args[0])
        if target is operator.getitem:
            return self._getitem(node, args)
        try:
            value = self._result_value(target, args, kwargs, fake)
        except NeedsStaticError:
            raise _depends_on_data(node) from None
        made = simplify(target, args, kwargs, value)
        if isinstance(made, torch.fx.Node):
            return made
        if isinstance(made, list):  # one replacement per output
            return [
                part if isinstance(part, torch.fx.Node) else self._create(node, *part)
                for part in made
            ]
        return self._create(node, *made)

    def _getitem(self, node: torch.fx.Node, args: Any) -> Any:
        source, index = args
        if isinstance(source, list):
            return source[index]
        values = source.meta["value"]
        return self._create(node, operator.getitem, (source, index), {}, values[index])

    def _create(
        self, node: torch.fx.Node, target: Any, args: Any, kwargs: Any, value: Any
    ) -> torch.fx.Node:
        new = self.graph.create_node("call_function", target, args, kwargs, name=_readable(node))
        stack = node.meta.get("stack_trace") or ""
        new.meta.update(
            value=value,
            source=source_of(stack),
            stack=stack,
            module=self._module(node),
            region=(node.meta.get("custom") or {}).get("autopar_region"),
        )
        return new

    def _detached(self, node: torch.fx.Node) -> torch.fx.Node:
        value = value_of(node)
        if not value.requires_grad:
            return node
        new = self.graph.call_function(torch.ops.aten.detach.default, (node,))
        new.meta.update(node.meta, value=dataclasses.replace(value, requires_grad=False))
        return new

    def _module(self, node: torch.fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        for key in reversed(stack):
            identity = str(key).split("@")[0]
            if identity.isdigit() and int(identity) in self.module_names:
                return self.module_names[int(identity)]
        return ""

    # Values

    def _map(self, arguments: Any) -> Any:
        def one(arg: Any) -> Any:
            if isinstance(arg, torch.fx.Node):
                return self.env[arg]
            if isinstance(arg, (torch.SymInt, torch.SymFloat)):
                return self._number(arg)
            return arg

        # An env entry may be a list (a replaced multi-output op), which only getitem reads.
        return map_aggregate(arguments, one)

    def _number(self, number: Any, node: torch.fx.Node | None = None) -> Any:
        if not isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return number
        expr = sympy.sympify(number.node.expr).subs(self.rename)
        unknown = expr.free_symbols - set(self.rename.values())
        if unknown:
            raise _depends_on_data(node) if node is not None else NeedsStaticError
        if isinstance(number, torch.SymBool):
            return bool(expr) if expr in (sympy.true, sympy.false) else expr
        if expr.is_Integer and isinstance(number, torch.SymInt):
            return int(expr)
        return float(expr) if expr.is_number else expr

    def _value(self, fake: Tensor, requires_grad: bool) -> Value:
        shape: tuple[Size, ...] = tuple(self._number(size) for size in fake.shape)
        return Value(shape, fake.dtype, requires_grad=requires_grad)

    def _result_value(self, target: Any, args: Any, kwargs: Any, fake: Any) -> Any:
        flows = _any_requires_grad((args, kwargs)) and target not in _NOT_DIFFERENTIABLE
        if isinstance(fake, Tensor):
            return self._value(fake, flows and _carries_grad(fake.dtype))
        blocked: Sequence[int] = ()
        if isinstance(target, AutogradFunctionOp):
            blocked = target.non_differentiable
        elif target is torch.ops.autopar.batch_norm.default:
            blocked = (1, 2)
        return tuple(
            self._value(part, flows and _carries_grad(part.dtype) and i not in blocked)
            if isinstance(part, Tensor)
            else None
            for i, part in enumerate(fake)
        )


_EMPTY_META: dict[str, Any] = {"source": "", "stack": "", "module": "", "region": None}

_NOT_DIFFERENTIABLE: frozenset[Any] = frozenset(
    {
        torch.ops.aten.detach.default,
        torch.ops.aten.zeros_like.default,
        torch.ops.aten.ones_like.default,
        torch.ops.aten.full_like.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.rand_like.default,
        torch.ops.aten.randn_like.default,
        torch.ops.aten.new_zeros.default,
        torch.ops.aten.new_ones.default,
        torch.ops.aten.new_full.default,
        torch.ops.aten.new_empty.default,
    }
)


def _carries_grad(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _any_requires_grad(arguments: Any) -> bool:
    found = False

    def one(arg: Any) -> Any:
        nonlocal found
        if isinstance(arg, torch.fx.Node):
            value = arg.meta["value"]
            parts = value if isinstance(value, tuple) else (value,)
            found = found or any(part is not None and part.requires_grad for part in parts)
        return arg

    map_aggregate(arguments, one)
    return found


def _depends_on_data(node: torch.fx.Node) -> UserError:
    """The error for a size or number that only the values of tensors tell."""
    where = source_of(node.meta.get("stack_trace") or "") or None
    if node.target in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
        return UserError(NUMBER_FROM_TENSOR[0], where, NUMBER_FROM_TENSOR[1])
    return UserError(SHAPE_FROM_TENSOR[0], where, SHAPE_FROM_TENSOR[1])


def _readable(node: torch.fx.Node) -> str:
    return re.sub(r"_default$", "", node.name)


def remove_dead_code(graph: torch.fx.Graph) -> None:
    """Erase calls and constants that nothing uses."""
    for node in reversed(list(graph.nodes)):
        constant = node.op == "placeholder" and node.meta["role"] == "constant"
        if (constant or node.op == "call_function") and not node.users:
            graph.erase_node(node)
