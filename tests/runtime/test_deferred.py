"""Parameters without memory have, once computed, exactly the values of ordinary construction."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import init
from torch.nn.utils import parametrizations

from autopar.errors import ShardingWarning, UserError
from autopar.runtime.deferred import DeferredTensor, deferred, real_value
from autopar.runtime.materialise import realise
from tests.zoo import ZOO

Make = Callable[[], nn.Module]


def nothing(model: nn.Module) -> nn.Module:
    return model


def check_same(make: Make, after: Callable[[Any], nn.Module] = nothing) -> nn.Module:
    """Build eagerly and deferred from one seed; compare parameters, buffers and the generator."""
    torch.manual_seed(5)
    eager = after(make())
    next_eager = torch.rand(2)
    torch.manual_seed(5)
    with deferred():
        model = make()
    model = after(model)
    assert torch.equal(torch.rand(2), next_eager)
    generator = torch.get_rng_state()
    wanted = {n: p.detach() for n, p in eager.named_parameters(remove_duplicate=False)}
    given = dict(model.named_parameters(remove_duplicate=False))
    assert given.keys() == wanted.keys()
    for name, parameter in given.items():
        assert_same(real_value(parameter), wanted[name], name)
    realise(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert type(parameter) is nn.Parameter
        assert_same(parameter.detach(), wanted[name], name)
    for (name, mine), his in zip(model.named_buffers(), eager.buffers(), strict=True):
        assert type(mine) is Tensor
        assert_same(mine, his, name)
    assert torch.equal(torch.get_rng_state(), generator)
    return model


def assert_same(mine: Tensor, wanted: Tensor, name: str) -> None:
    assert mine.dtype == wanted.dtype and mine.shape == wanted.shape, name
    assert torch.equal(mine, wanted), name


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_built_with_the_same_values(name: str) -> None:
    def make() -> nn.Module:
        model = ZOO[name].build()
        kinds.update(type(p) for p in model.parameters())
        return model

    kinds: set[type] = set()
    check_same(make)
    assert kinds == {nn.Parameter, DeferredTensor}


class Built(nn.Module):
    """A module that a function fills."""

    def __init__(self, fill: Callable[[Any], object]) -> None:
        super().__init__()
        fill(self)


def initialisers(m: Any) -> None:
    m.a, m.b, m.c = nn.Linear(20, 30), nn.Linear(30, 20), nn.Linear(30, 20)
    for function in (init.orthogonal_, init.trunc_normal_, init.xavier_normal_):
        function(m.a.weight)
    init.orthogonal_(m.a.weight)
    init.orthogonal_(m.b.weight)
    init.trunc_normal_(m.c.weight, std=0.02)
    init.sparse_(m.c.weight, 0.1)
    m.d, m.e = nn.Conv2d(8, 8, 3), nn.Linear(16, 16)
    init.dirac_(m.d.weight)
    init.eye_(m.e.weight)


def data_of_parameters(m: Any) -> None:
    m.w = nn.Parameter(torch.randn(30, 20) * 0.02 + torch.arange(20))
    m.w.data.mul_(2)
    m.v = nn.Parameter(torch.zeros(7))
    m.v.data = torch.randn(7)
    m.v.data[2:4] = 5
    m.u = nn.Parameter(torch.zeros(3, 4))
    m.u.data.copy_(torch.from_numpy(np.arange(12.0).reshape(3, 4)))
    m.u.data[0].normal_()
    m.t = nn.Parameter(torch.tensor([2.0, 3.0]))


def tied(m: Any) -> None:
    m.embedding, m.head = nn.Embedding(30, 8, padding_idx=3), nn.Linear(8, 30, bias=False)
    m.head.weight = m.embedding.weight
    m.register_buffer("average", m.embedding.weight.detach().clone())
    m.register_buffer("mask", torch.tril(torch.ones(9, 9)))
    m.register_buffer("rope", 1e4 ** (-torch.arange(0, 8, 2) / 8), persistent=False)


def reads(m: Any) -> None:
    m.a = nn.Linear(10, 10)
    m.a.weight.data.div_(m.a.weight.norm().item())
    if m.a.weight.max() > 0:
        m.a.bias.data.fill_(float(m.a.weight.detach()[0, 0]))
    m.b = nn.Parameter(torch.tensor(m.a.weight.tolist()))
    assert repr(m.b).startswith("Parameter containing:\ntensor([[")
    assert f"{m.a.weight.sum():.3f}" == f"{m.a.weight.sum().item():.3f}"


def random_ops(m: Any) -> None:
    m.w = nn.Parameter(torch.rand(30, 30))
    m.w.data.bernoulli_(0.3)
    m.v = nn.Parameter(torch.bernoulli(torch.rand(20)))
    m.u = nn.Parameter(torch.empty(30))
    m.u.data = torch.bernoulli(m.w.data[0].abs() * 0.5)  # draws by the values of a parameter
    m.t = nn.Parameter(torch.rand_like(m.u))
    m.s = nn.Parameter(torch.randn(20, generator=torch.Generator().manual_seed(3)))
    own = torch.Generator().manual_seed(4)
    m.s.data.uniform_(generator=own)
    m.s.data[1:].normal_(generator=own)
    m.p = nn.Parameter(torch.randperm(9).float())


def indexing(m: Any) -> None:
    m.w = nn.Parameter(torch.randn(8, 8))
    with torch.no_grad():
        m.w[torch.rand(8, 8) > 0.5] = 0
        m.w[m.w > 0.3] = 1
        m.w.clamp_(-1, 1)
        m.w.copy_(torch.linalg.qr(m.w)[0])
        torch._foreach_mul_([m.w], 2.0)
        m.w[:, 2] = torch.nonzero(m.w).float().mean()


def views(m: Any) -> None:
    flat = torch.randn(20)
    m.x, m.y = nn.Parameter(flat[:10]), nn.Parameter(flat[10:].view(2, 5).t())
    m.listed = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(3)])
    m.named = nn.ParameterDict({"a": torch.randn(4)})


def parametrized(m: Any) -> None:
    m.a = parametrizations.weight_norm(nn.Linear(10, 10))
    m.b = parametrizations.orthogonal(nn.Linear(10, 10))
    m.c = parametrizations.spectral_norm(nn.Linear(6, 6))


def other_modules(m: Any) -> None:
    m.lstm, m.attention = nn.LSTM(8, 8, 2), nn.MultiheadAttention(16, 4)


def default_dtype(m: Any) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        m.w, m.v = nn.Parameter(torch.rand(4) / 3), nn.Linear(5, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    m.u = nn.Parameter(torch.arange(3) / 3)


def shared_with_a_tensor(m: Any) -> None:
    m.raw = torch.randn(50)
    m.w = nn.Parameter(m.raw)
    m.raw.mul_(2)
    m.w.data.add_(1)
    m.sum = m.raw.sum().item()
    m.raw.add_(3)
    m.v = nn.Parameter(torch.full((3,), m.sum))


def through_numpy(m: Any) -> None:
    m.w = nn.Parameter(torch.randn(20))
    m.w.detach().numpy()[3:] = 7.0
    m.w.data.add_(1)


FILLS = (
    initialisers, data_of_parameters, tied, reads, random_ops, indexing, views, parametrized,
    other_modules, default_dtype, shared_with_a_tensor, through_numpy,
)  # fmt: skip


@pytest.mark.parametrize("fill", FILLS, ids=lambda fill: fill.__name__)
def test_whatever_a_constructor_does(fill: Callable[[Any], object]) -> None:
    check_same(lambda: Built(fill))


def initialised_again(model: Any) -> nn.Module:
    for parameter in model.double().parameters():
        if parameter.dim() > 1:
            init.kaiming_normal_(parameter)
    return model  # type: ignore[no-any-return]


def loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
    return model


def written_to(model: Any) -> nn.Module:
    model.raw.mul_(2)  # the memory of model.w
    return model  # type: ignore[no-any-return]


def one_vector(model: nn.Module) -> nn.Module:
    total = sum(p.numel() for p in model.parameters())
    nn.utils.vector_to_parameters(torch.arange(float(total)), model.parameters())
    return model


def frozen(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("fill", "after"),
    [
        (tied, lambda m: m.half()),
        (initialisers, initialised_again),
        (initialisers, lambda m: m.to(torch.bfloat16)),
        (tied, loaded),
        (initialisers, copy.deepcopy),
        (initialisers, lambda m: pickle.loads(pickle.dumps(m.b))),
        (shared_with_a_tensor, written_to),
        (initialisers, one_vector),
        (initialisers, frozen),
    ],
)
def test_whatever_is_done_to_the_model_afterwards(
    fill: Callable[[Any], object], after: Callable[[Any], nn.Module]
) -> None:
    check_same(lambda: Built(fill), after)


def test_parameters_take_no_memory_and_say_when_they_have_to() -> None:
    def roomy(m: Any) -> None:
        m.a, m.b = nn.Linear(1000, 1000), nn.Linear(1000, 1000)
        m.b.weight.data.copy_(torch.randn(1000, 1000))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with deferred():
            model: Any = Built(roomy)
    assert all(p._spec.held is None for p in model.parameters())
    assert isinstance(model.a.weight, nn.Parameter) and model.a.weight.device.type == "cpu"
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    assert optimizer.param_groups[0]["params"][0] is model.a.weight
    with pytest.warns(ShardingWarning, match=r"of 3.81 MiB is held whole.*data_ptr\(\) asked"):
        model.a.weight.data_ptr()
    with pytest.raises(UserError, match="cannot be shared"):
        model.share_memory()
    with pytest.raises(UserError, match="set_"):
        model.b.weight.data.set_(torch.ones(3))

    def kept(m: Any) -> None:
        m.raw = torch.randn(1000, 1000)
        m.w = nn.Parameter(m.raw)

    with pytest.warns(ShardingWarning, match="is in use elsewhere"), deferred():
        shared: Any = Built(kept)
    assert shared.w.data_ptr() == shared.raw.data_ptr()


def test_a_source_that_changes_later_is_an_error() -> None:
    with deferred():
        model = nn.Linear(1000, 1000)
    values = torch.zeros(1000, 1000)
    model.load_state_dict({"weight": values, "bias": torch.zeros(1000)})
    assert real_value(model.weight).sum() == 0
    values.add_(1)
    with pytest.raises(UserError, match="was changed after a parameter"):
        real_value(model.weight)


def test_parameter_is_torchs_own_again_after_an_error() -> None:
    before = nn.Parameter.__dict__["__new__"]
    with pytest.raises(ZeroDivisionError), deferred():
        nn.Linear(1 // 0, 2)
    assert nn.Parameter.__dict__["__new__"] is before
    assert type(nn.Parameter(torch.zeros(2))) is nn.Parameter
