"""A priced training step: what one device computes and sends, in forward order.

The planner turns a plan into a `Step` (`autopar.passes.step_of`); the timeline simulates it and the
explanations print it. A step is a list of segments: the ops before, inside and after each repeated
block. The backward runs the same parts in reverse, each with its own time and its dual collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

COMPUTE = "compute"


@dataclass(frozen=True)
class Part:
    """One op, or one collective of one edge, on one device for one micro-batch.

    `kind` is `compute` or the forward collective (`all_gather`...; "" where only the backward
    communicates), `backward_kind` the dual collective. `level` is the level of the cluster that
    the group crosses (-1: compute), `axis` its mesh axis. Times in seconds, sizes in bytes:
    `sent_bytes` and `backward_sent_bytes` are what one device puts on the wire, `output_bytes`
    what the part makes (where `kind` is "" it is the input itself), `saved_bytes` what it keeps
    from its forward until its backward.

    `deps` are indices, within the segment, of the parts whose result this one needs; -1 is the
    value that enters the segment. `param` names the stored parameter that a collective gathers
    or whose gradient it reduces; `once` says that it happens once per step and not once per
    micro-batch, `regather` that the forward collective is repeated in the backward (ZeRO-3).

    `saved_from` says which of the saved bytes are outputs of other parts, as (index, bytes); the
    rest are tensors of its own. `freed_by` is the part after whose forward nothing holds the output
    any more (its own index: the output is saved by itself or only a view; the number of parts: it
    outlives the segment), and `leaves` says that a later segment reads it. `weight_s` is the share
    of `backward_s` that makes gradients of parameters, which nothing but their reduction waits for;
    `gradient_bytes` what is stored of them, `sum_bytes` what the sum of whole ones over
    micro-batches takes beyond `output_bytes`. `moment_bytes` is what the backward takes for a
    moment. `recomputable` is false of what selective recomputation keeps: matrix products,
    convolutions, fused attention, and collectives between ops.
    """

    name: str
    module: str
    kind: str
    forward_s: float
    backward_s: float
    backward_kind: str = ""
    axis: str = ""
    level: int = -1
    sent_bytes: float = 0.0
    backward_sent_bytes: float = 0.0
    output_bytes: float = 0.0
    saved_bytes: float = 0.0
    deps: tuple[int, ...] = ()
    param: str = ""
    once: bool = False
    regather: bool = False
    recomputable: bool = True
    saved_from: tuple[tuple[int, float], ...] = ()
    freed_by: int = -1
    leaves: bool = False
    weight_s: float = 0.0
    gradient_bytes: float = 0.0
    sum_bytes: float = 0.0
    moment_bytes: float = 0.0

    @property
    def is_compute(self) -> bool:
        return self.kind == COMPUTE

    @property
    def is_view(self) -> bool:
        """Whether it is an op whose output shares the memory of an input."""
        return self.kind == COMPUTE and self.output_bytes == 0

    @property
    def shares_memory(self) -> bool:
        """Whether the output is in the memory of an input: of views, and without a forward."""
        return self.output_bytes == 0 or not self.kind


@dataclass(frozen=True)
class Segment:
    """Parts that run one after the other, `copies` times in a row (a stack of equal layers).

    `input_bytes` is what enters one copy from the one before it: what is kept of a copy that is
    recomputed as a whole. `recompute` is "none", "selective" or "full". `block` is the name of the
    first node of the repeated block that the copies belong to, "" between blocks.
    """

    name: str
    parts: tuple[Part, ...]
    copies: int = 1
    input_bytes: float = 0.0
    recompute: str = "none"
    block: str = ""


GIVEN = "inputs and module buffers"  # of `Step.state_bytes`: on every device whole, at any stage


@dataclass(frozen=True)
class Step:
    """A training step of one device: `micro_batches` times the segments, then the optimizer.

    `state_bytes` maps a name (`parameters`, `gradients`, `optimizer state`, `GIVEN`) to what is
    stored between steps, `optimizer_s` is the time of the update.
    """

    segments: tuple[Segment, ...]
    optimizer_s: float
    state_bytes: dict[str, float]
    micro_batches: int = 1

    def parts(self) -> Iterator[tuple[Segment, Part]]:
        """Every part with its segment, each copy of a segment once."""
        for segment in self.segments:
            for part in segment.parts:
                yield segment, part
