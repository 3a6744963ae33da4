"""The plan of a parallel module, made on its first call: searched, or given and fitted to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .capture import Capture
from .errors import UserError
from .ir.hint import Hint
from .options import Options
from .passes.edits import illegal_edits, missing_sizes, reprice
from .passes.follow_micro_batches import batch_size, largest_count
from .passes.hinted import search_hinted
from .passes.lower_step import why_not_micro_batched
from .passes.same_model import check_model
from .passes.search import MODES, choose_for
from .plan import Plan
from .units import bytes_text

MOST_MICRO_BATCHES = 64
ROOM = 0.8  # of the limit: a plan that needs less was not driven to what it does by memory

STATISTICS = (
    "batch normalisation takes the statistics of each micro-batch, not of the batch "
    "(micro_batch_statistics=True)"
)


def searched(captured: Capture, options: Options, hints: Sequence[Hint]) -> Plan:
    """The best plan of one micro-batch, or of several where memory makes that one slower."""

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

    if options.micro_batches is not None:
        return _in(options.micro_batches, best, captured, options)
    plan: Plan | None = None
    failed: UserError | None = None
    try:
        plan = best((1,))
    except UserError as error:
        failed = error
    if plan is not None and not _binds(plan):
        return plan
    counts, why = micro_batch_counts(captured, options.micro_batch_statistics)
    if len(counts) > 1 and options.strategy == "auto":
        plan = best(counts)
    elif failed is not None:
        hint = f"{failed.what} (micro-batches, which need less, are left out: {why})"
        raise UserError(hint if why else failed.what, failed.where, failed.fix) from None
    assert plan is not None
    return noted(plan, captured, options.micro_batch_statistics, why)


def _in(
    count: int, best: Callable[[tuple[int, ...]], Plan], captured: Capture, options: Options
) -> Plan:
    """The best plan of so many micro-batches; raises UserError where they cannot be."""
    batch, statistics = batch_size(captured.symbols), options.micro_batch_statistics
    if batch is not None and batch % count:
        raise UserError(
            f"{count} micro-batches do not divide the batch of {batch}",
            fix="choose a number that divides the batch",
        )
    why = why_not_micro_batched(captured.graph, captured.symbols, statistics)
    if count > 1 and why is not None:
        raise UserError(f"{count} micro-batches are asked for: {why}", fix="leave them out")
    return noted(best((count,)), captured, statistics, None)


def _binds(plan: Plan) -> bool:
    """Whether the limit on memory may have kept a plan from being faster."""
    limit = plan.memory_limit
    return bool(plan.recompute) or (
        limit is not None and plan.predicted.memory_bytes > ROOM * limit
    )


def micro_batch_counts(captured: Capture, statistics: bool) -> tuple[tuple[int, ...], str | None]:
    """How many micro-batches a step may have, and why only one where that is so.

    They are the powers of two that divide the batch.
    """
    why = why_not_micro_batched(captured.graph, captured.symbols, statistics)
    batch = batch_size(captured.symbols)
    if why is not None or batch is None:
        return (1,), why
    powers = (2**i for i in range(MOST_MICRO_BATCHES.bit_length()))
    return tuple(k for k in powers if batch % k == 0), None


def noted(plan: Plan, captured: Capture, statistics: bool, why: str | None) -> Plan:
    """The plan with what a user should know of its micro-batches among its notes."""
    notes = list(plan.notes)
    if why is not None:
        notes.append(f"micro-batches are left out of the search: {why}")
    several = plan.micro_batches > 1 and statistics
    if several and why_not_micro_batched(captured.graph, captured.symbols) is not None:
        notes.append(STATISTICS)
    return replace(plan, notes=tuple(dict.fromkeys(notes)))


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
        made = noted(made, captured, options.micro_batch_statistics, None)
    return made
