"""What a user asks of pipelines, on the command line and in `parallelize`."""

from __future__ import annotations

from collections.abc import Sequence

from .cost.schedules import KINDS
from .errors import UserError
from .passes.families import PIPELINED
from .passes.pipelined import Wanted


def pipelines_asked(
    strategy: str,
    stages: int | None = None,
    schedule: str | None = None,
    micro_batches: Sequence[int] | None = None,
    statistics: bool = False,
) -> Wanted | None:
    """The pipelines that may be tried; None with a named strategy that has none.

    `statistics` says whether batch normalisation may take those of a micro-batch. Raises UserError
    for an unknown schedule, too few stages, and for either with a strategy without stages.
    """
    if strategy != "auto" and strategy not in PIPELINED:
        asked = "stages" if stages is not None else "a schedule" if schedule is not None else ""
        if asked:
            raise UserError(
                f"the strategy {strategy!r} has no pipeline, and {asked} are asked for"
                if asked == "stages"
                else f"the strategy {strategy!r} has no pipeline, and {asked} is asked for",
                fix=f"use 'auto' or one of {', '.join(map(repr, PIPELINED))}",
            )
        return None
    return Wanted(
        stages=None if stages is None else (stages,),
        schedules=KINDS if schedule is None else (schedule,),
        micro_batches=None if micro_batches is None else tuple(micro_batches),
        statistics=statistics,
    )
