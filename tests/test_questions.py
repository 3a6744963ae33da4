"""Questions about a plan of a model whose batch and sequence are symbols."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autopar.capture import capture
from autopar.cost.cluster import parse_cluster
from autopar.errors import UserError
from autopar.passes.prepare import prepare
from autopar.questions import Question, find_ops, find_params, op_names, place_of
from autopar.win_where import crossover_report
from tests.simulate import module_of
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def question() -> Question:
    entry = ZOO["gpt"]
    args, kwargs = entry.inputs(0, torch.float64)
    captured = capture(module_of(entry), args, kwargs, dynamic_sequence=True)
    empty = Question(
        None,  # type: ignore[arg-type]
        prepare(captured.graph),
        captured.symbols,
        captured.guards,
        parse_cluster("cpu:4"),
        "adamw",
        None,
        captured.notes,
    )
    from autopar.passes.search import search

    plan = search(
        empty.graph, captured.fingerprint, captured.symbols, empty.cluster, strategy="data"
    )
    return replace(empty, plan=plan)


def test_one_capture_serves_other_sizes(question: Question) -> None:
    sizes = {symbol.name: n for symbol, n in question.hints.items()}
    longer = question.with_sizes(s=2 * sizes["s"], b=2 * sizes["b"])
    here, there = question.case(), longer.case()
    assert there.time_s > here.time_s and there.memory_bytes > here.memory_bytes
    seconds, memory, legal = here.evaluate(there.settings())
    assert seconds[0] == pytest.approx(there.time_s, rel=1e-9)
    assert memory[0] == pytest.approx(there.memory_bytes, rel=1e-9)
    assert legal.all()


def test_a_size_that_the_model_refuses(question: Question) -> None:
    with pytest.raises(UserError, match="does not allow sequence length 1: it needs"):
        question.with_sizes(s=1)
    fixed = replace(question, hints={}, notes=("the sequence is static: forward fixes it to 8",))
    with pytest.raises(UserError, match="fixed sequence length: forward fixes it to 8"):
        fixed.with_sizes(s=16)


@pytest.mark.parametrize("variable", ["sequence", "batch"])
def test_whoever_wins_is_the_fastest_there(question: Question, variable: str) -> None:
    tensor = question.best("tensor")
    found = crossover_report(question, variable, {"tensor": tensor})
    assert set(found["plans"]) == {"the plan (dp=4)", "tensor"}
    for span in found["spans"]:
        value = int(span["low"])
        try:
            there = question.with_sizes(**{variable[0]: value})
        except UserError:
            continue
        times = {"the plan (dp=4)": there.case().time_s, "tensor": there.case(tensor).time_s}
        if span["winner"] is not None and value >= 4:
            assert times[span["winner"]] == pytest.approx(min(times.values()))
            assert span["low_s"] == pytest.approx(times[span["winner"]])


def test_names(question: Question) -> None:
    case = question.case()
    op = find_ops(case, "embedding")[0]
    assert "embedding" in op_names(op)
    assert place_of(case, op)
    params = find_params(case, "*.weight")
    assert len(params) < len(case.concrete.placeholders("param"))
    with pytest.raises(UserError, match=r"no parameter called 'wte\.wait'") as error:
        find_params(case, "wte.wait")
    assert error.value.fix is not None and "wte.weight" in error.value.fix
