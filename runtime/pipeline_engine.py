"""Runs the pieces of this rank over the micro-batches of a step, as the plan's schedule has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)

from autopar.errors import UserError

from .pipeline_stage import PieceStage
from .step_parts import BodyPart


def schedule_for(kind: str, stages: int, chunks: int, micro_batches: int) -> str:
    """The schedule that runs so many micro-batches: the kind itself where it can.

    1F1B and zero bubble have one micro-batch per stage at least, and interleaved rounds are of the
    same size; where that does not hold, all forwards come first ("gpipe").
    """
    if kind == "gpipe" or micro_batches < stages:
        return "gpipe"
    rounds = max(1, micro_batches // stages)
    if kind in ("interleaved", "zero_bubble") and micro_batches % rounds:
        return "1f1b" if chunks == 1 else "gpipe"
    return kind


class PipelineEngine:
    """An `Engine` whose rank holds `chunks` pieces, every `stages`-th of the chain.

    `group` holds the ranks of one line through the stages in order. `kind` is a name of
    `cost.schedules.KINDS`. `splits` says that zero bubble leaves gradients of weights for later,
    which pieces that are compiled or run again in the backward cannot.
    """

    def __init__(
        self,
        kind: str,
        chunks: int,
        group: dist.ProcessGroup,
        device: torch.device,
        splits: bool = True,
    ) -> None:
        self.kind, self.chunks, self.group, self.device = kind, chunks, group, device
        self.splits = splits
        self.stages, self.stage = dist.get_world_size(group), dist.get_rank(group)
        if self.stages < 2:
            raise UserError(
                "a pipeline of one stage", fix="use a plan without a pipeline on one device"
            )
        self._made: dict[tuple[int, bool], tuple[list[PieceStage], Any]] = {}

    def train(self, parts: Sequence[BodyPart], micro_batches: int) -> None:
        """Forward and backward of all micro-batches."""
        with torch.enable_grad():
            self._step(parts, micro_batches, training=True)

    def evaluate(self, parts: Sequence[BodyPart], micro_batches: int) -> None:
        """Forward of all micro-batches, without gradients."""
        with torch.no_grad():
            self._step(parts, micro_batches, training=False)

    def _step(self, parts: Sequence[BodyPart], micro_batches: int, training: bool) -> None:
        key = micro_batches, training
        if key not in self._made:
            self._made[key] = self._make(micro_batches, training)
        stages, schedule = self._made[key]
        for stage, part in zip(stages, parts, strict=True):
            stage.part = part
        # The schedules hand every loss its target: there is none beside what parts know.
        target = torch.zeros(micro_batches) if training and stages[-1].is_last else None
        try:
            schedule.step(target=target, return_outputs=False)
            for stage in stages:
                stage.finish_sends()
        except BaseException:
            del self._made[key]  # what the schedule has half done is not to be met again
            raise
        finally:
            for stage in stages:
                stage.part = None
                stage.clear_runtime_states()

    def _make(self, micro_batches: int, training: bool) -> tuple[list[PieceStage], Any]:
        kind = "gpipe"
        if training:
            kind = schedule_for(self.kind, self.stages, self.chunks, micro_batches)
        pieces = self.stages * self.chunks
        alone = self.chunks == 1 and kind in ("gpipe", "1f1b")
        splits = self.splits and kind == "zero_bubble"
        stages = [
            PieceStage(i, pieces, self.device, self.group, splits, beside=not alone)
            for i in range(self.stage, pieces, self.stages)
        ]
        loss = _objective if training else None
        if alone:
            single = ScheduleGPipe if kind == "gpipe" else Schedule1F1B
            return stages, single(stages[0], micro_batches, loss, scale_grads=False)
        several = {
            "gpipe": ScheduleLoopedBFS,
            "interleaved": ScheduleInterleaved1F1B,
            "zero_bubble": ScheduleInterleavedZeroBubble,
        }[kind]
        made: Any = several(stages, micro_batches, loss, scale_grads=False)
        return stages, made


def _objective(output: Tensor, target: Tensor) -> Tensor:
    """What the last piece returns is the loss already."""
    del target
    return output
