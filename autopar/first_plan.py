"""The plan of a parallel module, made on its first call: searched, or given and fitted to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import sympy

from .capture import Capture
from .errors import UserError
from .ir.graph import Graph
from .ir.hint import Hint
from .kernel_gains import with_kernels_counted
from .kernel_options import axes_of
from .options import Options
from .passes.choose_kernels import choose_kernels
from .passes.edits import illegal_edits, missing_sizes, reprice
from .passes.follow_micro_batches import batch_size, largest_count
from .passes.hinted import search_hinted
from .passes.lower_step import why_not_micro_batched
from .passes.same_model import check_model
from .passes.search import MODES, choose_for
from .plan import Plan
from .units import bytes_text

MOST_MICRO_BATCHES = 64

STATISTICS = (
    "batch normalisation takes the statistics of each micro-batch, not of the batch "
    "(micro_batch_statistics=True)"
)


LEFT = 0.1  # of a limit that a user gives: what predictions may be off by (benchmarks.memory)


def searched(captured: Capture, options: Options, hints: Sequence[Hint]) -> Plan:
    """The best plan for training, with several micro-batches where memory or a pipeline asks so.

    It is predicted to need a tenth less than the limit, so that what is measured keeps to it.
    """
    limit = options.memory_limit
    if limit is None:
        return _searched(captured, options, hints)
    try:
        plan = _searched(captured, replace(options, memory_limit=limit * (1 - LEFT)), hints)
    except UserError as error:
        if "memory_limit" not in (error.fix or ""):  # of something else
            raise
        left = f"a tenth of {bytes_text(limit)} is left for what a prediction may be off by"
        raise UserError(f"{error.what}; {left}", error.where, error.fix) from None
    return replace(plan, memory_limit=limit)


def _searched(captured: Capture, options: Options, hints: Sequence[Hint]) -> Plan:

    def best(counts: tuple[int, ...]) -> Plan:
        assert options.cluster is not None
        return search_hinted(
            captured.graph,
            captured.fingerprint,
            captured.symbols,
            options.cluster,
            hints,
            each=False,
            strategy=options.strategy,
            memory_limit=options.memory_limit,
            optimizer=options.optimizer,
            micro_batches=counts,
            recompute=MODES,
            pipelines=options.pipelines,
        )

    counts = powers_of_two(batch_size(captured.symbols))
    if options.micro_batches is not None:
        counts = (options.micro_batches,)
    return that_runs(best, captured.graph, captured.symbols, counts, options.micro_batch_statistics)


def with_kernels(plan: Plan, captured: Capture, options: Options, given: Plan | None) -> Plan:
    """The plan with its kernels; one that the user gave keeps its own, unless asked for others.

    Compression is not the plan's to keep: it is what the options say.
    """
    assert options.cluster is not None
    keeps = given is not None and options.kernels == "auto"
    own = [use for use in plan.kernels if use.kernel != "int8"] if keeps else []
    axes = axes_of(plan, options.compress)
    arguments = (captured.graph, captured.symbols, plan, options.cluster)
    mode = "off" if keeps else options.kernels
    found = choose_kernels(*arguments, mode, axes, options.optimizer)
    return with_kernels_counted(plan, (*own, *found))


def powers_of_two(batch: int | None) -> tuple[int, ...]:
    """How many micro-batches a step may have: powers of two that divide the batch."""
    powers = (2**i for i in range(MOST_MICRO_BATCHES.bit_length()))
    return tuple(k for k in powers if k == 1 or (batch is not None and batch % k == 0))


def that_runs(
    best: Callable[[tuple[int, ...]], Plan],
    graph: Graph,
    sizes: Mapping[sympy.Symbol, int],
    counts: tuple[int, ...],
    statistics: bool = False,
) -> Plan:
    """The best plan of so many micro-batches that the model can run; its notes say what was not.

    Raises UserError as `best` does, and where the counts leave nothing: they do not divide the
    batch, or a model that cannot be run in micro-batches is asked to.
    """
    batch = batch_size(sizes)
    divide = tuple(k for k in counts if k == 1 or (batch is not None and batch % k == 0))
    if not divide:
        of = "of a size that forward fixes" if batch is None else f"of {batch}"
        raise UserError(
            f"{', '.join(map(str, counts))} micro-batches do not divide the batch {of}",
            fix="choose numbers that divide the batch",
        )
    plan = best(divide)
    if plan.micro_batches == 1:
        return plan
    why = why_not_micro_batched(graph, sizes, statistics)
    if why is None:
        return _noted(plan, graph, sizes, statistics)
    if 1 not in divide:
        raise UserError(f"several micro-batches are asked for: {why}", fix="leave them out")
    left_out = f"micro-batches are left out: {why}"
    try:
        plan = best((1,))
    except UserError as error:
        raise UserError(f"{error.what} ({left_out})", error.where, error.fix) from None
    return replace(plan, notes=(*plan.notes, left_out))


def _noted(plan: Plan, graph: Graph, sizes: Mapping[sympy.Symbol, int], statistics: bool) -> Plan:
    """The plan with what a user should know of its micro-batches among its notes."""
    several = plan.micro_batches > 1 and statistics
    if several and why_not_micro_batched(graph, sizes) is not None:
        return replace(plan, notes=tuple(dict.fromkeys((*plan.notes, STATISTICS))))
    return plan


def fitted(plan: Plan, captured: Capture, options: Options, world_size: int) -> Plan:
    """A plan that the user gave, checked against the model and priced for this batch.

    A batch that its micro-batches do not divide is run in fewer. Raises UserError where the plan is
    for another model, or asks for what cannot be.
    """
    graph, cluster = captured.graph, options.cluster
    assert cluster is not None
    check_model(plan, graph, captured.fingerprint, world_size)
    count = largest_count(plan.micro_batches, batch_size(captured.symbols))
    wanted, plan = plan.micro_batches, replace(plan, micro_batches=count)
    arguments = (graph, captured.symbols, cluster, options.optimizer)
    if missing_sizes(plan, captured.symbols) and illegal_edits(plan, *arguments):
        # A batch of one row, say, is captured with its size: its ops have other factors.
        chosen = choose_for(graph, captured.symbols, cluster, plan, options.optimizer)
        plan = replace(plan, choices=chosen, recompute=())
    made = reprice(plan, *arguments)
    notes = list(plan.notes)
    limit, needs = made.memory_limit, made.predicted.memory_bytes
    if limit is not None and needs > limit >= plan.predicted.memory_bytes:
        more = f"{bytes_text(needs)} per device, its limit is {bytes_text(limit)}"
        notes.append(f"for this batch the plan is predicted to need {more}")
    made = replace(made, notes=tuple(notes), micro_batches=wanted)
    if wanted > 1:
        made = _noted(made, graph, captured.symbols, options.micro_batch_statistics)
    return made
