"""Bytes that a rank of a host holds for its peers to read."""

from __future__ import annotations

from dataclasses import replace

from autopar.cost.staging import staged_bytes
from autopar.cost.step import Part, Segment

MIB = 2.0**20
SIZES = {"dp": 4}


def wire(kind: str, whole: float) -> float:
    """What a ring of four sends."""
    return (1.5 if kind == "all_reduce" else 0.75) * whole


def reduced(name: str, nbytes: float) -> Part:
    """A parameter that is stored whole: its gradient is summed after the backward."""
    sent = wire("all_reduce", nbytes)
    return Part(
        name, "", "", 0.0, 1.0, "all_reduce", "dp", 0,
        backward_sent_bytes=sent, output_bytes=nbytes, param=name, once=True,
    )  # fmt: skip


def gathered(name: str, nbytes: float, regather: bool) -> Part:
    sent = wire("all_gather", nbytes)
    return Part(
        name, "", "all_gather", 1.0, 1.0, "reduce_scatter", "dp", 0, sent, sent, nbytes,
        param=name, once=not regather, regather=regather,
    )  # fmt: skip


def activation(nbytes: float) -> Part:
    return Part("x", "", "all_reduce", 1.0, 0.0, axis="dp", level=0,
                sent_bytes=wire("all_reduce", nbytes), output_bytes=nbytes)  # fmt: skip


def test_sums_of_gradients_all_wait_for_the_end() -> None:
    """Each leaves its gradient and a quarter of the sum."""
    layer = Segment("s", (reduced("a", 8 * MIB), reduced("b", 40 * MIB)), copies=3)
    assert staged_bytes([layer], SIZES, 25 * MIB) == 3 * 1.25 * 48 * MIB
    assert staged_bytes([layer], {"dp": 1}, 25 * MIB) == 0
    assert staged_bytes([layer], {"tp": 4}, 25 * MIB) == 0


def test_what_is_gathered_once_waits_as_gradients() -> None:
    layer = Segment("s", (gathered("a", 8 * MIB, regather=False),), copies=5)
    assert staged_bytes([layer], SIZES, 25 * MIB) == 5 * 8 * MIB


def test_two_messages_that_are_waited_for_lie_side_by_side() -> None:
    parts = tuple(activation(n * MIB) for n in (2, 8, 1, 4))
    one = Segment("s", parts)
    assert staged_bytes([one], SIZES, 25 * MIB) == 1.25 * 10 * MIB
    several = replace(one, copies=2)  # the last of a copy and the first of the next: 4 and 2
    assert staged_bytes([several], SIZES, 25 * MIB) == 1.25 * 10 * MIB
    assert staged_bytes([replace(one, parts=parts[::3], copies=2)], SIZES, 25 * MIB) == 7.5 * MIB


def test_parameters_gathered_anew_wait_with_their_gradients() -> None:
    """Of each message the shard, then the gradients; small ones travel together."""
    large = Segment("s", tuple(gathered(n, 40 * MIB, regather=True) for n in "ab"))
    assert staged_bytes([large], SIZES, 25 * MIB) == (40 + 10) * MIB
    small = Segment("s", tuple(gathered(n, 8 * MIB, regather=True) for n in "abc"))
    assert staged_bytes([small], SIZES, 25 * MIB) == (24 + 6) * MIB
