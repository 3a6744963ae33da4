"""Turn an assignment into a priced step: the parts of one device in forward order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch.fx

from autopar.cost import staging
from autopar.cost.step import Part, Segment, Step
from autopar.ir.graph import Graph

from .blocks import Blocks
from .bucket_collectives import BUCKET_BYTES
from .chunks import Chunk, chunks_of, thinned
from .options import Option
from .price import Pricer
from .segment_builder import SegmentBuilder
from .stored import stored_state

Node = torch.fx.Node


def step_of(
    graph: Graph,
    blocks: Blocks,
    option: Mapping[Node, Option],
    pricer: Pricer,
    micro_batches: int = 1,
) -> Step:
    """One training step of an assignment on the device with the largest shards.

    `graph` has the sizes of one micro-batch. Copies of a block that do and cost the same are one
    segment; a first or last copy that communicates otherwise is a segment of its own. The times add
    up to the programme's (`search.predict`), the saved bytes to its memory.
    """
    chunks = chunks_of(graph, blocks)
    thin = thinned(chunks)
    segments = _joined(
        thin.chunks, thin.more, segments_of(thin.chunks, blocks, option, pricer, thin.alias)
    )
    if segments is None:  # what was left out is not like what was not
        none = [0] * len(chunks)
        segments = _joined(chunks, none, segments_of(chunks, blocks, option, pricer))
    assert segments is not None
    stored = [n for n in option if n.op == "placeholder"]
    state = stored_state(stored, option, pricer)
    if pricer.cluster.single is not None:  # ranks are processes, and share memory
        sizes = {axis.name: axis.size for axis in pricer.mesh.axes}
        state[staging.NAME] = staging.staged_bytes(segments, sizes, BUCKET_BYTES)
    optimizer_s = sum(option[n].time_s for n in stored)
    return Step(tuple(segments), optimizer_s, state, micro_batches)


def _joined(
    chunks: Sequence[Chunk], more: Sequence[int], made: Sequence[Segment]
) -> list[Segment] | None:
    """Segments with those that are alike as copies of one; `more` of a chunk were left out.

    None where copies were left out after one that is not like the one before.
    """
    segments: list[Segment] = []
    for i, segment in enumerate(made):
        repeats = chunks[i].region >= 0 and i > 0 and chunks[i - 1].region == chunks[i].region
        if repeats and alike(segments[-1], segment):
            copies = segments[-1].copies + 1 + more[i]
            segments[-1] = replace(segments[-1], copies=copies)
        elif more[i]:
            return None
        else:
            segments.append(segment)
    return segments


def segments_of(
    chunks: Sequence[Chunk],
    blocks: Blocks,
    option: Mapping[Node, Option],
    pricer: Pricer,
    alias: Mapping[Node, Node] | None = None,
) -> list[Segment]:
    """One segment per chunk; together the chunks are all ops of the graph, in order.

    But for copies of a block that are left out, in whose place others (`alias`) are read.
    """
    builder = SegmentBuilder(blocks, option, pricer, alias or {})
    made = [builder.segment(chunk, i) for i, chunk in enumerate(chunks)]
    names = [first.name for first, _, _ in blocks.regions]
    return [
        replace(
            builder.finish(i, chunk, parts), block=names[chunk.region] if chunk.region >= 0 else ""
        )
        for i, (chunk, parts) in enumerate(zip(chunks, made, strict=True))
    ]


def alike(a: Segment, b: Segment) -> bool:
    """Whether two segments do and cost the same."""
    return a.input_bytes == b.input_bytes and _anonymous(a.parts) == _anonymous(b.parts)


def _anonymous(parts: Iterable[Part]) -> list[dict[str, object]]:
    return [{**vars(p), "name": "", "module": "", "param": bool(p.param)} for p in parts]
