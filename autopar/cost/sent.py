"""What one device sends in a priced step."""

from __future__ import annotations

from .recompute import recomputed_parts
from .step import Step


def sent_bytes(step: Step) -> dict[str, float]:
    """Bytes per step and collective: every micro-batch, what is regathered or recomputed twice."""
    found: dict[str, float] = {}

    def add(kind: str, nbytes: float) -> None:
        if kind and nbytes:
            found[kind] = found.get(kind, 0.0) + nbytes

    for segment in step.segments:
        again = recomputed_parts(segment)
        for i, part in enumerate(segment.parts):
            if part.is_compute:
                continue
            times = segment.copies * (1 if part.once else step.micro_batches)
            forwards = 2 if part.regather or i in again else 1
            add(part.kind, times * forwards * part.sent_bytes)
            add(part.backward_kind, times * part.backward_sent_bytes)
    return found
