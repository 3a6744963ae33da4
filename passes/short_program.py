"""One rank's program of a plan with a few copies of every repeated block, where it is counted.

Copies that the plan treats alike make the same program. So what is counted in one of them counts
for all that are left out, if it is what its neighbours have, too: else the whole model is lowered.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import sympy
import torch.fx

from autopar.ir.graph import Graph
from autopar.plan import Plan, Recompute

from .blocks import Blocks, find_blocks
from .chunks import Chunk, Thinned, chunks_of, thinned
from .rank_program import rank_program
from .shorten_blocks import FIRST, LAST, are_wired_alike, without_copies

Node = torch.fx.Node
T = TypeVar("T")
Copy = tuple[int, int]  # run of alike copies, number of the one among those that stay


@dataclass(frozen=True)
class ShortProgram:
    """A lowered program without the copies that are like others.

    `copy_of` are the ops and parameters (names) of the copies that stay, `others` what those of the
    one that stands for others stand for, copy by copy. Both are empty where nothing is left out.
    """

    program: Graph
    copy_of: Mapping[str, Copy] = field(default_factory=dict)
    others: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def is_periodic(self, found: Iterable[tuple[Hashable, Iterable[str]]]) -> bool:
        """Whether every copy in the middle has the same of what was found, none shared.

        `found` are things that can be told apart, each with the names that it stands at.
        """
        counts: dict[int, list[Counter[Hashable]]] = defaultdict(
            lambda: [Counter() for _ in range(FIRST + LAST)]
        )
        for what, names in found:
            at = {self.copy_of.get(name) for name in names}
            if len(at) > 1:
                return False
            (copy,) = at or {None}
            if copy is not None:
                counts[copy[0]][copy[1]][what] += 1
        return all(c[1] == c[FIRST - 1] == c[FIRST] for c in counts.values())

    def all_of(
        self, found: Sequence[T], name_of: Callable[[T], str], named: Callable[[T, str], T]
    ) -> list[T]:
        """What was found in the whole model, in its order; each stands at one name."""
        made: list[T] = []
        waiting: list[T] = []

        def repeat() -> None:
            if waiting:
                for names in zip(*(self.others[name_of(one)] for one in waiting), strict=True):
                    made.extend(named(one, n) for one, n in zip(waiting, names, strict=True))
                waiting.clear()

        for one in found:
            name = name_of(one)
            if waiting and self.copy_of.get(name) != self.copy_of.get(name_of(waiting[0])):
                repeat()
            made.append(one)
            if name in self.others:
                waiting.append(one)
        repeat()
        return made


def short_program(
    graph: Graph, sizes: Mapping[sympy.Symbol, int], plan: Plan, rank: int
) -> ShortProgram:
    """The program of `rank` without most of the copies that the plan treats alike.

    `graph` is the prepared captured graph, `sizes` are those of one micro-batch.
    """
    blocks = find_blocks(graph)
    chunks = _runs(graph, blocks, plan)
    thin = thinned(chunks, FIRST, LAST)
    if not thin.alias or not are_wired_alike(chunks_of(graph, blocks)):
        return ShortProgram(rank_program(graph, sizes, plan, rank, check=False))
    short = without_copies(graph, thin)
    recompute = _recompute(plan.recompute, blocks, thin)
    there = {(first.name, copies) for first, _, copies in find_blocks(short).regions}
    if any((one.block, one.copies) not in there for one in recompute):
        return ShortProgram(rank_program(graph, sizes, plan, rank, check=False))
    less = replace(plan, recompute=recompute)
    program = rank_program(short, sizes, less, rank, check=False)
    return ShortProgram(program, *_standing(chunks, thin))


def _runs(graph: Graph, blocks: Blocks, plan: Plan) -> list[Chunk]:
    """Chunks whose regions are runs of copies of one block that the plan treats alike."""
    modes = {one.block: one for one in plan.recompute}
    names = [first.name for first, _, _ in blocks.regions]
    made: list[Chunk] = []
    run, last, copy = -1, None, 0
    before = -1
    for chunk in chunks_of(graph, blocks):
        if chunk.region < 0:
            made.append(chunk)
            before = -1
            continue
        copy = copy + 1 if chunk.region == before else 0
        treated = (_mode(modes.get(names[chunk.region]), copy), _treated(chunk, plan))
        if chunk.region != before or treated != last:
            run += 1
        before, last = chunk.region, treated
        made.append(Chunk(run, chunk.nodes))
    return made


def _mode(recompute: Recompute | None, copy: int) -> int:
    if recompute is None:
        return 0
    return (copy < recompute.full) + (copy < recompute.full + recompute.selective)


def _treated(chunk: Chunk, plan: Plan) -> tuple[object, ...]:
    """What a plan says of the ops of a copy, and of the parameters that they read."""
    found: list[object] = []
    for node in chunk.nodes:
        found.append(plan.choices.get(node.name))
        for source in node.all_input_nodes:
            if source.op == "placeholder" and source.meta.get("role") == "param":
                stored = next(
                    (plan.params[f] for f in source.meta["fqns"] if f in plan.params), None
                )
                found.append(stored and (stored.sharding, stored.regather, stored.type))
    return tuple(found)


def _recompute(
    recompute: Sequence[Recompute], blocks: Blocks, thin: Thinned
) -> tuple[Recompute, ...]:
    """The same of the copies that stay."""
    kept = {chunk.nodes[0] for chunk in thin.chunks}
    found = []
    for one in recompute:
        for first, ops, copies in blocks.regions:
            if (first.name, copies) == (one.block, one.copies):
                stay = _kept_copies(first, ops, copies, blocks, kept)
                full = sum(copy < one.full for copy in stay)
                both = sum(copy < one.full + one.selective for copy in stay)
                found.append(Recompute(one.block, len(stay), full, both - full))
    return tuple(found)


def _kept_copies(first: Node, ops: int, copies: int, blocks: Blocks, kept: set[Node]) -> list[int]:
    """Which copies of a block stay, by number."""
    calls = [node for node in blocks.representative if node.op == "call_function"]
    start = calls.index(first)
    return [copy for copy in range(copies) if calls[start + copy * ops] in kept]


def _standing(
    chunks: Sequence[Chunk], thin: Thinned
) -> tuple[Mapping[str, Copy], Mapping[str, Sequence[str]]]:
    """Where what stays is, and for what it stands."""
    copy_of: dict[str, Copy] = {}
    others: dict[str, list[str]] = {}
    kept = {chunk.nodes[0] for chunk in thin.chunks}
    number: Counter[int] = Counter()
    model: Chunk | None = None
    for chunk in chunks:
        if chunk.region < 0:
            continue
        if chunk.nodes[0] not in kept:
            assert model is not None
            for mine, theirs in zip(_names(model), _names(chunk), strict=True):
                others.setdefault(mine, []).append(theirs)
            continue
        for name in _names(chunk):
            copy_of[name] = (chunk.region, number[chunk.region])
        number[chunk.region] += 1
        model = chunk
    thinned_runs = {copy_of[name][0] for name in others}
    return {name: at for name, at in copy_of.items() if at[0] in thinned_runs}, others


def _names(chunk: Chunk) -> list[str]:
    """The ops of a copy, and the parameters that it alone reads, in one order for all copies."""
    found = dict.fromkeys(node.name for node in chunk.nodes)
    inside = set(chunk.nodes)
    for node in chunk.nodes:
        for source in node.all_input_nodes:
            if source.op == "placeholder" and inside.issuperset(source.users):
                found.setdefault(source.name)
    return list(found)
