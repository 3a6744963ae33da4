"""Which kernels a plan has, by cluster and by what a user asks for."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest

from autopar.capture import Capture
from autopar.cost.cluster import parse_cluster
from autopar.errors import UserError
from autopar.ir.graph import Graph
from autopar.kernel_use import KernelUse, Places, places_of
from autopar.passes.choose_kernels import choose_kernels
from autopar.passes.edits import illegal_edits
from autopar.passes.prepare import prepare
from autopar.plan import Plan, plan_from_json
from autopar.planning import capture_training, make_plan
from tests.zoo import ZOO


@cache
def planned(cluster: str, strategy: str, model: str = "gpt") -> tuple[Graph, Capture, Plan]:
    entry = ZOO[model]
    args, kwargs = entry.inputs(0)
    where = parse_cluster(cluster)
    plan = make_plan(entry.build(), args, kwargs, where, strategy=strategy, kernels="off")
    captured = capture_training(entry.build(), args, kwargs)
    return prepare(captured.graph), captured, summed_at_once(plan)


def summed_at_once(plan: Plan) -> Plan:
    """The plan in which no op adds to a partial sum: of two that take as long, either is found."""
    choices = {
        node: {axis: c for axis, c in of.items() if not c.startswith("linear")}
        for node, of in plan.choices.items()
    }
    return replace(plan, choices={node: of for node, of in choices.items() if of})


def chosen(cluster: str, mode: str, strategy: str = "data", **more: object) -> dict[str, KernelUse]:
    graph, captured, plan = planned(cluster, strategy)
    found = choose_kernels(graph, captured.symbols, plan, parse_cluster(cluster), mode, **more)  # type: ignore[arg-type]
    return {f"{use.kernel} {use.fusion}".strip(): use for use in found}


def test_on_gpus_what_is_faster_and_on_cpus_nothing() -> None:
    found = chosen("2xH100", "auto")
    assert set(found) == {"dropout", "dropout x | add(a0, x)", "cross_entropy"}
    for use in found.values():
        assert use.time_s < use.unfused_s
        assert use.saved_bytes > 0
    assert found["dropout x | add(a0, x)"].where == tuple(f"dropout_{i}" for i in range(1, 5))
    assert found["dropout x | add(a0, x)"].count == 4
    assert not chosen("cpu:2", "auto")
    assert not chosen("2xH100", "off")


@pytest.mark.parametrize("cluster", ["2xV100", "2xV100-P3"])
def test_gpus_on_which_every_kernel_falls_back_have_none_unless_all_are_asked_for(
    cluster: str,
) -> None:
    graph, captured, plan = planned("2xH100", "data")
    where = parse_cluster(cluster)
    assert not choose_kernels(graph, captured.symbols, plan, where, "auto")
    assert choose_kernels(graph, captured.symbols, plan, where, "all")


def test_a_place_has_a_kernel_for_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small message that gains does not take along a large one that loses."""
    graph, captured, plan = planned("2xH100", "tensor", "llama")
    taken = iter([(1.0, 3.0), (2.0, 1.0), (1.0, 3.0)])
    monkeypatch.setattr(
        "autopar.passes.choose_kernels.all_reduce_norm_times", lambda *_: next(taken)
    )
    found = choose_kernels(graph, captured.symbols, plan, parse_cluster("2xH100"))
    (use,) = (use for use in found if use.kernel == "all_reduce_norm")
    assert (use.where, use.count) == (("rms_norm", "rms_norm_2"), 2)


def test_amd_has_no_all_reduce_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, captured, plan = planned("2xH100", "tensor", "llama")
    monkeypatch.setattr(
        "autopar.passes.choose_kernels.all_reduce_norm_times", lambda *_: (1.0, 3.0)
    )
    for cluster, wanted in (("2xH100", True), ("2xMI300X", False)):
        found = choose_kernels(graph, captured.symbols, plan, parse_cluster(cluster))
        assert any(use.kernel == "all_reduce_norm" for use in found) == wanted


def test_all_of_them_whatever_they_take() -> None:
    names = {use.kernel for use in chosen("cpu:2", "all").values()}
    assert names == {"dropout", "cross_entropy", "pack", "adamw"}
    assert chosen("2xH100", "all")["adamw"].where == ("optimizer",)
    assert "adamw" not in chosen("2xH100", "all", optimizer="sgd")


def test_int8_where_the_user_has_gradients_travel_so_and_nowhere_else() -> None:
    assert "int8" not in chosen("2xH100", "all")
    for mode in ("auto", "off"):
        found = chosen("2xH100", mode, compressed=("dp",))["int8"]
        assert (found.where, found.count) == (("dp",), 1)
        assert found.unfused_s > 0


def test_a_norm_after_a_sum_over_ranks_is_one_op_unless_the_ranks_are_far_apart() -> None:
    for cluster, wanted in (("2xH100", ("rms_norm", "rms_norm_1", "rms_norm_2")), ("2x1xH100", ())):
        graph, captured, plan = planned(cluster, "tensor", "llama")
        where = parse_cluster(cluster)
        found = choose_kernels(graph, captured.symbols, plan, where, "all")
        places = [use.where for use in found if use.kernel == "all_reduce_norm"]
        assert places == ([wanted] if wanted else [])
        assert not any(
            use.kernel == "all_reduce_norm"
            for use in choose_kernels(graph, captured.symbols, plan, where)
        )


def test_a_pipeline_has_them_in_every_micro_batch() -> None:
    found = chosen("2xH100", "auto", "pipeline")
    _, _, plan = planned("2xH100", "pipeline")
    assert found["dropout"].count == plan.micro_batches > 1


def test_uses_go_through_json_and_are_checked() -> None:
    graph, captured, plan = planned("2xH100", "data")
    uses = tuple(chosen("2xH100", "all").values())
    plan = replace(plan, kernels=uses)
    assert plan_from_json(plan.to_json()) == plan
    cluster = parse_cluster("2xH100")
    assert not illegal_edits(plan, graph, captured.symbols, cluster)
    wrong = replace(plan, kernels=(replace(uses[1], where=("dropuot",)),))
    (said,) = illegal_edits(wrong, graph, captured.symbols, cluster)
    assert said.startswith("kernels: dropout has no place 'dropuot'; nearest: dropout")
    for field, value, message in (
        ("kernel", "drop", 'unknown kernel "drop"'),
        ("where", "dropout", r"kernels\[0\].where is \"dropout\", not a list"),
        ("time_s", "fast", r"kernels\[0\].time_s is \"fast\", not a number"),
        ("time_s", float("nan"), r"kernels\[0\].time_s is nan, not a finite"),
        ("count", 0, r"kernels\[0\].count is 0, not a positive number"),
    ):
        text = replace(plan, kernels=(replace(uses[0], **{field: value}),)).to_json()  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            plan_from_json(text)
    raw = json.loads(plan.to_json())
    malformed: tuple[object, ...] = (None, {}, "pack", ["pack"])
    for entries in malformed:
        with pytest.raises(UserError, match=r"kernels.* is .*, not (a list|an object)"):
            plan_from_json(json.dumps({**raw, "kernels": entries}))
    del raw["kernels"]  # of a file that is older than kernels
    assert plan_from_json(json.dumps(raw)) == replace(plan, kernels=())
    text = replace(plan, kernels=(KernelUse("pack", ("xp",)),)).to_json()
    with pytest.raises(UserError, match=r"kernels\[0\].where\[0\] names the axis 'xp'"):
        plan_from_json(text)


def test_places_by_mode() -> None:
    uses = (
        KernelUse("dropout", ("a", "b")),
        KernelUse("pack", ("dp",)),
        KernelUse("int8", ("dp",)),
    )
    auto = places_of(uses, "auto")
    assert auto == Places({"dropout": frozenset("ab"), "pack": frozenset({"dp"})})
    other = places_of(uses, "auto", planned=False)  # a capture whose nodes have other names
    assert other.has("dropout", "z")
    assert not other.has("pack", "tp")
    assert not places_of(uses, "off")
    everything = places_of((), "interpret")
    assert everything.has("adamw", "optimizer")
    assert not everything.has("int8", "dp")
