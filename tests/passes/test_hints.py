"""The search keeps hints, says what they cost, and why some cannot be kept."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.capture import capture
from autopar.errors import UserError
from autopar.hints import hints_of
from autopar.ir.hint import hint_from_json
from autopar.ir.parse import parse_sharding
from autopar.passes.blocks import find_blocks
from autopar.passes.hinted import hints_of_plan, price_text, search_hinted
from autopar.passes.hints import hints_in, with_hints, without_hints
from autopar.passes.specialise import specialise
from autopar.plan import HintPrice, Plan
from tests.hinted_model import LAYERS, Model, batch, in_forward, plain
from tests.simulate import (
    Subject,
    assert_equivalent,
    cpu,
    decisions_of,
    plan_of,
    simulate,
    single_device,
)


def planned(subject: Subject, ranks: int, *said: dict[str, Any], **options: Any) -> Plan:
    made = subject.capture
    hints = [hint_from_json(item) for item in said]
    return search_hinted(made.graph, made.fingerprint, made.symbols, cpu(ranks), hints, **options)


def splits(plan: Plan, name: str) -> list[tuple[str, ...]]:
    return [split.axes for split in parse_sharding(plan.params[name].sharding).splits]


def test_a_hint_in_eager_mode_is_the_identity() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = autopar.hint(x * 2, split=1)
    y.sum().backward()
    assert torch.equal(y, x * 2) and torch.equal(x.grad, torch.full((3, 4), 2.0))
    weight = nn.Parameter(torch.ones(2, 2))
    assert autopar.hint(weight, split=0) is weight
    with pytest.raises(UserError, match="takes a tensor or a parameter, not a int"):
        autopar.hint(3, split=0)  # type: ignore[type-var]


def test_hints_of_parameters_are_found_by_name_once() -> None:
    model = Model()
    for _ in range(2):
        autopar.hint(model.head.weight, split={0: "tp"}, gather=False)
    autopar.hint(model.head.weight, whole=1)
    (first, second) = hints_of(model)
    assert str(first) == 'head.weight split={"0": "tp"} gather=false'
    assert str(second) == "head.weight whole=1"


def test_a_hint_in_forward_is_captured_folded_and_not_and_with_any_sequence() -> None:
    model = Model(layers=6, said={"split": 1})
    made = capture(model, batch(), {})
    folded = capture(model, batch(), {}, fold=True, dynamic_sequence=True)
    assert any(note.startswith("layers were copied") for note in folded.notes)
    assert made.fingerprint == folded.fingerprint
    assert made.fingerprint != capture(Model(layers=6), batch(), {}).fingerprint
    (hint,) = hints_in(made.graph)
    assert re.fullmatch(r"blocks\.# at hinted_model\.py:\d+ split=1", str(hint))


def test_a_wrong_hint_in_forward_is_the_users_error() -> None:
    with pytest.raises(UserError, match="dim 0 is both split and whole"):
        capture(Model(said={"split": 0, "whole": 0}), batch(), {})


def test_hints_are_kept_and_priced() -> None:
    said = {"param": "blocks.*.up.weight", "split": 1}
    plan = planned(plain(), 2, said)
    best = plan_of(plain(), 2)
    for i in range(LAYERS):
        assert splits(plan, f"blocks.{i}.up.weight")[1]
    (price,) = plan.hinted
    assert price.hint == said
    assert price.time_s == best.predicted.time_s
    assert price.memory_bytes == best.predicted.memory_bytes
    assert [h.to_json() for h in hints_of_plan(plan)] == [said]


def test_several_hints_are_priced_one_by_one_and_together() -> None:
    first = {"param": "tokens.weight", "sharded": True}
    second = {"param": "head.weight", "replicated": True}
    plan = planned(plain(), 2, first, second)
    assert [price.hint for price in plan.hinted] == [first, second, {}]
    assert not any(splits(plan, "head.weight")) and any(splits(plan, "tokens.weight"))
    without_first = planned(plain(), 2, second)
    assert plan.hinted[0].time_s == without_first.predicted.time_s
    assert plan.hinted[2].time_s == plan_of(plain(), 2).predicted.time_s


def test_a_named_axis_is_in_the_mesh_and_splits_the_dim() -> None:
    plan = planned(plain(), 2, {"param": "head.weight", "split": {"0": "tp"}, "gather": False})
    assert plan.mesh.names == ("tp",) and splits(plan, "head.weight")[0] == ("tp",)
    head = next(reversed([name for name in plan.choices if name.startswith("linear")]))
    assert plan.choices[head]["tp"] not in (
        "-",
        "",
    )  # the product is split, not the weight gathered


def test_one_layer_can_be_hinted_alone() -> None:
    hint = hint_from_json({"param": "blocks.1.up.weight", "replicated": True})
    plan = planned(plain(), 2, {"param": "blocks.*.up.weight", "split": 0}, strategy="tensor")
    assert splits(plan, "blocks.1.up.weight")[0]
    graph = specialise(with_hints(plain().graph, [hint]), plain().capture.symbols)
    stands_for = find_blocks(graph).representative
    params = {n.meta["fqns"][0]: n for n in graph.placeholders("param")}
    assert stands_for[params["blocks.1.up.weight"]] is params["blocks.1.up.weight"]
    assert stands_for[params["blocks.3.up.weight"]] is params["blocks.2.up.weight"]


def test_a_hinted_activation_runs_as_one_device() -> None:
    subject = in_forward()
    plan = planned(subject, 2, {"op": "gelu", "whole": [0]})
    for name, choice in plan.choices.items():
        if name.startswith("hint"):
            assert list(choice.values()) == ["b"]  # of ab->ab..., dim 1
    assert sum(name.startswith("hint") for name in plan.choices) == LAYERS
    args = batch(3)
    got = simulate(subject, args, {}, lambda out: out, decisions_of(subject, plan))
    assert_equivalent(got, single_device(subject.module, args, {}, lambda out: out))


def test_without_hints_nothing_is_restricted() -> None:
    graph = with_hints(in_forward().graph, [hint_from_json({"op": "gelu", "split": 2})])
    assert len(hints_in(graph)) == 2
    assert hints_in(without_hints(graph)) == []
    (left,) = hints_in(without_hints(graph, hints_in(graph)[:1]))
    assert left == hints_in(graph)[1]


@pytest.mark.parametrize(
    ("said", "messages"),
    [
        (
            [{"param": "head.wieght", "split": 0}],
            ["a parameter that the model does", "head.weight"],
        ),
        ([{"op": "geluu", "split": 0}], ["an op that the model does not have", "nearest: gelu"]),
        ([{"param": "head.bias", "split": 1}], ["names dim 1, and head.bias is f64[32]", "0 to 0"]),
        ([{"param": "head.bias", "split": {"0": "pp"}}], ["the mesh axis 'pp'", "dp, cp, tp, ep"]),
        (
            [{"param": "head.*", "split": 0}, {"param": "head.bias", "replicated": True}],
            ["contradict each other: both are for head.bias"],
        ),
        (
            [{"op": "layer_norm*", "split": -1}],
            ["layer_norm* split=2 cannot be kept: of layer_norm, f64[8, 8, 16], dims 0, 1 can be"],
        ),
        (
            [{"param": "head.weight", "split": {"0": "cp"}}, {"op": "gelu", "split": {"2": "ep"}}],
            ["no plan for 3 devices keeps the hints together: ", "leave one out"],
        ),
    ],
)
def test_hints_that_cannot_be_kept(said: list[dict[str, Any]], messages: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        planned(plain(), 3, *said)
    for message in messages:
        assert message in str(caught.value)


def test_a_named_strategy_that_breaks_a_hint_is_refused() -> None:
    with pytest.raises(UserError, match="no assignment keeps the hints"):
        planned(plain(), 2, {"param": "head.weight", "split": 0}, strategy="data")


def test_the_price_as_text() -> None:
    plan = planned(plain(), 2, {"param": "head.bias", "replicated": True})
    took, needs = plan.predicted.time_s, plan.predicted.memory_bytes
    hint = {"param": "head.bias", "replicated": True}
    assert price_text(plan, HintPrice(hint, took, needs)).endswith("replicated=true costs nothing")
    dear = price_text(plan, HintPrice(hint, took / 1.25, needs + 2**20))
    assert "costs +25.0 % (" in dear and dear.endswith("memory -1 MiB")
    assert "no plan without them" in price_text(plan, HintPrice({}))
