"""One rank's program, loaded: the lowered graph as a function over live groups."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor

from autopar.ir.graph import Graph, values_of
from autopar.ir.lowered import (
    CLOSE,
    EXCHANGE,
    GATHER_VARY,
    PVARY,
    Collective,
    GroupRef,
    LoweredOp,
)
from autopar.ir.recomputed import mark_of

from .bindings import BINDINGS, close_one, exchange
from .codegen import compile_graph
from .collectives import Pending, Use
from .group import Group
from .keyed_dropout import KEYED_DROPOUT, keyed_dropout, read_keys, with_keys
from .recompute import run_region
from .regather import Regather
from .unseen import left_alone, with_unseen


@dataclass(frozen=True)
class Program:
    """A loaded program. `placeholders` are (role, names) in the order of `run`'s arguments.

    `run(*tensors)` returns the user's outputs, then new buffer values. `source` is its Python text,
    `schedule` a digest of its collectives in order: equal on all ranks or they would deadlock.
    """

    run: Callable[..., tuple[Any, ...]]
    placeholders: tuple[tuple[str, tuple[str, ...]], ...]
    constants: Mapping[str, Tensor]
    outputs: int
    mutated: tuple[str, ...]
    source: str
    schedule: str
    is_random: bool


def load_program(
    graph: Graph,
    groups: Mapping[tuple[str, ...], Group],
    backend: str | None = None,
    device: torch.device | None = None,
    ahead: bool | None = None,
) -> Program:
    """Bind a lowered graph to live groups.

    Gathered copies of parameters marked `regather` are dropped after their use, and gathered again
    in the backward: one bucket `ahead` of it, by default anywhere but on CPU. `backend` is a
    `torch.compile` backend for what is between the lowered ops ("inductor"), or None or "eager" for
    one ATen call per op. What the graph makes of nothing (`arange`, `zeros`) and its constants are
    on `device`.
    """
    if device is not None and device.type != "cpu":
        graph = _on_device(graph, device)
    dropped = {node.name for node in graph.placeholders("param") if node.meta["regather"]}
    if ahead is None:
        ahead = device is not None and device.type != "cpu"
    keeper = Regather(ahead) if dropped else None
    bindings = dict(BINDINGS)
    if keeper is not None:
        graph = _mark_regathered(graph, dropped)
        bindings.update(_regathering(keeper))
    if backend is None or backend == "eager":
        compiled = compile_graph(graph, bindings.__getitem__, groups)
        run = compiled.run
    else:
        # The lowered ops' autograd Functions hand each other what is in flight behind autograd's
        # back: no compiler may look into them.
        bound = {op: left_alone(call) for op, call in bindings.items()}
        bound[KEYED_DROPOUT] = keyed_dropout
        keyed = read_keys(graph)
        compiled = compile_graph(keyed, bound.__getitem__, groups, run=_running_compiled(backend))
        run = torch.compile(compiled.run, backend=backend, dynamic=False)
        run = with_unseen(run, [node.meta["role"] for node in keyed.placeholders()])
        if keyed is not graph:
            run = with_keys(run, graph, device)
    if keeper is not None:
        run = _saving(run, keeper)
    by_name = {n.name: n for n in graph.placeholders("buffer")}
    return Program(
        run=run,
        placeholders=tuple((n.meta["role"], n.meta["fqns"]) for n in graph.placeholders()),
        constants={
            n.meta["fqns"][0]: n.meta["tensor"].to(device) for n in graph.placeholders("constant")
        },
        outputs=graph.outputs,
        mutated=tuple(by_name[name].meta["fqns"][0] for name in graph.mutated),
        source=compiled.source,
        schedule=schedule_of(graph),
        is_random=any(n.meta["role"] == "seed" for n in graph.placeholders()),
    )


def schedule_of(graph: Graph) -> str:
    """Digest of the collectives that a program issues, in order: op, group axes and dtypes.

    And of the region that issues them again in the backward.
    """
    digest = hashlib.sha256()
    for node in graph.calls():
        if isinstance(node.target, LoweredOp):
            arguments: list[Any] = list(node.args)
            parts = [str(a) for a in arguments if isinstance(a, (Collective, GroupRef))]
            dtypes = [str(v.dtype) for v in values_of(node)]
            wire = "int8" if node.kwargs.get("kernel") == "int8" else ""  # other messages
            digest.update(f"{node.target.name} {parts} {dtypes} {mark_of(node)}{wire}\n".encode())
    return digest.hexdigest()


def _running_compiled(backend: str) -> Callable[..., tuple[Any, ...]]:
    """`run_region` of compiled bodies, but selective ones: their kernels are watched."""
    compiled: dict[Any, Any] = {}

    def run(body: Any, selective: bool, *rest: Any) -> tuple[Any, ...]:
        if not selective and body not in compiled:
            compiled[body] = torch.compile(body, backend=backend, dynamic=False)
        return run_region(compiled.get(body, body), selective, *rest)

    apart: Callable[..., tuple[Any, ...]] = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
    return apart


def _on_device(graph: Graph, device: torch.device) -> Graph:
    """The graph with a device for every op that makes a tensor of none."""
    new = graph.copy()
    for node in new.calls():
        schema = getattr(node.target, "_schema", None)
        if schema is None or any("Tensor" in str(a.type) for a in schema.arguments):
            continue
        if any(a.name == "device" for a in schema.arguments):
            node.kwargs = {**node.kwargs, "device": device}
    return new


_REGATHERED_EXCHANGE = LoweredOp("regathered_exchange")
_REGATHERED_CLOSE = LoweredOp("regathered_close")


def _mark_regathered(graph: Graph, dropped: set[str]) -> Graph:
    """Give the gathers of `dropped` parameters targets of their own, those of several axes too."""
    new = graph.copy()
    known = {node for node in new.placeholders("param") if node.name in dropped}
    known |= {node for node in new.calls() if node.meta.get("regather")}  # casts of such
    for node in list(new.fx.nodes):
        if node.target is operator.getitem:
            known.update({node} if node.args[0] in known else ())
            continue
        if node.args[:1] not in ((GATHER_VARY,), (PVARY,)) or node.target not in (EXCHANGE, CLOSE):
            continue
        if node.target is EXCHANGE:
            shards = list(node.args[3:])
        else:
            edge = node.args[4]
            assert isinstance(edge, torch.fx.Node) and isinstance(edge.args[0], torch.fx.Node)
            shards = list(edge.args[0].args[3:])
        if not all(s in known for s in shards):
            continue
        known.add(node)
        if node.args[0] is PVARY:  # on the same memory as what it reads
            continue
        if node.target is EXCHANGE:
            node.target = _REGATHERED_EXCHANGE
        else:
            node.target = _REGATHERED_CLOSE
            node.args = (*node.args[:3], tuple(shards), *node.args[3:])
    return new


def _regathering(keeper: Regather) -> dict[LoweredOp, Callable[..., Any]]:
    def exchanged(
        op: Collective, specs: Any, group: Group, *tensors: Tensor, kernel: Use = None
    ) -> Any:
        out = exchange(op, specs, group, *tensors, kernel=kernel)
        keeper.register(op, specs, group, tensors, _many(out), kernel)
        return out

    def closed(
        op: Collective,
        specs: Any,
        group: Group,
        shards: Any,
        pending: Pending,
        *edges: Tensor,
        kernel: Use = None,
    ) -> Any:
        out = close_one(op, specs, group, pending, *edges, kernel=kernel)
        keeper.register(op, specs, group, shards, _many(out), pending.kernel)
        return out

    return {_REGATHERED_EXCHANGE: exchanged, _REGATHERED_CLOSE: closed}


def _many(out: Tensor | tuple[Tensor, ...]) -> Sequence[Tensor]:
    return out if isinstance(out, tuple) else (out,)


def _saving(run: Callable[..., tuple[Any, ...]], keeper: Regather) -> Callable[..., Any]:
    def wrapped(*tensors: Any) -> tuple[Any, ...]:
        with keeper.saving() if torch.is_grad_enabled() else nullcontext():
            return run(*tensors)

    return wrapped
