"""Edits of a plan: the illegal ones are named, the legal ones priced as the search would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from autopar.errors import UserError
from autopar.ir.mesh import Axis, Mesh
from autopar.passes.edits import broken_hints, check_edits, illegal_edits, reprice
from autopar.passes.hints import with_hints
from autopar.plan import Plan, Recompute, Storage
from tests.hinted_model import LAYERS, in_forward, plain
from tests.simulate import cpu, plan_of

SUBJECT, RANKS = plain, 2


@cache
def plan() -> Plan:
    return plan_of(plain(), RANKS, "tensor")


def sizes(batch: int = 8) -> dict[object, int]:
    return dict.fromkeys(plain().capture.symbols, batch)


def problems(edited: Plan) -> list[str]:
    return illegal_edits(edited, plain().graph, plain().capture.symbols, cpu(RANKS))


def choosing(**chosen: str) -> Plan:
    return replace(plan(), choices={**plan().choices, **{n: {"tp": c} for n, c in chosen.items()}})


def storing(name: str, sharding: str) -> Plan:
    return replace(plan(), params={**plan().params, name: Storage(sharding)})


def without(name: str) -> Plan:
    return replace(plan(), params={n: s for n, s in plan().params.items() if n != name})


def test_a_plan_of_the_search_is_legal_and_has_its_price() -> None:
    assert problems(plan()) == []
    again = reprice(plan(), plain().graph, plain().capture.symbols, cpu(RANKS))
    assert again == plan()


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            lambda: choosing(linear_99="b"),
            "choices: the model has no op 'linear_99'; nearest: linear",
        ),
        (lambda: choosing(gelu="z"), "tp is 'z'; allowed by abc->abc: -, a, b, c"),
        (lambda: choosing(gelu="linear0"), "tp is 'linear0'; allowed by abc->abc: -, a, b, c"),
        (
            lambda: storing("head.wait", "[-]"),
            "params: the model has no parameter 'head.wait'; nearest",
        ),
        (
            lambda: storing("head.weight", "[tp]"),
            "params: head.weight, f64[32, 16], as [tp]: it has 2",
        ),
        (lambda: storing("head.weight", "[tp, tp]"), "tp is used twice"),
        (lambda: storing("head.weight", "[-, -] +tp"), "not partial or varying"),
        (lambda: storing("head.weight", "[tp*4, -]"), "only even, contiguous pieces"),
        (lambda: without("head.weight"), "params: head.weight is missing"),
        (
            lambda: replace(plan(), recompute=(Recompute("gelu", 3, 1),)),
            f"recompute: no block of 3 copies begins at 'gelu'; the model's are layer_norm ({LAYERS}",
        ),
        (
            lambda: replace(plan(), micro_batches=3),
            "micro_batches is 3, which does not divide the batch 8",
        ),
    ],
)
def test_an_illegal_edit_is_named(edit: Callable[[], Plan], expected: str) -> None:
    (found,) = problems(edit())
    assert expected in found


def test_all_illegal_edits_are_named_at_once() -> None:
    edited = replace(choosing(gelu="z", gelu_1="y"), params=without("head.bias").params)
    with pytest.raises(UserError) as caught:
        check_edits(edited, plain().graph, plain().capture.symbols, cpu(RANKS))
    lines = caught.value.what.splitlines()
    assert len(lines) == 4 and lines[1] == "  - params: head.bias is missing"
    assert lines[2].startswith("  - choices: gelu (hinted_model.py:")


def test_legal_edits_are_priced() -> None:
    edited = storing("head.weight", "[-, -]")
    new = reprice(edited, plain().graph, plain().capture.symbols, cpu(RANKS))
    assert new.params["head.weight"].local_bytes == 32 * 16 * 8
    assert new.predicted.memory_bytes != plan().predicted.memory_bytes
    assert new.timeline is not None and new.timeline.step_s == new.predicted.time_s


def test_one_layer_may_do_otherwise() -> None:
    chosen = {n: c for n, c in plan().choices.items() if n != "gelu"}
    new = reprice(
        replace(plan(), choices=chosen), plain().graph, plain().capture.symbols, cpu(RANKS)
    )
    assert new.predicted.compute_s > plan().predicted.compute_s
    lines = [a for a in new.activations if a.op == "gelu"]
    assert sorted(a.count for a in lines) == [1, LAYERS - 1]


def test_another_batch_has_another_price() -> None:
    new = reprice(plan(), plain().graph, sizes(16), cpu(RANKS))  # type: ignore[arg-type]
    assert new.hints == {"b": 16} and new.choices == plan().choices
    assert new.predicted.compute_s > plan().predicted.compute_s
    back = reprice(new, plain().graph, sizes(8), cpu(RANKS))  # type: ignore[arg-type]
    assert back.predicted == plan().predicted


def test_a_mesh_of_another_size_is_refused_and_levels_are_of_the_cluster() -> None:
    graph, symbols = plain().graph, plain().capture.symbols
    with pytest.raises(UserError, match="is of 2 devices, and cpu:4 has 4"):
        reprice(plan(), graph, symbols, cpu(4))
    stale = replace(plan(), mesh=Mesh((Axis("tp", 2, 7),)))
    assert reprice(stale, graph, symbols, cpu(RANKS)).mesh == plan().mesh


def test_hints_that_an_edit_breaks_are_listed() -> None:
    subject = in_forward()
    made = plan_of(subject, RANKS)
    graph, symbols = with_hints(subject.graph, []), subject.capture.symbols
    assert broken_hints(made, graph, symbols, cpu(RANKS)) == []
    chosen = {n: c for n, c in made.choices.items() if n != "hint"}
    (broken,) = broken_hints(replace(made, choices=chosen), graph, symbols, cpu(RANKS))
    assert broken.endswith("split=1")
