"""Discovery of the sharding rule of an op that has none, by running it on shards.

Hypotheses are sets of input dims of equal size that one factor might split. A hypothesis holds if
the outputs of two and of three shards put together, by concatenation, sum, maximum or minimum, to
the whole op's, and so do the gradients: concatenated for split inputs, summed for replicated ones.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx
from torch import Tensor

from .graph import Size, Value, tensor_inputs, values_of
from .mesh import Mesh
from .oracle import Oracle, close, reduced, unchanged
from .rule import Choice, ShardingRule, factor_sizes, parse_rule, place
from .rules.common import letters, notation, take

Slot = tuple[int, int]  # (input, dim)

MAX_ELEMENTS = 1 << 18  # in all inputs of a trial; larger calls are tried at reduced sizes
MAX_HYPOTHESES = 32
SYMBOL_SIZE = 6
SMALL_SIZES = (6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
EXTENTS = (2, 3)


@dataclass(frozen=True)
class Signature:
    """What identifies a call for the cache: the function, and its arguments as text."""

    run: Callable[..., Any]
    text: str
    node: torch.fx.Node = field(compare=False)


@dataclass(frozen=True)
class Hypothesis:
    """Input dims split by one factor, and per output the dim it splits or how it reduces."""

    slots: frozenset[Slot]
    outputs: tuple[int | str, ...]


def discover(node: torch.fx.Node, run: Callable[..., Any] | None = None) -> ShardingRule:
    """A rule for a call, found by trial; no dim may be split if nothing works.

    `run` calls the op on tensors in place of `node.target`. Deterministic: inputs come from fixed
    seeds, and effort is bounded by numbers of elements and hypotheses, not by time, so that every
    rank finds the same rule. Random ops, ops that fail on CPU tensors or give the same for all
    inputs, and calls with arguments that only the graph knows are left whole. Equal calls are
    looked up.
    """
    target = run if run is not None else node.target
    if not callable(target) or not _is_closed(node):
        return whole_rule(node)
    position = {source: f"#{i}" for i, source in enumerate(dict.fromkeys(tensor_inputs(node)))}
    specs = [(values_of(source)[0].shape, values_of(source)[0].dtype) for source in position]
    arguments = torch.fx.node.map_arg((node.args, node.kwargs), position.__getitem__)
    text = f"{arguments} {specs} {[v.rank for v in values_of(node)]}"
    return _discover(Signature(target, text, _callable_node(node, target)))


@functools.lru_cache(maxsize=1024)
def _discover(signature: Signature) -> ShardingRule:
    node = signature.node
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _one_thread():
        trials = _trials(node)
        if trials is None or _is_random(node, trials[0].tensors) or _says_nothing(trials):
            return whole_rule(node)
        found: list[Hypothesis] = []
        for slots in _hypotheses([tuple(x.shape) for x in trials[0].tensors]):
            if any(slots & other.slots for other in found):
                continue
            hypothesis = _layout(trials[0], slots)
            if hypothesis is not None and all(
                _holds(trial, [*found, hypothesis], len(found)) for trial in trials
            ):
                found.append(hypothesis)
        return _rule(trials[0], found)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of tiny ops: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def whole_rule(node: torch.fx.Node) -> ShardingRule:
    """The rule of a call that can only run replicated."""
    names = letters()
    inputs = [
        [f"[{f}]" for f in take(names, values_of(source)[0].rank)] for source in tensor_inputs(node)
    ]
    outputs = [[f"[{f}]" for f in take(names, value.rank)] for value in values_of(node)]
    return parse_rule(notation(inputs, outputs))


def _is_closed(node: torch.fx.Node) -> bool:
    """Whether all of the arguments' nodes are single tensors."""
    tensors = tensor_inputs(node)
    return all(source in tensors for source in node.all_input_nodes) and all(
        isinstance(source.meta.get("value"), Value) for source in tensors
    )


def _callable_node(node: torch.fx.Node, run: Callable[..., Any]) -> torch.fx.Node:
    """The call alone in a graph of its own, every use of an input its own placeholder."""
    graph = torch.fx.Graph()

    def placeholder(source: torch.fx.Node) -> torch.fx.Node:
        new = graph.placeholder(source.name)
        new.meta["value"] = source.meta["value"]
        return new

    args = torch.fx.node.map_arg(node.args, placeholder)
    kwargs = torch.fx.node.map_arg(node.kwargs, placeholder)
    new = graph.call_function(run, args, kwargs)
    new.meta["value"] = node.meta["value"]
    return new


def _trials(node: torch.fx.Node) -> list[Oracle] | None:
    """The call run whole on two draws of inputs, at sizes and in a dtype that it accepts."""
    values = [values_of(source)[0] for source in tensor_inputs(node)]
    given = [tuple(_size(s) for s in v.shape) for v in values]
    small = _reduced([v.shape for v in values])
    fits = sum(torch.Size(shape).numel() for shape in given) <= MAX_ELEMENTS
    for shapes in (given, small) if fits else (small,):
        for wide in (True, False):
            try:
                trials = [
                    Oracle.of(node, _inputs(values, shapes, wide, seed), localise=unchanged)
                    for seed in (1, 2)
                ]
            except Exception:  # a user's op may raise anything on inputs it does not like
                continue
            ranks = [value.rank for value in values_of(node)]
            if [y.dim() for y in trials[0].outputs] == ranks:
                return trials
    return None


def _size(size: Size) -> int:
    """A concrete size: symbols are six."""
    if isinstance(size, int):
        return size
    return int(sympy.sympify(size).subs(dict.fromkeys(size.free_symbols, SYMBOL_SIZE)))


def _reduced(shapes: Sequence[Sequence[Size]]) -> list[tuple[int, ...]]:
    """Small shapes with the same pattern of equal sizes."""
    small: dict[str, int] = {}
    for shape in shapes:
        for size in shape:
            if str(size) not in small and size != 1:
                small[str(size)] = SMALL_SIZES[len(small) % len(SMALL_SIZES)]
    return [tuple(1 if size == 1 else small[str(size)] for size in shape) for shape in shapes]


def _inputs(
    values: Sequence[Value], shapes: Sequence[tuple[int, ...]], wide: bool, seed: int
) -> list[Tensor]:
    """Random inputs; floats in float64 if `wide`, integers small enough to index any dim."""
    generator = torch.Generator().manual_seed(seed)
    high = max(2, min((size for shape in shapes for size in shape if size > 1), default=2))

    def draw(value: Value, shape: tuple[int, ...]) -> Tensor:
        if value.dtype == torch.bool:
            return torch.randint(2, shape, generator=generator).bool()
        if not value.dtype.is_floating_point and not value.dtype.is_complex:
            return torch.randint(high, shape, generator=generator).to(value.dtype)
        narrow = value.dtype in (torch.float32, torch.float16, torch.bfloat16)
        dtype = torch.float64 if wide and narrow else value.dtype
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [draw(value, shape) for value, shape in zip(values, shapes, strict=True)]


def _is_random(node: torch.fx.Node, tensors: Sequence[Tensor]) -> bool:
    """Whether the same inputs give other outputs under another seed."""
    seen: list[tuple[Tensor, ...]] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        seen.append(Oracle.of(node, tensors, localise=unchanged, leaves=()).outputs)
    return not all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def _says_nothing(trials: Sequence[Oracle]) -> bool:
    """Whether an output is the same for all inputs that were drawn.

    A loss of labels that are 1 or -1, say, is zero for any others, and zeros recombine anyhow.
    """
    first, second = trials[0].outputs, trials[1].outputs
    return any(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)
    )


def _hypotheses(shapes: Sequence[tuple[int, ...]]) -> Iterator[frozenset[Slot]]:
    """Sets of dims to split together: all of one size, at one position, in pairs, alone."""
    by_size: dict[int, list[Slot]] = {}
    for i, shape in enumerate(shapes):
        for dim, size in enumerate(shape):
            if size >= max(EXTENTS):
                by_size.setdefault(size, []).append((i, dim))
    seen: dict[frozenset[Slot], None] = dict.fromkeys(map(frozenset, by_size.values()))
    for slots in by_size.values():
        from_front = [slot[1] for slot in slots]
        from_back = [slot[1] - len(shapes[slot[0]]) for slot in slots]
        for keys in (from_front, from_back):
            groups: dict[int, list[Slot]] = {}
            for slot, key in zip(slots, keys, strict=True):
                groups.setdefault(key, []).append(slot)
            seen.update(dict.fromkeys(map(frozenset, groups.values())))
        pairs = (pair for pair in itertools.combinations(slots, 2) if pair[0][0] != pair[1][0])
        seen.update(dict.fromkeys(map(frozenset, pairs)))
        seen.update(dict.fromkeys(frozenset([slot]) for slot in slots))
    yield from list(seen)[:MAX_HYPOTHESES]


def _layout(trial: Oracle, slots: frozenset[Slot]) -> Hypothesis | None:
    """How the outputs of two shards along `slots` recombine, or None."""
    size = trial.tensors[min(slots)[0]].shape[min(slots)[1]]
    cut = -(-size // 2)
    halves: list[list[Tensor]] = []
    for start, length in ((0, cut), (cut, size - cut)):
        inputs = list(trial.tensors)
        for i, dim in slots:
            inputs[i] = inputs[i].narrow(dim, start, length)
        try:
            halves.append([y.detach() for y in trial.run_local([x.clone() for x in inputs], ())])
        except Exception:  # see above
            return None
    outputs: list[int | str] = []
    for i, y in enumerate(trial.outputs):
        parts = [half[i] for half in halves if i < len(half)]
        kind = _kind(parts, y, size) if len(parts) == 2 else None
        if kind is None:
            return None
        outputs.append(kind)
    return Hypothesis(slots, tuple(outputs))


def _kind(parts: Sequence[Tensor], whole: Tensor, size: int) -> int | str | None:
    """The dim along which parts concatenate to the whole, or the reduction that combines them."""
    for dim in range(whole.dim()):
        others = [(*p.shape[:dim], *p.shape[dim + 1 :]) for p in parts if p.dim() == whole.dim()]
        if others != [(*whole.shape[:dim], *whole.shape[dim + 1 :])] * 2:
            continue
        if whole.shape[dim] % size == 0 and close(torch.cat(list(parts), dim), whole):
            return dim
    if all(p.shape == whole.shape for p in parts) and whole.dtype != torch.bool:
        for reduction in ("sum", "max", "min"):
            if close(reduced(parts, reduction), whole):
                return reduction
    return None


def _rule(trial: Oracle, found: Sequence[Hypothesis]) -> ShardingRule:
    """The rule of the hypotheses together; dims of no hypothesis are whole."""
    names = letters()
    factors = take(names, len(found))
    inputs = [[f"[{next(names)}]" for _ in x.shape] for x in trial.tensors]
    outputs = [[f"[{next(names)}]" for _ in y.shape] for y in trial.outputs]
    clauses: dict[str, None] = {}
    for factor, hypothesis in zip(factors, found, strict=True):
        size = 0
        for i, dim in hypothesis.slots:
            inputs[i][dim] = factor
            size = trial.tensors[i].shape[dim]
        for i, kind in enumerate(hypothesis.outputs):
            if isinstance(kind, str):
                if kind != "sum":
                    clauses[f"{kind}({factor})"] = None
            elif trial.outputs[i].shape[kind] == size:
                outputs[i][kind] = factor
            else:
                outputs[i][kind] = f"({factor}{outputs[i][kind]})"
    return parse_rule(f"{notation(inputs, outputs)}; {' '.join(clauses)}")


def _holds(trial: Oracle, found: Sequence[Hypothesis], newest: int) -> bool:
    """Whether the newest hypothesis holds, on two and three shards, and beside each older one."""
    dims = [(i, kind) for h in found for i, kind in enumerate(h.outputs) if isinstance(kind, int)]
    if len(set(dims)) < len(dims):
        return False  # two factors would share an output dim
    rule = _rule(trial, found)
    sizes = factor_sizes(rule, [tuple(x.shape) for x in (*trial.tensors, *trial.outputs)])
    factors = take(letters(), len(found))
    new = Choice(factor=factors[newest])
    cases = [(Mesh.of(x=n), {"x": new}) for n in EXTENTS]
    cases += [
        (Mesh.of(x=2, y=2), {"x": Choice(factor=f), "y": new})
        for i, f in enumerate(factors)
        if i != newest
    ]
    for mesh, chosen in cases:
        placed = place(rule, sizes, mesh, chosen)
        if placed is None:
            continue
        try:
            if trial.disagreement(placed, mesh) is not None:
                return False
        except Exception:  # see above
            return False
    return True
