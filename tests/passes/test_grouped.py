"""Products of rows sorted by expert: Hugging Face's way to write a mixture without a capacity."""

from __future__ import annotations

from functools import cache
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.ir.lowered import GROUPED_MM
from autopar.ir.mesh import Mesh
from autopar.ir.rule import Choice
from autopar.passes.rules_of import rules_of
from tests.random_plans import MESHES, random_decisions
from tests.routed_plans import routing
from tests.simulate import (
    Subject,
    assert_equivalent,
    concrete,
    differences,
    lower_all,
    simulate,
    single_device,
    subject_of,
)

pytest.importorskip("transformers.integrations.moe")  # registers the op that takes float64


class Sorted(nn.Module):
    """Rows of any number per expert, sorted; some experts have none."""

    def __init__(self, experts: int = 5) -> None:
        super().__init__()
        self.experts = experts
        self.w_in = nn.Parameter(torch.randn(experts, 6, 7))
        self.w_out = nn.Parameter(torch.randn(experts, 7, 6))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        chosen, order = torch.sort(expert, stable=True)
        ends = F.one_hot(chosen, self.experts).sum(0).cumsum(0).to(torch.int32)
        product = torch.ops.transformers.grouped_mm_fallback
        h = product(x[order], self.w_in, ends)
        y = product(F.silu(h), self.w_out, ends)
        back = torch.zeros_like(y).index_put((order,), y)
        return ((back + x) ** 2).mean()


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(14, 6, dtype=torch.float64, generator=draw)
    return x, torch.tensor([4, 0, 0, 3, 0, 1, 4, 4, 0, 0, 1, 0, 4, 0])


@cache
def subject() -> Subject:
    torch.manual_seed(0)
    return subject_of(Sorted().double(), batch(), {})


def check(decisions: object, what: str) -> None:
    expected = single_device(subject().module, batch(), {}, lambda y: y)
    got = simulate(subject(), batch(), {}, lambda y: y, decisions)  # type: ignore[arg-type]
    assert_equivalent(got, expected, what)


def test_the_rule() -> None:
    rules = rules_of(concrete(subject()))
    texts = {str(rule) for name, rule in rules.items() if name.startswith("grouped_mm")}
    assert texts == {"td,[e]df,[o]->tf; linear(0) route(t>e)"}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("choice", ["t", "t>e"])
def test_rows_and_experts_split(choice: str, size: int) -> None:
    """Every device with its rows, its experts too, whatever the load."""
    graph, mesh = concrete(subject()), Mesh.of(dp=size)
    decisions = routing(graph, rules_of(graph), mesh, "dp")
    if choice == "t":
        for name in decisions.choices:
            if name.startswith("grouped_mm"):
                decisions.choices[name]["dp"] = Choice(factor="t")  # type: ignore[index]
    (first, *_) = lower_all(subject().graph, subject().capture.symbols, decisions)
    assert [n.target for n in first.calls()].count(GROUPED_MM) == 2
    check(decisions, f"{choice} on {size}")


@pytest.mark.parametrize("seed", range(5))
def test_random_plans(seed: int) -> None:
    graph = concrete(subject())
    random = Random(seed)
    mesh = random.choice(MESHES)
    check(random_decisions(graph, rules_of(graph), mesh, random, 0.1), f"{seed} on {mesh}")


def test_mixtral_as_hugging_face_runs_it() -> None:
    """Its own sorting, in float32: experts on their owners' devices, no weight is gathered."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        use_cache=False,
        experts_implementation="grouped_mm",
    )
    module = MixtralForCausalLM(config)
    ids = torch.randint(48, (6, 8))
    kwargs = {"input_ids": ids, "labels": ids}
    made = subject_of(module, (), kwargs)
    graph = concrete(made)
    decisions = routing(graph, rules_of(graph), Mesh.of(dp=2), "dp")
    stacks = [n for n in decisions.storage if "experts" in n]
    assert {str(decisions.storage[n]) for n in stacks} == {"[dp, -, -]"}
    expected = single_device(module, (), kwargs, lambda out: out.loss)
    got = simulate(made, (), kwargs, lambda out: out.loss, decisions)
    assert not differences(got, expected, 1e-4), differences(got, expected, 1e-4)
