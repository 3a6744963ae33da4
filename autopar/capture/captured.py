"""`capture`, and the `Capture` that it returns."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from autopar import compat
from autopar.errors import UserError
from autopar.ir.graph import Graph, Size, Value, value_of

from .explain import explain
from .fingerprint import fingerprint, renumbered
from .fold import plan_folding
from .repeats import KEPT, Run, shortened
from .side_effects import Attribute
from .specialise import named_as_with_sizes, with_sizes
from .stand_ins import StandIns, device_of, need_stand_ins, replaced
from .structure import Structure, paths, rebuild, take_apart
from .symbols import Dynamic, batch_of, guards_of, name_symbols, sequence_of
from .tandem import CannotFoldError
from .torch_level import TorchGraph, bind_arguments, capture_torch_graph
from .trace import trace
from .typed import Role, typed_graph
from .unfold import unfold


class CaptureMismatchError(ValueError):
    """A call differs in structure or constants from the captured one: capture again."""


@dataclasses.dataclass(frozen=True)
class Capture:
    """An ordinary module's forward on one batch, as a graph.

    `symbols` gives each symbolic size its value at capture, `symbol_of` the places to read it: for
    each symbol in the order of `symbols`, (index of the flat input, dim). `guards` are conditions
    on the symbols under which the graph is right. Valid for the mode (train or eval, gradients on
    or off, autocast) of the capture; whoever keeps captures keeps one per mode. `notes` says how
    the graph came about: which layers were copied or why none, whether the sequence is symbolic.

    `fingerprint` is that of the capture with a symbolic batch and a sequence as long as here, and
    operations that both captures have bear the same names in both. So a plan made from a folded
    capture with a symbolic sequence fits a plain capture of the same model and lengths.
    """

    graph: Graph
    symbols: Mapping[sympy.Symbol, int]
    symbol_of: tuple[tuple[int, int], ...]
    guards: tuple[Any, ...]
    fingerprint: str
    signature: inspect.Signature
    arguments: Structure
    result: Structure
    attributes: tuple[Attribute, ...]
    notes: tuple[str, ...] = ()

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call of the module, in the order of `graph.placeholders("input")`.

        Raises `CaptureMismatchError` where anything but the tensors differs from the captured call.
        """
        tensors, structure = take_apart(bind_arguments(self.signature, tuple(args), dict(kwargs)))
        if structure != self.arguments:
            raise CaptureMismatchError("the arguments differ from those captured, beyond tensors")
        return tensors

    def bind(self, inputs: Sequence[Tensor]) -> dict[sympy.Symbol, int] | None:
        """The sizes of this batch, or None where the graph is not valid for it."""
        placeholders = self.graph.placeholders("input")
        if len(inputs) != len(placeholders):
            return None
        sizes: dict[sympy.Symbol, int] = {}
        for symbol, (index, dim) in zip(self.symbols, self.symbol_of, strict=True):
            if inputs[index].dim() <= dim:
                return None
            sizes[symbol] = inputs[index].shape[dim]
        for tensor, node in zip(inputs, placeholders, strict=True):
            if not _fits(tensor, value_of(node), sizes):
                return None
        return sizes if all(guard.subs(sizes) == sympy.true for guard in self.guards) else None

    def specialised(self, sizes: Mapping[sympy.Symbol, int]) -> Capture:
        """The capture with numbers for some symbols; raises ValueError where a guard forbids it.

        With the lengths at capture for all but the batch, it is what a capture with a symbolic
        batch alone gives.
        """
        guards = [guard.subs(dict(sizes)) for guard in self.guards]
        if any(guard == sympy.false for guard in guards):
            raise ValueError(f"the graph is not right for {dict(sizes)}")
        places = zip(self.symbols, self.symbol_of, strict=True)
        return dataclasses.replace(
            self,
            graph=with_sizes(self.graph, sizes),
            symbols={s: n for s, n in self.symbols.items() if s not in sizes},
            symbol_of=tuple(place for symbol, place in places if symbol not in sizes),
            guards=tuple(guard for guard in guards if guard != sympy.true),
        )

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """What the module returns, from the graph's user outputs."""
        return rebuild(self.result, outputs)

    def assign(self, module: nn.Module, outputs: Sequence[Any]) -> None:
        """Assign the attributes that forward assigns (`self.aux_loss = ...`), on `module`."""
        for attribute in self.attributes:
            owner = module.get_submodule(attribute.path)
            setattr(owner, attribute.name, rebuild(attribute.value, outputs))


def capture(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    dynamic_batch: bool = True,
    dynamic_sequence: bool = False,
    fold: bool = False,
) -> Capture:
    """Capture `module(*args, **kwargs)` in its present mode; the module is left as it was.

    Parameters and inputs may be on the `meta` device, parameters may be DTensors. With
    `dynamic_batch`, dim 0 of the first tensor argument, and of all others whose dim 0 is as large,
    becomes a symbol `b` where forward allows it. With `dynamic_sequence`, so does dim 1 of tokens
    [batch, sequence] and of what shares it, as `s`; where forward fixes that length, it stays a
    number, and `notes` says so. Raises `UserError` where forward cannot be captured as one graph.

    With `fold`, a model that repeats a block is captured with three copies of it, from which the
    rest is made: the same graph and fingerprint in a time that hardly grows with the depth. Where
    layers do not all do the same, all are captured; `notes` says what happened.
    """
    signature = inspect.signature(module.forward)
    try:
        arguments = bind_arguments(signature, tuple(args), dict(kwargs))
    except TypeError as error:
        count = len(args) + len(kwargs)
        raise UserError(
            f"{type(module).__name__}.forward{signature} is given {count} argument"
            f"{'s' * (count != 1)}: {error}",
            fix="call it with what forward takes",
        ) from error
    tensors, structure = take_apart(arguments)
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_undisturbed(module))
        runs = _runs(module, args, kwargs, notes) if fold else ()
        stand_ins = None
        if need_stand_ins(module, tensors):
            stand_ins = StandIns(device_of(module, tensors))
            tensors = [stand_ins.of(tensor) for tensor in tensors]
            arguments = rebuild(structure, tensors)
            bound = inspect.BoundArguments(signature, collections.OrderedDict(arguments))
            args, kwargs = bound.args, bound.kwargs
        call = _Call(module, tuple(args), dict(kwargs), signature, tensors, structure, stand_ins)
        batch = batch_of(tensors)
        sequence = sequence_of(tensors, batch) if dynamic_sequence else None
        sizes = [size for size in (batch if dynamic_batch else None, sequence) if size is not None]
        for count in range(len(sizes), 0, -1):
            # Whatever goes wrong with a symbolic size may go right with a number.
            with contextlib.suppress(Exception):
                return _capture(call, sizes[:count], runs, notes, sequence)
        try:
            return _capture(call, [], runs, notes, sequence)
        except Exception as error:
            explained = explain(error)
            raise explained from (None if explained is error else error)


def _runs(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], notes: list[str]
) -> tuple[Run, ...]:
    try:
        return plan_folding(module, args, kwargs)
    except CannotFoldError as error:
        notes.append(f"every layer was captured: {error}")
        return ()


@dataclasses.dataclass(frozen=True)
class _Call:
    """The call to capture; `tensors` and `structure` are its arguments, taken apart.

    With `stand_ins` the tensors are such already, and the module's are to be replaced.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    signature: inspect.Signature
    tensors: Sequence[Tensor]
    structure: Structure
    stand_ins: StandIns | None


def _capture(
    call: _Call,
    dynamic: Sequence[Dynamic],
    runs: Sequence[Run],
    notes: Sequence[str],
    sequence: Dynamic | None,
) -> Capture:
    """Capture from the shortened module, where that gives the whole graph, or from the whole."""
    made = None
    if runs:
        try:
            made = _captured(call, dynamic, runs)
            copies = ", ".join(f"{run} from {KEPT * run.period}" for run in runs)
            notes = (*notes, f"layers were copied: {copies}")
        except CannotFoldError as error:
            notes = (*notes, f"every layer was captured: {error}")
    if made is None:
        made = _captured(call, dynamic, ())
    if sequence is not None and sequence.symbol not in made.symbols:
        length = sequence.tensors[0].shape[1]
        notes = (*notes, f"the sequence is static: forward fixes its length to {length}")
    return dataclasses.replace(made, notes=tuple(notes))


def _captured(call: _Call, dynamic: Sequence[Dynamic], runs: Sequence[Run]) -> Capture:
    with contextlib.ExitStack() as stack:
        if call.stand_ins is not None:
            with shortened(call.module, runs):  # the layers left out need none
                stack.enter_context(replaced(call.module, call.stand_ins))
        return _traced(call, dynamic, runs)


def _traced(call: _Call, dynamic: Sequence[Dynamic], runs: Sequence[Run]) -> Capture:
    module, tensors = call.module, call.tensors
    owned = _owned(module, tensors, paths(call.structure), call.stand_ins)
    module_names = {id(m): name for name, m in module.named_modules()}
    with shortened(module, runs):
        captured = capture_torch_graph(module, call.args, call.kwargs, dynamic)
        captured = _renamed(captured, module, module_names)
    traced = trace(captured, device_of(module, tensors).type)
    positions = {id(t): i for i, t in enumerate(captured.inputs)}
    values = [n.meta["val"] for n in traced.graph.graph.nodes if n.op == "placeholder"]
    fakes = [values[positions[id(t)]] if id(t) in positions else None for t in tensors]
    symbols = name_symbols(fakes, dynamic, tensors)
    graph = typed_graph(
        traced,
        _roles(captured, owned),
        _unused(captured, owned, dynamic, symbols.hints),
        symbols.rename,
        module_names,
    )
    graph = unfold(graph, runs, len(captured.buffers)) if runs else renumbered(graph)
    plain = graph
    optional = [size.symbol for size in dynamic if size.optional and size.symbol in symbols.hints]
    if optional:
        lengths = {symbol: symbols.hints[symbol] for symbol in optional}
        plain = with_sizes(graph, lengths)
        graph = named_as_with_sizes(graph, lengths)
    made = Capture(
        graph=graph,
        symbols=symbols.hints,
        symbol_of=symbols.places,
        guards=guards_of(traced.shape_env, symbols),
        fingerprint=fingerprint(plain),
        signature=call.signature,
        arguments=call.structure,
        result=captured.result,
        attributes=captured.attributes,
    )
    # Forward fixes the length of the tokens, say, but nothing tells torch that of the targets.
    lengths = {symbol: symbols.hints[symbol] for symbol in optional if symbol in symbols.fixed}
    return made.specialised(lengths) if lengths else made


def _renamed(
    captured: TorchGraph, module: nn.Module, module_names: Mapping[int, str]
) -> TorchGraph:
    """With the names of the whole model: layers that follow dropped ones are numbered anew."""
    names = {name: module_names[id(child)] for name, child in module.named_modules()}

    def renamed(buffer: str) -> str:
        path, _, name = buffer.rpartition(".")
        return f"{names[path]}.{name}" if path else name

    return dataclasses.replace(
        captured,
        buffers={renamed(name): number for name, number in captured.buffers.items()},
        attributes=tuple(
            dataclasses.replace(attribute, path=names[attribute.path])
            for attribute in captured.attributes
        ),
    )


def _roles(captured: TorchGraph, owned: Sequence[tuple[Tensor, Role]]) -> list[Role]:
    """What each input of dynamo's graph is."""
    known = {id(tensor): role for tensor, role in owned}
    roles = []
    for position, tensor in enumerate(captured.inputs):
        role = known.get(id(tensor))
        if role is None:
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise UserError(
                    f"forward uses a tensor of shape {tuple(tensor.shape)} that requires grad and "
                    "is not a parameter of the module",
                    fix="assign it as an nn.Parameter of the module, or use nn.ParameterList",
                )
            role = Role("constant", (f"constant_{position}",), position, tensor=tensor)
        roles.append(role)
    return roles


def _unused(
    captured: TorchGraph,
    owned: Sequence[tuple[Tensor, Role]],
    dynamic: Sequence[Dynamic],
    symbols: Mapping[sympy.Symbol, int],
) -> list[tuple[Role, Value]]:
    """Parameters, buffers and inputs that dynamo's graph does not read."""
    used = {id(tensor) for tensor in captured.inputs}
    found = []
    for tensor, role in owned:
        if id(tensor) not in used:
            shape: list[Size] = list(tensor.shape)
            for size in dynamic:
                if size.symbol in symbols and size.has(tensor):
                    shape[size.dim] = size.symbol
            value = Value(tuple(shape), tensor.dtype, requires_grad=role.requires_grad)
            found.append((role, value))
    return found


def _owned(
    module: nn.Module,
    tensors: Sequence[Tensor],
    names: Mapping[int, str],
    stand_ins: StandIns | None,
) -> list[tuple[Tensor, Role]]:
    """Every parameter, buffer and tensor argument once, with its role and all its names."""
    found: dict[int, tuple[Tensor, str, list[str]]] = {}
    named: tuple[tuple[str, Any], ...] = (
        ("param", module.named_parameters(remove_duplicate=False)),
        ("buffer", module.named_buffers(remove_duplicate=False)),
        ("input", ((names[i], tensor) for i, tensor in enumerate(tensors))),
    )
    for role, entries in named:
        for name, tensor in entries:
            if stand_ins is not None:
                tensor = stand_ins.known(tensor)
            found.setdefault(id(tensor), (tensor, role, []))[2].append(name)
    grad = torch.is_grad_enabled()
    return [
        (tensor, Role(role, tuple(fqns), i, grad and tensor.requires_grad and role != "buffer"))
        for i, (tensor, role, fqns) in enumerate(found.values())
    ]


def _fits(tensor: Tensor, value: Value, sizes: Mapping[sympy.Symbol, int]) -> bool:
    if tensor.dtype != value.dtype or tensor.dim() != value.rank:
        return False
    if torch.is_grad_enabled() and tensor.requires_grad != value.requires_grad:
        return False
    return all(
        actual == (size.subs(sizes) if isinstance(size, sympy.Expr) else size)
        for actual, size in zip(tensor.shape, value.shape, strict=True)
    )


@contextlib.contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Restore the random state, and keep torch from logging what is raised as well."""
    with torch.random.fork_rng(devices=_cuda_devices(module)), compat.quiet_torch_logs():
        yield


def _cuda_devices(module: nn.Module) -> list[int]:
    return sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
