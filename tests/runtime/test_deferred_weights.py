"""Gradients of weights that are made later are right, and keep nothing afterwards."""

import gc
import weakref

import torch
from torch import nn

from autopar.runtime.deferred_weights import Queue, deferring, drain


class Token:
    """Something that can be seen to go."""


def test_gradients_come_with_the_queue_and_the_graph_goes() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, requires_grad=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = x.detach().double().requires_grad_()
    wanted = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    queue: Queue = []
    alive: list[weakref.ref[Token]] = []

    def forward() -> torch.Tensor:
        y = model[0](x)
        token = Token()  # as long as the node of the graph
        y.grad_fn.register_hook(lambda *_, token=token: None)
        alive.append(weakref.ref(token))
        result: torch.Tensor = model[2](model[1](y)).square().sum()
        return result

    with deferring(queue):
        forward().backward()
    assert model[0].weight.grad is None and model[2].weight.grad is None
    drain(queue)
    for got, want in zip([x, *model.parameters()], wanted, strict=True):
        torch.testing.assert_close(got.grad, want, rtol=1e-12, atol=1e-14)
    gc.collect()
    assert not queue
    assert alive[0]() is None
