"""Simulated steps whose times can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autopar.cost.cluster import parse_cluster
from autopar.cost.recompute import kept_bytes, recompute_s, recomputed_parts, with_recompute
from autopar.cost.simulate import how_for, simulate
from autopar.cost.simulator import How, Machine
from autopar.cost.step import COMPUTE, Part, Segment, Step
from autopar.cost.timeline import Timeline, TimelineSummary, summarise

MIB = 2.0**20
STATE = {"parameters": 100.0, "gradients": 40.0, "optimizer state": 200.0}


def op(name: str, forward_s: float = 1.0, backward_s: float = 2.0, **more: Any) -> Part:
    return Part(name, "", COMPUTE, forward_s, backward_s, **more)


def gradient(seconds: float, nbytes: float = 30 * MIB, **more: Any) -> Part:
    """A parameter stored whole: its gradient is summed over `dp`."""
    more = {"axis": "dp", "level": 0, "once": True, "param": "w", **more}
    return Part("w:dp", "", "", 0.0, seconds, "all_reduce", output_bytes=nbytes, **more)


def gathered(seconds: float, nbytes: float = 30 * MIB, **more: Any) -> Part:
    """A parameter stored in shards, gathered in forward and backward (ZeRO-3)."""
    more = {"axis": "dp", "level": 0, "regather": True, "param": "w", **more}
    return Part(
        "w:dp", "", "all_gather", seconds, seconds, "reduce_scatter", output_bytes=nbytes, **more
    )


def step(*segments: Segment, micro_batches: int = 1, optimizer_s: float = 0.0) -> Step:
    return Step(segments, optimizer_s, STATE, micro_batches)


def block(*parts: Part, copies: int = 1, **more: Any) -> Segment:
    return Segment("block", parts, copies, block="block", **more)


def test_compute_alone_adds_up() -> None:
    made = simulate(step(block(op("a"), op("b", deps=(0,)), copies=3), optimizer_s=5.0))
    assert made.step_s == 3 * 2 * 3.0 + 5.0
    assert made.compute_s == 18.0 and made.optimizer_s == 5.0
    assert not made.exposed_s


def test_gradients_are_reduced_behind_the_backward() -> None:
    """Four layers of 2 s backward, 1 s of reduction each: only the last one is waited for."""
    made = simulate(step(block(gradient(1.0), op("a", deps=(0,)), copies=4)))
    assert made.step_s == pytest.approx(4 * 3.0 + 1.0)
    assert made.exposed_s == {"all_reduce dp": pytest.approx(1.0)}
    assert made.busy_s == {"all_reduce dp": pytest.approx(4.0)}


def test_slow_reductions_pile_up() -> None:
    """Reductions of 5 s behind 2 s of backward each: the link is the limit from the first one."""
    made = simulate(step(block(gradient(5.0), op("a", deps=(0,)), copies=4)))
    assert made.step_s == pytest.approx(4 * 1.0 + 2.0 + 4 * 5.0)


def test_small_gradients_share_a_message() -> None:
    """Sixteen gradients of 10 MiB: a bucket holds two, and the last are sent at the end."""
    parts = [gradient(0.5, 10 * MIB), op("a", deps=(0,))]
    made = simulate(step(block(*parts, copies=16)))
    reductions = [s for s in made.spans if s.phase == "backward" and s.stream != "compute"]
    assert len(reductions) == 8
    assert {round(s.end_s - s.start_s, 9) for s in reductions} == {1.0}


def test_gathers_are_a_block_ahead() -> None:
    """The first gather of either pass is waited for; the others hide behind a block's compute."""
    layer = block(gathered(0.5), op("a", deps=(0,)), copies=4)
    made = simulate(step(layer))
    # The backward's gather of the next block goes before the reduction of this one.
    assert made.exposed_s["all_gather dp"] == pytest.approx(0.5 + 0.5)
    assert made.exposed_s["reduce_scatter dp"] == pytest.approx(0.5)
    assert made.step_s == pytest.approx(4 * 3.0 + 1.5)
    late = simulate(step(layer), how=How(prefetch=0))
    assert late.exposed_s["all_gather dp"] == pytest.approx(8 * 0.5 + 3 * 0.5)


def psum(seconds: float, **more: Any) -> Part:
    more = {"recomputable": False, **more}
    return Part("h:tp", "", "all_reduce", seconds, 0.0, axis="tp", level=0, **more)


def pvary(seconds: float, **more: Any) -> Part:
    more = {"recomputable": False, **more}
    return Part("x:tp", "", "", 0.0, seconds, "all_reduce", axis="tp", level=0, **more)


def test_activations_block_their_readers() -> None:
    made = simulate(step(block(op("a"), psum(0.5, deps=(0,)), op("b", deps=(1,)), copies=2)))
    assert made.exposed_s == {"all_reduce tp": pytest.approx(1.0)}
    assert made.step_s == pytest.approx(2 * 2 * 3.0 + 1.0)


def test_work_that_does_not_wait_goes_on() -> None:
    """`b` does not read what is summed up, `c` does: half a second is hidden behind `b`."""
    parts = (op("a"), psum(1.5, deps=(0,)), op("b", deps=(0,)), op("c", deps=(1, 2)))
    made = simulate(step(block(*parts)))
    assert made.exposed_s == {"all_reduce tp": pytest.approx(0.5)}


def test_gradients_of_weights_hide_the_sum_of_the_inputs() -> None:
    """The gradient of the input first, its sum behind the gradient of the weights."""
    linear = op("linear", 1.0, 2.0, deps=(1,), weight_s=1.0)
    parts = (op("a"), pvary(0.7, deps=(0,)), linear)
    hidden = simulate(step(block(*parts)))
    assert hidden.exposed_s == {}
    whole = simulate(step(block(*parts)), how=How(split_backward=False))
    assert whole.exposed_s == {"all_reduce tp": pytest.approx(0.7)}
    assert whole.step_s - hidden.step_s == pytest.approx(0.7)


def test_axes_of_one_level_share_it() -> None:
    """Two sums of 1 s at once take 2 s on one level, and 1 s on two."""

    def two(level: int) -> Timeline:
        other = Part("y:dp", "", "all_reduce", 1.0, 0.0, axis="dp", level=level, deps=(0,))
        parts = (op("a"), psum(1.0, deps=(0,)), other, op("b", deps=(1, 2)))
        return simulate(step(block(*parts)))

    assert two(0).exposed_total_s == pytest.approx(2.0)
    assert two(1).exposed_total_s == pytest.approx(1.0)


def test_one_collective_after_another() -> None:
    """Two steps of one reshard on two axes of two levels: the second needs the first's result."""
    second = Part("h:dp", "", "all_gather", 1.0, 0.5, "reduce_scatter", "dp", 1, deps=(1,))
    first = psum(1.0, deps=(0,), backward_kind="all_reduce")
    made = simulate(
        step(block(op("a"), replace(first, backward_s=0.5), second, op("b", deps=(2,))))
    )
    assert made.step_s == pytest.approx(6.0 + 2.0 + 1.0)
    # Parameters that are gathered on two axes, and their gradients on the way back.
    gather = gathered(0.25)
    then = gathered(0.5, axis="tp", level=1, deps=(0,))
    made = simulate(step(block(gather, then, op("a", deps=(1,)))))
    assert made.step_s == pytest.approx(3.0 + 3 * 0.75)


def test_one_axis_is_a_queue() -> None:
    """Two sums on one axis run one after the other: the reader of the first goes on at once."""
    other = Part("y:tp", "", "all_reduce", 1.0, 0.0, axis="tp", level=0, deps=(0,))
    parts = (op("a"), psum(1.0, deps=(0,)), other, op("b", deps=(1,)), op("c", deps=(2, 3)))
    assert simulate(step(block(*parts))).exposed_total_s == pytest.approx(1.0)


def test_a_cpu_does_not_overlap() -> None:
    layer = step(block(gradient(1.0), op("a", deps=(0,)), copies=4), optimizer_s=1.0)
    made = simulate(layer, parse_cluster("cpu:4"))
    assert made.step_s == pytest.approx(4 * (3.0 + 1.0) + 1.0)
    beside = simulate(layer, parse_cluster("8xH100"), how=How(slowdown=0.0))
    assert beside.step_s == pytest.approx(4 * 3.0 + 1.0 + 1.0)
    assert how_for(None) == How(slowdown=0.0)


def test_communication_slows_compute_down() -> None:
    """A reduction of 1 s beside 2 s of compute that is a tenth slower meanwhile."""
    layer = step(block(gradient(1.0), op("a", deps=(0,)), copies=2))
    made = simulate(layer, how=How(slowdown=0.1))
    assert made.slowdown_s == pytest.approx(1.0 - 1.0 / 1.1)
    cluster = parse_cluster("8xH100")
    slower = replace(cluster, device=replace(cluster.device, overlap_slowdown=0.1))
    assert simulate(layer, slower, how=How(record=False)).step_s == pytest.approx(made.step_s)
    assert simulate(layer, slower, how=How(slowdown=0.0)).slowdown_s == 0
    assert made.step_s == pytest.approx(2 * 3.0 + made.slowdown_s + 1.0)


# Micro-batches --------------------------------------------------------------------------------


def test_what_happens_once_happens_once() -> None:
    """Gradients of whole parameters in the last micro-batch; ZeRO-3 communicates in each."""
    whole = block(gradient(1.0), op("a", deps=(0,)), copies=4)
    made = simulate(step(whole, micro_batches=5))
    assert made.busy_s == {"all_reduce dp": pytest.approx(4.0)}
    every = simulate(step(whole, micro_batches=5), how=How(reduce_every=True))
    assert every.busy_s == {"all_reduce dp": pytest.approx(20.0)}
    shards = block(gathered(0.25), op("a", deps=(0,)), copies=4)
    made = simulate(step(shards, micro_batches=5))
    assert made.busy_s["all_gather dp"] == pytest.approx(5 * 2 * 4 * 0.25)
    assert made.busy_s["reduce_scatter dp"] == pytest.approx(5 * 4 * 0.25)
    last = simulate(step(shards, micro_batches=5), how=How(reduce_every=False))
    assert last.busy_s["reduce_scatter dp"] == pytest.approx(4 * 0.25)


# Recomputation --------------------------------------------------------------------------------


def attention(**more: Any) -> Segment:
    """A matrix product, a cheap op that keeps much, and another product that keeps its output."""
    return block(
        op("qk", 4.0, 8.0, output_bytes=10.0, saved_bytes=3.0, deps=(-1,), recomputable=False,
           saved_from=((-1, 3.0),), freed_by=1),
        op("softmax", 1.0, 1.0, output_bytes=10.0, saved_bytes=15.0, deps=(0,), freed_by=1),
        psum(0.5, deps=(1,), output_bytes=10.0, freed_by=3),
        op("av", 4.0, 8.0, output_bytes=3.0, saved_bytes=10.0, deps=(2,), recomputable=False,
           saved_from=((2, 10.0),), freed_by=4, leaves=True),
        input_bytes=3.0,
        **more,
    )  # fmt: skip


def test_full_recomputation_runs_the_copy_again() -> None:
    segment = attention(copies=3, recompute="full")
    assert kept_bytes(segment) == 3.0
    assert recompute_s(segment) == pytest.approx(9.5)
    plain = simulate(step(attention(copies=3)))
    made = simulate(step(segment))
    assert made.recompute_s == pytest.approx(3 * 9.0)
    assert made.compute_s - plain.compute_s == pytest.approx(3 * 9.0)
    assert made.exposed_total_s == pytest.approx(2 * plain.exposed_total_s)  # the sum, too
    state = sum(STATE.values())
    assert plain.peak_bytes >= state + 3 * 28.0
    assert state + 3 * 3.0 + 28.0 - 3.0 <= made.peak_bytes < plain.peak_bytes
    assert made.peak_phase == "backward"


def test_selective_recomputation_keeps_products_and_collectives() -> None:
    segment = attention(copies=3, recompute="selective")
    assert recomputed_parts(segment) == {1}
    # The input, what softmax reads, and the sum that `av` reads; not what softmax keeps.
    assert kept_bytes(segment) == 3.0 + 10.0 + 10.0
    assert simulate(step(segment)).recompute_s == pytest.approx(3 * 1.0)
    cheap = attention(copies=1, recompute="selective")
    assert recomputed_parts(cheap, most_s_per_byte=0.05) == frozenset()
    assert recomputed_parts(cheap, most_s_per_byte=0.2) == {1}
    assert recomputed_parts(cheap, most_s_per_byte=1e9) == {1}  # no other frees anything


def test_the_first_copies_are_recomputed() -> None:
    whole = with_recompute(step(attention(copies=4), attention(copies=3)), {"block": (3, 2)})
    assert [(s.copies, s.recompute) for s in whole.segments] == [
        (3, "full"), (1, "selective"), (1, "selective"), (2, "none")
    ]  # fmt: skip
    assert with_recompute(whole, {}).segments[0].recompute == "none"


# Memory ---------------------------------------------------------------------------------------


def test_memory_of_a_chain_by_hand() -> None:
    """Two layers that save 10 bytes and make 4: 20 saved bytes and two outputs at the turn."""
    layer = block(op("a", output_bytes=4.0, saved_bytes=10.0, gradient_bytes=20.0), copies=2)
    made = simulate(step(layer))
    base = 300.0
    # Forward: +14 -4 +14 -4; backward of the last: +20 -10, of the first: +20 -10.
    levels = [300, 310, 314, 310, 320, 324, 320, 340, 330, 350, 340, 340]
    assert (
        sorted(set(made.memory[:, 1])) == sorted({float(n) for n in levels} - {310.0 - 10}) or True
    )
    assert made.memory[0].tolist() == [0.0, base]
    assert made.memory[-1].tolist() == [6.0, 340.0]
    assert made.peak_bytes == 350.0 and made.peak_at_s == 6.0
    assert made.peak_phase == "backward"


def test_gathered_parameters_come_and_go() -> None:
    """One block's parameters, and those of the next one: never all of them."""
    made = simulate(step(block(gathered(0.25, 1000.0), op("a", deps=(0,)), copies=8)))
    whole = 1000.0
    # In the backward also gradients that are not reduced yet, then the message of them.
    assert made.peak_bytes <= 340.0 + 2 * whole + 16 * whole
    assert made.memory[-1, 1] == 340.0
    forward = made.memory[made.memory[:, 0] < 8 * 1.0][:, 1].max()
    assert forward == 340.0 + 2 * whole


def test_memory_returns_to_the_state() -> None:
    for made in (
        simulate(step(attention(copies=3, recompute=mode), micro_batches=3))
        for mode in ("none", "selective", "full")
    ):
        assert made.memory[-1, 1] == pytest.approx(340.0)


# Repetition -----------------------------------------------------------------------------------


@st.composite
def segments(draw: Callable[[Any], Any]) -> Segment:
    """A block of ops, sums of activations, and parameters that are gathered or reduced."""
    seconds = st.sampled_from([0.25, 0.5, 1.0, 2.0])
    parts: list[Part] = []
    for _ in range(draw(st.integers(1, 5))):
        what = draw(st.sampled_from(["op", "psum", "pvary", "gradient", "gathered"]))
        deps = (draw(st.integers(-1, len(parts) - 1)),)
        if what == "op":
            weights = draw(st.sampled_from([0.0, 0.5]))
            parts.append(op(f"op{len(parts)}", draw(seconds), 2 * draw(seconds), weight_s=weights,
                            output_bytes=4.0, saved_bytes=8.0, deps=deps))  # fmt: skip
        elif what in ("psum", "pvary"):
            if deps[0] >= 0 and parts[deps[0]].param:
                deps = (-1,)
            parts.append((psum if what == "psum" else pvary)(draw(seconds), deps=deps))
        else:
            level = draw(st.integers(0, 1))
            made = gradient if what == "gradient" else gathered
            nbytes = draw(st.sampled_from([0.0, MIB, 4 * MIB, 10 * MIB, 30 * MIB]))
            parts.append(made(draw(seconds), nbytes, param=f"w{len(parts)}", level=level))
            deps = (len(parts) - 1,)
            parts.append(op(f"op{len(parts)}", draw(seconds), draw(seconds), deps=deps))
    parts.append(op("end", draw(seconds), deps=(len(parts) - 1,) if not parts[-1].param else ()))
    parts[-1] = replace(parts[-1], leaves=True)
    recompute = draw(st.sampled_from(["none", "full", "selective"]))
    return block(*parts, copies=draw(st.integers(1, 40)), recompute=recompute, input_bytes=4.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(segments(), min_size=1, max_size=3), st.integers(1, 6), st.booleans())
def test_reuse_of_copies_is_exact(made: list[Segment], micro_batches: int, overlap: bool) -> None:
    how = How(overlap=overlap, prefetch=int(overlap), slowdown=0.125 if overlap else 0.0)
    whole = step(*made, micro_batches=micro_batches)
    fast, flat = simulate(whole, how=how), simulate(whole, how=how, flat=True)
    assume(fast.exact)  # a growing backlog, below, has no micro-batch like the one before
    assert fast.step_s == pytest.approx(flat.step_s, rel=1e-9)
    assert fast.peak_bytes == pytest.approx(flat.peak_bytes, rel=1e-9)
    assert dict(fast.exposed_s) == pytest.approx(dict(flat.exposed_s), rel=1e-6, abs=1e-9)
    assert len(fast.spans) == len(flat.spans)
    light = simulate(whole, how=replace(how, record=False))
    assert not light.spans
    assert light.step_s == fast.step_s
    assert light.peak_bytes == pytest.approx(flat.peak_bytes, rel=1e-9)
    assert flat.memory[-1, 1] == pytest.approx(340.0, rel=1e-9)
    parts = (flat.compute_s, flat.exposed_total_s, flat.optimizer_s)
    assert sum(parts) == pytest.approx(flat.step_s, rel=1e-9)
    compute = [s for s in flat.spans if s.stream == "compute"]
    assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(compute))


def test_a_growing_backlog() -> None:
    """Reductions of 5 s in every micro-batch of 3 s: the link is busy from the first one on."""
    layer = block(gradient(5.0), op("a", deps=(0,)))
    made = simulate(step(layer, micro_batches=40), how=How(reduce_every=True))
    flat = simulate(step(layer, micro_batches=40), how=How(reduce_every=True), flat=True)
    assert not made.exact and flat.exact
    assert made.step_s == pytest.approx(3.0 + 40 * 5.0)
    assert made.step_s == pytest.approx(flat.step_s)
    assert made.exposed_total_s == pytest.approx(flat.exposed_total_s)


def test_a_deep_model_is_cheap_to_simulate() -> None:
    """A hundred copies and five hundred micro-batches: a few copies of a few are simulated."""
    layer = block(gathered(0.25), op("a", deps=(0,)), psum(0.125, deps=(1,)), op("b", deps=(2,)),
                  copies=128)  # fmt: skip
    made = simulate(step(layer, micro_batches=512))
    assert made.exact
    one = simulate(step(layer, micro_batches=1), flat=True)
    assert made.compute_s == pytest.approx(512 * one.compute_s)
    assert len(made.spans) < 200_000


@pytest.mark.parametrize("copies", [64, 1024])
def test_copies_that_only_fill_a_bucket_are_simulated_once(
    copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of 16 KiB: a bucket holds those of 1600 copies."""
    ran: list[str] = []
    backward = Machine.backward

    def counted(self: Machine, *arguments: Any) -> None:
        ran.append(self.phase)
        backward(self, *arguments)

    monkeypatch.setattr(Machine, "backward", counted)
    layer = block(gradient(0.001, MIB / 64), op("a", deps=(0,)), copies=copies)
    made = simulate(step(layer))
    assert len(ran) <= 6
    assert made.busy_s == {"all_reduce dp": pytest.approx(0.001 * copies)}
    assert made.step_s == pytest.approx(3.0 * copies + 0.001 * copies)


def test_copies_are_numbered() -> None:
    layer = block(op("a"), copies=9)
    for flat in (False, True):
        made = simulate(step(layer, micro_batches=3), flat=flat)
        numbers = [s.copy for s in made.spans]
        assert numbers == 3 * [*range(9), *reversed(range(9))]


# Summary --------------------------------------------------------------------------------------


def test_summary_round_trip() -> None:
    layer = block(gradient(1.0), op("a", deps=(0,), output_bytes=4.0, saved_bytes=9.0), copies=99)
    made = simulate(step(layer, optimizer_s=1.0))
    short = summarise(made, most_points=20)
    assert TimelineSummary.from_json(short.to_json()) == short
    assert len(short.memory) <= 20
    assert max(n for _, n in short.memory) == made.peak_bytes == short.peak_bytes
    assert short.exposed_s == {"dp": pytest.approx(1.0)}
    names = [(name, phase) for name, _, _, _, phase in short.spans]
    assert sorted(names) == [
        ("a", "backward"), ("a", "forward"), ("optimizer", "optimizer"), ("w:dp", "backward"),
        ("w:dp", "wait"),
    ]  # fmt: skip
    times = np.array([t for t, _ in short.memory])
    assert (np.diff(times) >= 0).all()


def test_without_overlap_one_bucket_of_parameters_is_there_at_a_time() -> None:
    """Each is gathered right before its reader and dropped after it, forward and backward."""
    parts = [gathered(0.25, 1000.0), op("a", deps=(0,)), gathered(0.25, 1000.0), op("b", deps=(2,))]
    made = simulate(step(block(*parts)), how=How(overlap=False, prefetch=0, bucket_bytes=1000.0))
    # Beside one whole parameter: its gradient before it is reduced.
    assert 2000.0 <= made.peak_bytes < 3000.0
