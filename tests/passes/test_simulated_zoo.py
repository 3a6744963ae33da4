"""Breadth: every model of the zoo on simulated ranks, in float64, against the undecorated model.

Plans of every family, and random legal plans: what the rules and the lowering must make right is
any combination of choices, not the few that a search picks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from autopar.errors import UserError
from autopar.ir.mesh import Mesh
from autopar.passes.rules_of import rules_of
from tests.random_plans import MESHES, random_decisions
from tests.simulate import (
    Subject,
    assert_equivalent,
    check_zoo,
    concrete,
    decisions_of,
    plan_of,
    simulate,
    single_device,
    subject_of,
    zoo_loss,
    zoo_subject,
)
from tests.zoo import ZOO
from tests.zoo.dense import MLP, mlp_batch, mlp_target
from tests.zoo.entry import Entry
from tests.zoo.experts import EinsumExperts, MoE, moe_batch
from tests.zoo.language import GPT, Llama, language_batch, loss_of_pair
from tests.zoo.vision import ResNet, ViT, images_and_labels, images_only, labels

# Times as many random plans, and all runs, for a long night: AUTOPAR_PLANS=50 pytest ...
MORE = int(os.environ.get("AUTOPAR_PLANS", "1"))

# gpt's 50257 words cost seconds per rank; gpt_attention_dropout is the same model with 101.
SMALL = tuple(name for name in ZOO if name != "gpt")

# (ranks, strategy, batch size): uneven, or smaller than the mesh.
RUNS = ((8, "zero", 7), (8, "data+tensor", 3), (3, "tensor", 5), (2, "auto", 8))
LARGE_RUNS = ((6, "data+tensor", 7), (3, "zero", 2))  # of larger graphs with the same ops
ALL_RUNS = tuple(
    (ranks, strategy, batch)
    for ranks in (2, 3, 4, 6, 8)
    for strategy in ("auto", "data", "zero", "tensor")
    for batch in (8, 7, 3)
)


@pytest.mark.parametrize("name", SMALL)
def test_zoo(name: str) -> None:
    """Eight ranks and odd counts; batches that do not divide, and smaller than the mesh."""
    subject = zoo_subject(name)
    large = name.startswith(("hf_", "moe_"))
    for ranks, strategy, batch in ALL_RUNS if MORE > 1 else LARGE_RUNS if large else RUNS:
        decisions = decisions_of(subject, plan_of(subject, ranks, strategy))
        check_zoo(name, decisions, batch, f"{strategy}, batch {batch}")


@pytest.mark.parametrize(
    "strategy", ["auto", "data", "zero", "tensor", "data+tensor", "zero+tensor"]
)
@pytest.mark.parametrize("name", ["mlp", "gpt_outside", "resnet"])
def test_families(name: str, strategy: str) -> None:
    subject = zoo_subject(name)
    decisions = decisions_of(subject, plan_of(subject, 4, strategy))
    for batch in (7, 2):
        check_zoo(name, decisions, batch, f"{strategy}, batch {batch}")


# Odd sizes ----------------------------------------------------------------------------------------

ODD_SIZES = {
    "mlp": Entry("mlp", partial(MLP, 37), mlp_batch, torch.nn.functional.cross_entropy, mlp_target),
    "gpt": Entry(
        "gpt",
        partial(GPT, vocab=53, dropout=0.2, attention_dropout=0.1, dim=15, heads=3, context=11),
        partial(language_batch, 53, 11),
    ),
    "llama": Entry(
        "llama",
        partial(Llama, vocab=61, dim=36, heads=6, kv_heads=3),
        partial(language_batch, 61, 7),
        loss_of_pair,
    ),
    "resnet": Entry(
        "resnet",
        partial(ResNet, (5, 7, 9)),
        images_only,
        torch.nn.functional.cross_entropy,
        labels,
    ),
    "vit": Entry("vit", partial(ViT, dim=30, heads=5), images_and_labels),
    "moe": Entry("moe", partial(MoE, EinsumExperts, dim=10, hidden=13, experts=5), moe_batch),
}


@cache
def odd_subject(name: str) -> Subject:
    entry = ODD_SIZES[name]
    torch.manual_seed(0)
    args, kwargs = entry.inputs(0, torch.float64, 6)
    return subject_of(entry.build().double(), args, kwargs)


@pytest.mark.parametrize("name", ODD_SIZES)
def test_odd_sizes(name: str) -> None:
    """Vocabularies, heads and hidden sizes that no mesh divides."""
    subject, entry = odd_subject(name), ODD_SIZES[name]
    for ranks, strategy in ((4, "tensor"), (6, "data+tensor"), (4, "zero")):
        decisions = decisions_of(subject, plan_of(subject, ranks, strategy))
        for batch in (5,):
            args, kwargs = entry.inputs(1, torch.float64, batch)
            loss = zoo_loss(entry, batch, 1)
            expected = single_device(subject.module, args, kwargs, loss)
            got = simulate(subject, args, kwargs, loss, decisions)
            assert_equivalent(got, expected, f"{name} {strategy} on {ranks}, batch {batch}")


# Random plans -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A random plan: everything follows from these."""

    mesh: Mesh
    seed: int
    replicate: float
    batch: int


plans = st.builds(
    Drawn,
    st.sampled_from(MESHES),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.05, 0.3, 0.7, 0.95]),
    st.sampled_from([8, 7, 3]),
)


def random_plans(
    examples: int,
) -> Callable[[Callable[[str, Drawn], None]], Callable[..., None]]:
    def decorate(test: Callable[[str, Drawn], None]) -> Callable[..., None]:
        made: Callable[..., None] = settings(
            max_examples=examples * MORE,
            deadline=None,
            derandomize=MORE == 1,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(given(drawn=plans)(test))
        return made

    return decorate


def check_random(name: str, drawn: Drawn) -> None:
    subject = zoo_subject(name)
    graph = concrete(subject)
    decisions = random_decisions(
        graph, rules_of(graph), drawn.mesh, Random(drawn.seed), drawn.replicate
    )
    check_zoo(name, decisions, drawn.batch, f"{drawn}")


@pytest.mark.parametrize("name", ["mlp", "rec"])
@random_plans(10)
def test_random_plans_of_small_models(name: str, drawn: Drawn) -> None:
    check_random(name, drawn)


@pytest.mark.parametrize("name", ["gpt_attention_dropout", "llama", "resnet", "moe", "vit"])
@random_plans(3)
def test_random_plans(name: str, drawn: Drawn) -> None:
    check_random(name, drawn)


@pytest.mark.parametrize("name", [pytest.param("hf_t5", marks=pytest.mark.slow), "moe_index"])
@random_plans(1)
def test_random_plans_of_large_graphs(name: str, drawn: Drawn) -> None:
    check_random(name, drawn)


# The helper itself ----------------------------------------------------------------------------------


def test_the_comparison_sees_a_wrong_gradient() -> None:
    """A weight stored on one axis, told to be reduced on none: the simulation must notice."""

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.net, self.factor = nn.Linear(4, 3).double(), factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.net(x) * self.factor).square().sum()

    torch.manual_seed(0)
    right, x = Scaled(1.0), torch.randn(5, 4, dtype=torch.float64)
    wrong = Scaled(1.0 + 1e-7)
    wrong.load_state_dict(right.state_dict())
    subject = subject_of(right, (x,), {})
    decisions = decisions_of(subject, plan_of(subject, 2, "data"))
    got = simulate(subject, (x,), {}, lambda y: y, decisions)
    assert_equivalent(got, single_device(right, (x,), {}, lambda y: y))
    with pytest.raises(AssertionError, match=r"gradient of net.weight differs by 2e-07"):
        assert_equivalent(got, single_device(wrong, (x,), {}, lambda y: y))


def test_strategies_that_do_not_apply_say_so() -> None:
    with pytest.raises(UserError):
        plan_of(zoo_subject("mlp"), 3, "data+tensor")
