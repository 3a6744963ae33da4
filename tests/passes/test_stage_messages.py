"""Memory of messages and of collectives in the pieces of a chain, against counting it by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autopar.cost.schedules import Schedule
from autopar.cost.staging import staged_bytes
from autopar.cost.step import Part, Segment
from autopar.passes.bucket_collectives import BUCKET_BYTES
from autopar.passes.pipelined import Wanted
from autopar.passes.prepare import prepare
from autopar.passes.search import search
from autopar.passes.stage_messages import Crosser, Messages, Staging, packed_bytes
from autopar.planning import capture_training
from tests.simulate import cpu

MODES = ("none", "selective", "full")


@st.composite
def chains(draw: st.DrawFn) -> tuple[Messages, list[Segment]]:
    """Units, and values that each are made by one, read up to another and kept by one or none."""
    n = draw(st.integers(2, 6))
    segments = [Segment(f"u{i}", (), recompute=draw(st.sampled_from(MODES))) for i in range(n)]
    crossing: list[list[Crosser]] = [[] for _ in range(n)]
    for _ in range(draw(st.integers(0, 5))):
        made = draw(st.integers(0, n - 2))
        read = draw(st.integers(made + 1, n - 1))
        kept = draw(st.sampled_from([-1, *range(made, read + 1)]))
        nbytes, dtype = draw(st.integers(1, 9)), draw(st.sampled_from([torch.float32, torch.int64]))
        value = Crosser(nbytes, dtype == torch.float32, dtype, made, kept)
        for cut in range(made + 1, read + 1):
            crossing[cut].append(value)
    return Messages(tuple(map(tuple, crossing))), segments


@given(chains())
def test_a_piece_holds_what_came_in_and_what_goes_out_once(
    made: tuple[Messages, list[Segment]],
) -> None:
    """Each tensor once: not again what an op keeps, or what only passes through."""
    messages, segments = made
    n = len(segments)
    found = messages.kept(Schedule(2), segments)
    for start in range(n):
        for end in range(start + 1, n + 1):
            came = messages.cuts[start] if start else ()
            goes = messages.cuts[end] if end < n else ()
            expected = 0.0
            for value in {id(v): v for v in (*came, *goes)}.values():
                keeper = value.kept_by
                counted = start <= keeper < end and segments[keeper].recompute == "none"
                if value in came and segments[start].recompute != "none":
                    counted = True  # kept for running the unit again
                expected += 0.0 if counted else value.nbytes
            assert found[start, end] == expected, (start, end)
    assert not np.tril(found).any()


@given(chains())
def test_gradients_arrive_at_the_end_and_leave_at_the_start(
    made: tuple[Messages, list[Segment]],
) -> None:
    messages, segments = made
    n = len(segments)
    floats = [sum(c.nbytes for c in cut if c.has_gradient) for cut in (*messages.cuts, ())]
    packed = [packed_bytes(cut) for cut in (*messages.cuts, ())]
    found = messages.moment(Schedule(2))
    for start in range(n):
        for end in range(start + 1, n + 1):
            assert found[start, end] == floats[start] + floats[end] + packed[end]
    beside = messages.moment(Schedule(2, 1, "zero_bubble"))
    assert (beside + packed_of(packed) >= found).all()


def packed_of(packed: list[float]) -> np.ndarray:  # type: ignore[type-arg]
    return np.triu(np.broadcast_to(np.array(packed)[None, :], (len(packed), len(packed))), 1)


def reduced(name: str, nbytes: float, once: bool) -> Part:
    return Part(
        name,
        "",
        "",
        0.0,
        0.0,
        backward_kind="all_reduce",
        axis="dp",
        backward_sent_bytes=nbytes,
        param=name,
        once=once,
        output_bytes=nbytes,
    )


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=6))
def test_no_piece_stages_less_than_predicted_by_more_than_a_neighbour(
    sizes: list[tuple[int, bool]],
) -> None:
    """What waits at once is exact; of what waits one by one a piece counts its largest pair."""
    staging = Staging({"dp": 2, "tp": 1})
    segments = [
        Segment(f"u{i}", (reduced(f"p{i}", 2.0**20 * n, once),))
        for i, (n, once) in enumerate(sizes)
    ]
    found = staging.spans(segments)
    largest = max([staging.of([s]) for s in segments if not s.parts[0].once], default=0.0)
    for start in range(len(segments)):
        for end in range(start + 1, len(segments) + 1):
            exact = staged_bytes(segments[start:end], staging.sizes, BUCKET_BYTES)
            assert found[start, end] <= exact
            assert exact - found[start, end] <= largest
            if all(once for _, once in sizes[start:end]):
                assert found[start, end] == pytest.approx(exact)


def test_ranks_that_share_no_memory_stage_nothing() -> None:
    staging = Staging({})
    segments = [Segment("u", (reduced("p", 8.0, True),))]
    assert staging.of(segments) == 0.0
    assert not staging.spans(segments).any()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return F.mse_loss(x, y)


def test_a_plan_counts_what_peers_of_a_stage_have_yet_to_read() -> None:
    """The gradients of a stage's parameters, all at once: sent, and this rank's half of the sum."""
    x = torch.zeros(64, 64)
    made = capture_training(Net(), (x, x), {}, fold=True)
    plan = search(
        prepare(made.graph),
        made.fingerprint,
        made.symbols,
        cpu(4),
        strategy="pipeline+data",
        pipelines=Wanted(stages=(2,), schedules=("1f1b",), micro_batches=(4,)),
        recompute=("none",),
    )
    parts = plan.predicted.memory_parts
    assert parts["communication buffers"] == 1.5 * parts["gradients"] > 0
    assert sum(parts.values()) == plan.predicted.memory_bytes
