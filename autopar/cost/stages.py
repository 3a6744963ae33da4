"""Cut a priced step into pipeline stages: contiguous runs of layers with about equal times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from autopar.errors import UserError

from .recompute import recompute_s
from .step import GIVEN, Segment, Step


@dataclass(frozen=True)
class Layer:
    """The smallest piece that a stage can have: a copy of a block, with what surrounds it."""

    segments: tuple[Segment, ...]

    @property
    def time_s(self) -> float:
        """Seconds per micro-batch, recomputation and blocking communication included."""
        return sum(segment_s(s) for s in self.segments)


def segment_s(segment: Segment) -> float:
    """Seconds per micro-batch of all copies, without collectives of parameters."""
    once = sum(p.forward_s + p.backward_s for p in segment.parts if not p.param)
    return segment.copies * (once + recompute_s(segment))


def layers_of(step: Step) -> list[Layer]:
    """The chain of layers: what is before the first block goes with it, all else with the last."""
    layers: list[Layer] = []
    before: list[Segment] = []
    for segment in step.segments:
        if segment.block:
            for _ in range(segment.copies):
                layers.append(Layer((*before, replace(segment, copies=1))))
                before = []
        elif layers:
            layers[-1] = Layer((*layers[-1].segments, segment))
        else:
            before.append(segment)
    return layers or [Layer(tuple(before))]


def stages_of(
    step: Step, stages: int, chunks: int = 1, layers_per_stage: Sequence[int] | None = None
) -> list[Step]:
    """The pieces of a step along its chain: number `c * stages + s` is chunk `c` of stage `s`.

    By default the slowest piece is as fast as can be, and the others are even; `layers_per_stage`
    says how many layers (copies of repeated blocks) each piece has. Stored bytes and the optimizer
    go with the gradients that a piece makes. Raises UserError where there are too few layers.
    """
    count, layers = stages * chunks, layers_of(step)
    if count > len(layers):
        raise UserError(
            f"{stages} stages of {chunks} chunks need {count} layers, the model has {len(layers)}",
            fix=f"use at most {len(layers)} pieces",
        )
    if layers_per_stage is None:
        sizes = balanced([layer.time_s for layer in layers], count)
    else:
        sizes = list(layers_per_stage)
        if len(sizes) != count or sum(sizes) != len(layers) or min(sizes) < 1:
            raise UserError(
                f"the layers per stage {sizes} do not cut {len(layers)} layers into {count} pieces",
                fix=f"give {count} positive numbers that add up to {len(layers)}",
            )
    pieces, at = [], 0
    for size in sizes:
        pieces.append(_piece(step, layers[at : at + size]))
        at += size
    return pieces


def balanced(times: Sequence[float], pieces: int) -> list[int]:
    """Sizes of contiguous runs with the least maximum; of those, the most even (least squares)."""
    n = len(times)
    total = np.concatenate([[0.0], np.cumsum(times)])
    spans = total[None, :] - total[:, None]  # [i, j]: from i to j
    slowest = spans[0].copy()
    for _ in range(pieces - 1):
        slowest = np.array(
            [np.inf, *(np.maximum(slowest[:j], spans[:j, j]).min() for j in range(1, n + 1))]
        )
    limit = slowest[n] * (1 + 1e-9)
    cost = np.where((spans > limit) | (np.tri(n + 1) > 0), np.inf, spans**2)
    best, cuts = cost[0].copy(), []
    for _ in range(pieces - 1):
        through = best[:, None] + cost
        cuts.append(through.argmin(axis=0))
        best = through.min(axis=0)
    ends = [n]
    for cut in reversed(cuts):
        ends.append(int(cut[ends[-1]]))
    ends = [*ends, 0][::-1]
    return [b - a for a, b in pairwise(ends)]


def _piece(step: Step, layers: Sequence[Layer]) -> Step:
    """A stage of a few layers; neighbours that are alike are one segment again."""
    segments: list[Segment] = []
    for segment in (s for layer in layers for s in layer.segments):
        same = segments and segments[-1].block and replace(segments[-1], copies=1) == segment
        if same:
            segments[-1] = replace(segments[-1], copies=segments[-1].copies + 1)
        else:
            segments.append(segment)
    whole = sum(s.copies * p.gradient_bytes for s, p in step.parts())
    mine = sum(s.copies * p.gradient_bytes for s in segments for p in s.parts)
    share = mine / whole if whole else len(layers) / len(layers_of(step))
    return Step(
        tuple(segments),
        step.optimizer_s * share,
        {n: b if n == GIVEN else b * share for n, b in step.state_bytes.items()},
        step.micro_batches,
    )
