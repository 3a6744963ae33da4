"""Training loops for what pipelines are prone to get wrong; each as `micro_loops` has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autopar.errors import UserError
from tests.e2e.loops import VOCAB, Values, batch, seed, state, whole
from tests.e2e.micro_loops import LOOPS, gpt, made


class Skipping(nn.Module):
    """Skips between distant layers, a tied head, a parameter without dims, one that is unused.

    It returns more than its loss, and counts its calls in a buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.norm = nn.LayerNorm(16)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.seen: Tensor

    def forward(self, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
        self.seen = self.seen + 1
        h = self.table(ids)
        kept = []
        for layer in self.layers[:3]:
            h = h + layer(h).tanh()
            kept.append(h * self.gain)
        early = kept[0].square().mean()
        for layer in self.layers[3:]:
            h = layer(h + kept.pop() * self.gain).relu() + h
        logits = self.norm(h) @ self.table.weight.t()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return {"loss": loss + 0.1 * early, "early": early, "best": logits.argmax(-1)}


def skipping_module() -> nn.Module:
    seed(0)
    return Skipping().double()


def skipping(plan: str | None) -> Values:
    model = made(skipping_module(), plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found: Values = {}
    for step in range(4):
        out = model(*batch(step))
        out["loss"].backward()
        found[f"norm {step}"] = whole(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        found[f"best {step}"] = out["best"].double()
        found[f"early {step}"] = out["early"].detach()
        assert model.unused.grad is None
        optimizer.step()
        optimizer.zero_grad()
    return {**found, **state(model)}


def overflowing(plan: str | None) -> Values:
    """A gradient that is infinite on one stage only: no stage makes the step."""
    model = made(skipping_module(), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    late = torch.zeros(())

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * (float("inf") if late else 1.0)

    model.layers[5].weight.register_hook(spoil)
    scales, losses = [], []
    for step in range(5):
        late.fill_(step == 2)
        loss = model(*batch(step))["loss"]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert scales[2] == scales[1] / 2, scales
    return {"scales": " ".join(map(str, scales)), "losses": losses, **state(model)}


class Outside(nn.Module):
    """The loss is left to the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gpt()

    def forward(self, ids: Tensor) -> Any:
        return self.model(ids)


def refused_outside(plan: str) -> str:
    seed(0)
    model = made(Outside(), plan)
    try:
        model(batch(0)[0]).sum().backward()
    except UserError as error:
        return str(error)
    return "nothing"


PIPED_LOOPS: dict[str, Callable[[str | None], Values]] = {
    **LOOPS,
    "skipping": skipping,
    "overflowing": overflowing,
}


def run_piped_loop(name: str, plan: str | None) -> Values:
    """Pickled by name: what the ranks are asked to run."""
    return PIPED_LOOPS[name](plan)
