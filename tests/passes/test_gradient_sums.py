"""Adding gradients of parameters over micro-batches: what is added, where, and that all agree."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from autopar.cost.cluster import make_mesh
from autopar.cost.compute import accumulate_time
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding
from autopar.passes.accounts import Accounts, bill, overlap_of, regions_of
from autopar.passes.gradient_sums import sum_time, summed_as
from autopar.passes.options import Option
from autopar.passes.price import Pricer
from autopar.passes.problem import options_of, problem_of
from autopar.passes.programme import solve
from autopar.passes.step_of import step_of
from tests.simulate import cpu, zoo_subject

WHOLE = Sharding.replicated(2)
SPLIT = WHOLE.with_split(0, ("dp",))


def test_sums_are_where_gradients_are_reduced() -> None:
    assert summed_as(SPLIT, WHOLE, regather=False) == WHOLE
    assert summed_as(SPLIT, WHOLE, regather=True) == SPLIT


def test_16_bit_gradients_are_added_in_float32() -> None:
    """Two bytes are read, four read and four written per element; of float32 three times four."""
    device = cpu(2).device
    once = float(accumulate_time(device, 4000.0))
    assert float(sum_time(device, 4000.0, torch.float32)) == once
    wide = float(sum_time(device, 2000.0, torch.bfloat16))
    assert wide == pytest.approx(float(accumulate_time(device, 10 / 3 * 1000.0)))


@pytest.mark.parametrize("regather", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_steps_and_accounts_pay_the_same(micro_batches: int, regather: bool) -> None:
    """ZeRO keeps whole sums where it gathers once, and sums of shards where it gathers again."""
    cluster, subject = cpu(4), zoo_subject("mlp")
    problem = problem_of(subject.graph, subject.capture.symbols, cluster, "adamw")
    mesh: Mesh = make_mesh(cluster, {"dp": 4})
    pricer = Pricer(cluster, mesh, micro_batches=micro_batches)
    options = options_of(problem, mesh, pricer, problem.family("zero", {"dp": "data"}))
    for node, listed in options.items():
        if node.op == "placeholder" and node.meta.get("role") == "param":
            split = [o for o in listed if o.gives[0].used_axes()]
            options[node] = [replace(o, regather=regather) for o in split] or listed
    accounts = Accounts(
        pricer,
        regions_of(problem.graph, problem.blocks),
        micro_batches,
        {},
        overlap_of(cluster, mesh),
    )
    found = solve(problem.graph, problem.blocks, options, pricer, math.inf, accounts=accounts)
    assert found is not None
    stored = [found.option[node] for node in problem.graph.placeholders("param")]
    assert any(o.regather == regather and o.gives[0].used_axes() for o in stored)
    step = step_of(problem.graph, problem.blocks, found.option, pricer, micro_batches)
    paid = bill(problem.graph, problem.blocks, found.option, accounts)
    without = bill(problem.graph, problem.blocks, found.option, _Free.of(accounts))
    added = paid.blocking_s - without.blocking_s
    whole = sum(
        (micro_batches - 1) * pricer.sum_s(node, 0, _held(found.option[node]))
        for node in problem.graph.placeholders("param")
    )
    assert added == pytest.approx(whole)
    assert (added > 0) == (micro_batches > 1)
    alone = replace(step, micro_batches=1)
    before = step_of(problem.graph, problem.blocks, found.option, Pricer(cluster, mesh), 1)
    backward = sum(s.copies * p.backward_s for s, p in alone.parts() if p.is_compute)
    plain = sum(s.copies * p.backward_s for s, p in before.parts() if p.is_compute)
    assert micro_batches * (backward - plain) == pytest.approx(added)


def _held(option: Option) -> Sharding:
    """Ops of the ZeRO family read parameters whole."""
    stored = option.gives[0]
    return stored if option.regather else Sharding.replicated(len(stored.splits))


class _Free(Accounts):
    """Accounts in which sums cost nothing."""

    @staticmethod
    def of(accounts: Accounts) -> _Free:
        return _Free(
            accounts.pricer,
            accounts.regions,
            accounts.micro_batches,
            accounts.modes,
            accounts.overlap,
        )

    def sums_s(self, flow: object) -> float:
        return 0.0
