"""What kernels change of a plan's predicted step: nothing is counted twice, the parts add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from autopar.cli_what_if import answer
from autopar.cost.cluster import parse_cluster
from autopar.cost.kernels import dropout_forms, int8_change, int8_times, pack_forms, step_change
from autopar.kernel_gains import with_kernels_counted, without_kernels
from autopar.kernel_use import KernelUse
from autopar.passes.choose_kernels import _counted_share, choose_kernels
from autopar.passes.edits import reprice
from autopar.passes.prepare import prepare
from autopar.plan import Plan, plan_from_json
from autopar.planning import capture_training, make_plan
from autopar.questions import Question
from autopar.report import make_console, print_plan
from tests.zoo import ZOO


def parts_s(plan: Plan) -> float:
    p = plan.predicted
    return p.compute_s + p.comm_s + p.optimizer_s + p.kernels_s


def planned(cluster: str, kernels: str) -> Plan:
    entry = ZOO["gpt"]
    args, kwargs = entry.inputs(0)
    where = parse_cluster(cluster)
    return make_plan(entry.build(), args, kwargs, where, strategy="data", kernels=kernels)


def test_the_step_is_what_it_was_and_the_kernels() -> None:
    off, auto = planned("2xH100", "off"), planned("2xH100", "auto")
    change = sum(use.step_s for use in auto.kernels)
    assert change < 0 and auto.predicted.kernels_s == change and off.predicted.kernels_s == 0
    assert auto.predicted.time_s == pytest.approx(off.predicted.time_s + change)
    assert auto.predicted.time_s == pytest.approx(parts_s(auto))
    # Less than between the forms: a step does not have the twenty launches of a mask in torch.
    for use in auto.kernels:
        assert use.time_s - use.unfused_s < use.step_s <= 0
    assert plan_from_json(auto.to_json()) == auto
    assert with_kernels_counted(auto, auto.kernels) == auto
    assert with_kernels_counted(auto, ()).predicted.time_s == pytest.approx(off.predicted.time_s)
    assert without_kernels(off.predicted, auto.kernels) == off.predicted


def test_the_report_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    auto = planned("2xH100", "auto")
    print_plan(auto, make_console())
    assert " + kernels -" in capsys.readouterr().out
    print_plan(planned("2xH100", "off"), make_console())
    assert "kernels" not in capsys.readouterr().out


def test_a_cpu_counts_nothing_whatever_is_asked_for() -> None:
    off, asked = planned("cpu:2", "off"), planned("cpu:2", "all")
    assert asked.kernels and asked.predicted == off.predicted


def test_an_op_that_the_step_prices_as_the_kernel_changes_nothing() -> None:
    device = parse_cluster("2xH100").device
    assert step_change(device, "pack", pack_forms([8.0] * 9, 4, True)) == 0
    alone, after = (
        step_change(device, "dropout", dropout_forms(1 << 20, 4, 3, None, n)) for n in (None, 1)
    )
    assert after < alone < 0


def test_int8_gains_the_exposed_share_alone() -> None:
    cluster, message = parse_cluster("2x8xH100"), (float(1 << 26), 4, False)
    span = (1, 2)
    hidden, half, all_ = (int8_change(cluster, span, *message, e) for e in (0.0, 0.5, 1.0))
    with_it, without = int8_times(cluster, span, *message)
    assert hidden > 0 > all_ == pytest.approx(with_it - without)
    assert half == pytest.approx((hidden + all_) / 2)


def test_compressed_sums_change_what_is_sent_and_the_wait() -> None:
    cluster = parse_cluster("2x1xH100")
    model, inputs = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))), torch.ones(8, 1024)
    made = make_plan(model, (inputs,), {}, cluster, strategy="data")
    captured = capture_training(model, (inputs,), {})
    graph = prepare(captured.graph)
    found = choose_kernels(graph, captured.symbols, made, cluster, "off", ("dp",))
    counted = with_kernels_counted(made, found)
    (use,) = found
    assert use.step_s < 0, "with few samples sums of gradients are waited for"
    assert -use.step_s <= made.predicted.comm_s
    before, after = made.predicted.comm_bytes, counted.predicted.comm_bytes
    assert after["all_to_all"] == use.sent_bytes["all_to_all"] > 0
    assert sum(after.values()) < 0.3 * sum(before.values())
    again = reprice(counted, graph, captured.symbols, cluster)
    assert again.predicted.kernels_s == 0
    assert with_kernels_counted(again, found).predicted.time_s == pytest.approx(
        counted.predicted.time_s
    )
    assert with_kernels_counted(counted, ()).predicted.comm_bytes == before
    hidden = replace(made, timeline=None)
    (use,) = choose_kernels(graph, captured.symbols, hidden, cluster, "off", ("dp",))
    assert use.step_s > 0, "where nothing is waited for, rounding costs"


def test_uses_of_older_plans_have_no_change() -> None:
    assert KernelUse("pack", ("dp",)).step_s == 0


def test_what_if_has_the_kernels_that_a_plan_there_has() -> None:
    entry = ZOO["gpt"]
    args, kwargs = entry.inputs(0)
    captured = capture_training(entry.build(), args, kwargs)
    graph, where = prepare(captured.graph), parse_cluster("2xH100")
    plan = planned("2xH100", "auto")
    before = Question(plan, graph, captured.symbols, captured.guards, where, "adamw", None)
    batch = 4 * next(n for symbol, n in captured.symbols.items() if symbol.name == "b")
    found = answer(before, before.with_sizes(b=batch), lambda _: None)
    for key in ("before", "same_plan", "new_plan"):
        assert found[key]["kernels_s"] < 0, key
    assert found["before"]["time_s"] == pytest.approx(plan.predicted.time_s)
    assert found["new_plan"]["time_s"] <= found["same_plan"]["time_s"] * (1 + 1e-6)
    cpu = replace(before, cluster=parse_cluster("cpu:2"))
    found = answer(before, cpu, lambda _: None)
    assert found["same_plan"]["kernels_s"] == found["new_plan"]["kernels_s"] == 0


def test_of_stages_the_one_with_the_fewest_places_counts() -> None:
    stages = {"a": 0, "b": 0, "c": 1, "d": 1}
    assert _counted_share(["a", "b", "c"], stages) == pytest.approx(1 / 3)
    assert _counted_share(["a", "b"], stages) == 0
    assert _counted_share(["a", "b"], {}) == 1
