"""What a training loop does with parameters, on one device and on the stages of a pipeline.

Every case is called with a mesh (None: one device, ordinary tensors) and returns what all ranks and
one device must agree on.
"""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autopar.compat import local_of
from autopar.errors import UserError
from autopar.ir.mesh import Mesh
from autopar.ir.parse import parse_sharding
from autopar.runtime import world
from autopar.runtime.locals import local_tensors
from autopar.runtime.on_stage import StagedTensor, is_here, stage_gradients
from autopar.runtime.optimizer import LocalSteps
from autopar.runtime.plan_tensor import as_plan_tensor
from autopar.runtime.stage_gather import gathered
from autopar.runtime.stage_placement import axis_of, everywhere
from autopar.runtime.state import (
    like,
    place_optimizer_states,
    replicate_parameters,
    shard_parameters,
    shard_state,
    whole_state,
)
from autopar.runtime.strided_tensor import cut_strided, gather_strided

Values = dict[str, Any]
STORAGE = {  # name: shape, its sharding on tp beside the stages, the stage that owns it
    "embed": ((7, 6), "[tp, -]", 0),  # 7 rows do not divide by 2
    "norm": ((6,), "[-]", 0),
    "qkv": ((12, 6), "[3:tp, -]", 1),
    "out": ((6, 4), "[-, tp]", 1),
    "bias": ((3,), "[tp]", 1),
    "scale": ((), "[]", 1),
    "conv": ((2, 3, 4, 1), "[-, -, tp, -]", 0),
}
MESHES = {
    "stages": Mesh.of(pp=4),
    "stages and tensor": Mesh.of(pp=2, tp=2),
    "tensor": Mesh.of(tp=4),
}


class Net(nn.Module):
    """Parameters of all kinds, one of them tied."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, (shape, _, _) in STORAGE.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))
        self.head = nn.Linear(1, 1, bias=False)
        self.head.weight = self.embed


def net(mesh_name: str | None, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    module = Net(seed).to(dtype)
    if mesh_name is None:
        return module
    mesh = MESHES[mesh_name]
    axes = set(mesh.names)
    stages = {n: (s,) for n, (_, _, s) in STORAGE.items()} if "pp" in axes else {}
    storage = {
        name: parse_sharding(text if "tp" in axes else text.replace("3:tp", "-").replace("tp", "-"))
        for name, (_, text, _) in STORAGE.items()
    }
    replicate_parameters(module, world.flat_mesh(mesh.size, "cpu"))
    shard_parameters(module, storage, mesh, world.device_mesh(mesh, "cpu"), stages)
    return module


def whole(value: Any) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def placed(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, laid out as a parameter."""
    return like(value, parameter) if isinstance(parameter, DTensor) else value


def values_of(module: nn.Module) -> Values:
    return {name: whole(p) for name, p in module.named_parameters()}


def give_gradients(module: nn.Module, step: int, scale: float = 1.0) -> None:
    """Gradients as a step leaves them: accumulated by autograd, on all ranks."""
    for i, parameter in enumerate(module.parameters()):
        generator = torch.Generator().manual_seed(100 * step + i)
        weight = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        weight = placed(weight.to(parameter.dtype), parameter)
        if parameter.requires_grad:
            parameter.grad = weight if parameter.grad is None else parameter.grad + weight


def optimizer_case(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[str | None], Values]:
    def case(mesh: str | None) -> Values:
        module = net(mesh)
        optimizer = make(list(module.parameters()))
        place_optimizer_states()
        steps = LocalSteps()
        for step in range(3):
            give_gradients(module, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step != 1)
        steps.close()
        return values_of(module)

    return case


def clipped(norm_type: float, foreach: bool | None) -> Callable[[str | None], Values]:
    def case(mesh: str | None) -> Values:
        module = net(mesh)
        give_gradients(module, 0)
        norm = nn.utils.clip_grad_norm_(module.parameters(), 0.7, norm_type, foreach=foreach)
        again = nn.utils.get_total_norm([p.grad for p in module.parameters()], norm_type)
        gradients = {n: whole(p.grad) for n, p in module.named_parameters()}
        return {"norm": whole(norm), "after": whole(again), **gradients}

    return case


def clipped_otherwise(mesh: str | None) -> Values:
    """Values clipped; a norm that is not finite because of one stage raises on every rank."""
    module = net(mesh)
    give_gradients(module, 0)
    nn.utils.clip_grad_value_(module.parameters(), 0.3)
    found = {n: whole(p.grad) for n, p in module.named_parameters()}
    bad = torch.zeros(7, 6, dtype=torch.float64)
    bad[6, 1] = torch.nan
    module.embed.grad.add_(placed(bad, module.embed))
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_(module.parameters(), 1.0, error_if_nonfinite=True)
    return found


def arithmetic(mesh: str | None) -> Values:
    """What people compute of parameters when they look at them."""
    module = net(mesh)
    found: Values = {}
    for name, p in module.named_parameters():
        found |= {f"{name} sum": p.sum().item(), f"{name} norm": p.norm().item()}
        found[f"{name} mean"] = whole(p.mean())
        if name in ("norm", "out", "conv"):  # of uneven pieces, DTensor does not do these
            found[f"{name} flat"] = whole(p.detach().reshape(-1) * 2 + 1)
            found[f"{name} max"] = whole(p.detach().abs().amax())
        found[f"{name} compare"] = int((p > 0).sum())
        assert torch.equal(whole(p.float()), whole(p).float()) and p.dtype == torch.float64
        assert repr(p) and str(p.norm())
        assert bool(torch.isfinite(p).all())
    found["product"] = whole(module.qkv.detach() @ module.out.detach())  # one stage
    found["mixed"] = whole(module.embed.detach() * module.norm.detach() + module.scale.detach())
    found["both"] = whole(torch.cat([module.embed.detach(), module.qkv.detach()]))
    found["transposed"] = whole(module.qkv.detach().t().contiguous())
    with torch.no_grad():
        module.norm[2:4].fill_(5.0)  # a view on its stage
        module.qkv.mul_(module.norm)  # written on another stage than it is read from
        module.out.clamp_(min=0.0).add_(module.scale)
        module.embed.copy_(placed(torch.arange(42.0).view(7, 6).double(), module.embed))
    return found | values_of(module)


def gradients_flow(mesh: str | None) -> Values:
    """A penalty on the parameters, differentiated through norms, products and full tensors."""
    module = net(mesh)
    loss = sum(p.square().sum() for p in module.parameters() if p.dim())  # on many stages
    loss = loss + module.out.norm() * 3
    loss.backward()
    found = {f"penalty {n}": whole(p.grad) for n, p in module.named_parameters() if p.dim()}
    module.zero_grad()
    weight = module.qkv.full_tensor() if mesh else module.qkv
    (weight.sin() * torch.arange(6.0, dtype=torch.float64)).sum().backward()
    assert mesh is None or "pp" not in MESHES[mesh].names or type(module.qkv.grad) is StagedTensor
    return {"loss": whole(loss), **found, "full": whole(module.qkv.grad)}


def states(mesh: str | None) -> Values:
    """Whole state dicts and optimizer states, saved under this plan and loaded again."""
    module = net(mesh)
    place_optimizer_states()
    steps = LocalSteps()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)

    def train(first: int) -> None:
        for step in range(first, first + 2):
            module.zero_grad()
            give_gradients(module, step)
            optimizer.step()

    def load(state: Values) -> None:
        given = dict(state)
        shard_state(module, given, "")
        module.load_state_dict(given)

    train(0)
    saved = module.state_dict()
    whole_state(saved)
    assert not any(isinstance(v, DTensor) for v in saved.values())
    saved = {n: v.detach().clone() for n, v in saved.items()}
    kept = copy.deepcopy(optimizer.state_dict())
    train(2)
    after = values_of(module)
    load(saved)
    optimizer.load_state_dict(kept)
    train(2)
    again = values_of(module)
    assert all(torch.equal(after[n], again[n]) for n in after) or mesh is None
    whole_kept = copy.deepcopy(kept)
    for state in whole_kept["state"].values():
        for name, value in state.items():
            state[name] = whole(value)
    load(saved)
    other = torch.optim.AdamW(module.parameters(), lr=0.1)
    other.load_state_dict(whole_kept)
    optimizer = other
    train(2)
    steps.close()
    return {**again, **{f"whole {n}": v for n, v in values_of(module).items()}}


def copies(mesh: str | None) -> Values:
    """Deep copies, averages of the weights, frozen parameters."""
    module = net(mesh)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    twin = copy.deepcopy(module)
    module.norm.requires_grad_(False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(3):
        give_gradients(module, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
        average.update_parameters(module)
    assert module.norm.grad is None and twin.norm.requires_grad
    with torch.no_grad():
        for mine, his in zip(twin.parameters(), module.parameters(), strict=True):
            mine.lerp_(his, 0.25)
    found = {f"twin {n}": v for n, v in values_of(twin).items()}
    flat = nn.utils.parameters_to_vector([module.norm, module.out])
    return {**values_of(average), **found, "flat": whole(flat)}


def overflow(mesh: str | None) -> Values:
    """Loss scaling with gradients that are not finite on one stage, then on none."""
    module = net(mesh, dtype=torch.float32)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    steps = LocalSteps()
    scales: list[float] = []
    for step in range(4):
        scale = scaler.scale(torch.ones(())).item()
        give_gradients(module, step, scale)
        if step == 1:
            bad = torch.zeros(12, 6)
            bad[5, 2] = torch.inf
            module.qkv.grad.add_(placed(bad, module.qkv))
        if step != 3:
            scaler.unscale_(optimizer)
            found = scaler._found_inf_per_device(optimizer).values()
            assert sum(float(v) for v in found) == (1.0 if step == 1 else 0.0)
        if step == 2:
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    steps.close()
    return {"scales": torch.tensor(scales), **values_of(module)}


def checkpoints(mesh: str | None) -> Values:
    """Saved by torch.distributed.checkpoint on stages, loaded without them, and back."""
    if mesh is None:
        return values_of(net(None)) | {f"back {n}": v for n, v in values_of(net(None, 1)).items()}
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    first, second = Path(folder[0]) / "stages", Path(folder[0]) / "flat"
    other_name = "tensor"
    module = net(mesh)
    other = net(other_name, 1)
    dcp.save(_plain_state(module), checkpoint_id=first)
    dcp.save(_plain_state(other), checkpoint_id=second)
    dcp.load(_plain_state(other), checkpoint_id=first)
    found = values_of(other)
    dcp.load(_plain_state(module), checkpoint_id=second)
    _check_states_travel(mesh, other_name, Path(folder[0]) / "states")
    return found | {f"back {n}": v for n, v in values_of(module).items()}


def _check_states_travel(mesh: str, other: str, folder: Path) -> None:
    """Parameters and optimizer states, as torch's own functions get and set them."""
    place_optimizer_states()
    found = []
    for name, seed in ((mesh, 0), (other, 1)):
        module = net(name, seed)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        give_gradients(module, seed)
        steps = LocalSteps()
        optimizer.step()
        steps.close()
        module.zero_grad()
        state = dict(zip(("model", "optimizer"), get_state_dict(module, optimizer), strict=True))
        if not found:
            dcp.save(state, checkpoint_id=folder)
        else:
            dcp.load(state, checkpoint_id=folder)
            set_state_dict(
                module,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
        states = [optimizer.state[p] for p in module.parameters()]
        averages = {f"average {i}": whole(s["exp_avg"]) for i, s in enumerate(states)}
        found.append(values_of(module) | averages)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def _plain_state(module: nn.Module) -> Values:
    return {name: p.detach() for name, p in module.named_parameters()}


CASES: dict[str, Callable[[str | None], Values]] = {
    "adamw": optimizer_case(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False)),
    "adamw_foreach": optimizer_case(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
    "adamw_fused": optimizer_case(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
    "amsgrad": optimizer_case(lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True)),
    "sgd": optimizer_case(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    "adagrad": optimizer_case(lambda p: torch.optim.Adagrad(p, lr=0.1)),
    "adafactor": optimizer_case(lambda p: torch.optim.Adafactor(p, lr=0.1)),
    "muon": optimizer_case(lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.1)),
    "own_optimizer": optimizer_case(lambda p: Momentum(p, lr=0.1)),
    "clip_2": clipped(2.0, None),
    "clip_2_foreach": clipped(2.0, True),
    "clip_1": clipped(1.0, None),
    "clip_inf": clipped(torch.inf, False),
    "clip_otherwise": clipped_otherwise,
    "arithmetic": arithmetic,
    "gradients_flow": gradients_flow,
    "states": states,
    "copies": copies,
    "overflow": overflow,
    "checkpoints": checkpoints,
}


class Momentum(torch.optim.Optimizer):
    """An optimizer of one's own, whose steps depend on whole tensors."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["m"] = state.get("m", torch.zeros_like(p)).mul(0.9).add(p.grad)
                trust = p.norm() / (state["m"].norm() + 1e-6)
                p.add_(state["m"] * trust, alpha=-group["lr"])


def run_case(name: str, mesh: str | None) -> Values:
    return CASES[name](mesh)


def holds(mesh: str) -> dict[str, tuple[int, bool]]:
    """Elements that this rank stores of each parameter, and whether it is on its stage."""
    module = net(mesh)
    return {n: (local_of(p).numel(), is_here(p)) for n, p in module.named_parameters()}


def misused() -> str:
    """The message of what cannot be done with a parameter of a stage."""
    try:
        net("stages and tensor").out.detach().resize_(3)
    except UserError as error:
        return str(error)
    return "nothing"


def written_parts() -> list[bool]:
    """Whether writes to parts that are copies, as their devices have pieces, reach the whole."""
    module = net("stages and tensor")
    found = []
    for p in module.parameters():
        if p.dim() == 2 and p.shape[1] > 3:
            p.detach()[0].zero_()
            p.detach()[:, 0].fill_(2.0)
            p.detach().t()[1:3].mul_(0.0)
            whole = p.detach().full_tensor()
            wanted = whole.clone()
            wanted[0], wanted[:, 1:3], wanted[:, 0] = 0.0, 0.0, 2.0
            found += [torch.equal(whole, wanted), bool(whole[1:, 3:].all())]
    return found


def traded_state() -> dict[str, Any]:
    """What torch.save and torch.load make of a parameter of a stage."""
    module = net("stages and tensor")
    file = io.BytesIO()
    torch.save({"qkv": module.qkv, "placed": module.qkv.placements}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded["placed"] == module.qkv.placements and type(loaded["qkv"]) is StagedTensor
    return {"same": torch.equal(local_of(loaded["qkv"]), local_of(module.qkv))}


def present_gradients() -> list[tuple[bool, bool]]:
    """Which local gradients there are, and which parameters then have one."""
    module = net("stages and tensor")
    parameters = list(module.parameters())
    locals_ = local_tensors(parameters)
    given = [
        torch.ones_like(x) if is_here(p) else None for x, p in zip(locals_, parameters, strict=True)
    ]
    given[1] = None  # takes no part
    takes_part = [i != 1 for i in range(len(given))]
    ready = stage_gradients(parameters, given, takes_part)
    some = [(x, g) for x, g in zip(locals_, ready, strict=True) if g is not None]
    torch.autograd.backward([x for x, _ in some], [g for _, g in some])
    return [(g is not None, p.grad is not None) for g, p in zip(given, parameters, strict=True)]


def strided_pieces(mesh: str) -> list[bool]:
    """Cutting and gathering pieces of several runs, which older torch leaves to autopar."""
    module = net(mesh)
    placements = module.qkv.placements
    axis = axis_of(module.qkv)
    if axis is not None:
        module.qkv = nn.Parameter(as_plan_tensor(gathered([module.qkv])[0]))
        placements = everywhere(placements, axis)
    full = module.qkv.full_tensor().detach()
    live = module.qkv.device_mesh
    replicated = DTensor.from_local(full, live, [Replicate()] * live.ndim, run_check=False)
    cut = cut_strided(replicated, placements)
    return [
        torch.equal(local_of(cut), local_of(module.qkv)),
        torch.equal(local_of(gather_strided(cut)), full),
        cut.placements == placements,
    ]
