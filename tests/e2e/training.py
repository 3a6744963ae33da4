"""Train a model of the zoo, on one device or on all ranks, and measure how far the two are apart.

Norms. A loss differs by `|a - b| / |b|`. Of a gradient or a parameter, `max |a - b|` over its
elements is divided by its own scale `max |b|`, but at least by a thousandth of the model's scale,
which is the largest element of all gradients of that step, or of all parameters: some gradients
(a key's bias under softmax) are zero but for rounding. Buffers count as parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import autopar
from autopar.errors import UserError
from autopar.ir.mesh import MICRO_BATCH
from autopar.ir.recomputed import mark_of
from autopar.plan import plan_from_json
from tests.zoo import LARGE_REC, ZOO, Entry
from tests.zoo.inside import inside

INSIDE = {entry.name: entry for entry in map(inside, ZOO.values()) if entry.name not in ZOO}
MODELS: Mapping[str, Entry] = {**ZOO, LARGE_REC.name: LARGE_REC, **INSIDE}
STRATEGIES = ("auto", "data", "zero", "tensor", "data+tensor")
FLOOR = 1e-3
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass
class Run:
    """What a training run leaves: losses, gradients per step, parameters and buffers at the end."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """One model under one strategy; `inapplicable` is the planner's reason, errors are relative.

    `recomputed` counts the regions of rank 0's program that the backward runs again. `compression`
    is the distance of the first step's gradients from those of one device over their norm, all in
    one: where gradients travel compressed, that is the compression's error. `crossing` are the
    axes of a stage that split what rank 0 sends to other stages of values with several dims.
    """

    mesh: str = ""
    inapplicable: str = ""
    loss: float = 0.0
    gradient: float = 0.0
    parameter: float = 0.0
    worst: str = ""
    recomputed: int = 0
    compression: float = 0.0
    crossing: tuple[str, ...] = ()


def build(entry: Entry, dtype: str) -> nn.Module:
    torch.manual_seed(0)
    model = entry.build().train()
    return entry.double(model) if dtype == "float64" else model


def train(entry: Entry, model: nn.Module, steps: int, keep: bool) -> Run:
    """AdamW; `keep` says whether gradients and the final state are wanted (of rank 0 only)."""
    compared = not dist.is_initialized() or dist.get_rank() == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = Run()
    torch.manual_seed(1)
    for step in range(steps):
        loss = entry.step_loss(model, step)
        loss.backward()
        if keep and (not is_large(entry) or step in (0, steps - 1)):
            run.gradients.append({n: g for n, g in whole_gradients(model) if compared})
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())
    if keep:
        state = model.state_dict()
        run.state = {n: v.detach().clone() for n, v in state.items() if compared}
    return run


def is_large(entry: Entry) -> bool:
    return entry.name == LARGE_REC.name


def whole_gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        if gradient is not None:
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            yield name, whole.detach().clone()


def make_reference(name: str, dtype: str, steps: int, file: Path) -> None:
    """Train on one device and save the run; without dropout, check it against plain PyTorch.

    Raises AssertionError where the single-process path changes a bit of it.
    """
    entry = MODELS[name]
    keep = dtype == "float64"
    run = train(entry, autopar.parallelize(build(entry, dtype)), steps, keep)
    if not entry.has_dropout:
        plain = train(entry, build(entry, dtype), steps, keep=False)
        assert plain.losses == run.losses, f"{name}: one process differs from the plain model"
    torch.save((run.losses, run.gradients, run.state), file)


def train_and_compare(
    name: str,
    strategy: str,
    dtype: str,
    steps: int,
    file: str,
    plan: str | None = None,
    compress: str | None = None,
    cluster: str | None = None,
) -> Outcome | None:
    """On every rank: train in parallel; on rank 0, compare with the reference in `file`.

    `plan` is the text of a plan to follow instead of a strategy, `compress` how gradients travel,
    `cluster` what the ranks are taken to be.
    """
    entry = MODELS[name]
    keep = dtype == "float64"
    given = plan_from_json(plan) if plan is not None else None
    model = autopar.parallelize(
        build(entry, dtype),
        strategy=strategy if given is None else "auto",
        plan=given,
        compress=compress,
        cluster=cluster,
    )
    try:
        run = train(entry, model, steps, keep)
    except UserError as error:
        if "does not apply" not in error.what:
            raise
        return Outcome(inapplicable=error.what)
    mesh = str(model.autopar.plan.mesh)
    if dist.get_rank() != 0:
        return None
    losses, gradients, state = torch.load(file, mmap=True)
    worst: dict[str, float] = {}
    nodes = [node for graph in model.autopar.session.programs for node in graph.calls()]
    outcome = Outcome(
        mesh,
        recomputed=len({mark_of(node) for node in nodes} - {None}),
        loss=max(abs(a - b) / abs(b) for a, b in zip(run.losses, losses, strict=True)),
        gradient=max(
            (error_of(a, b, worst) for a, b in zip(run.gradients, gradients, strict=True)),
            default=0.0,
        ),
        parameter=error_of(run.state, state, worst) if keep else 0.0,
        compression=distance(run.gradients[0], gradients[0]) if keep else 0.0,
        crossing=tuple(sent(model)),
    )
    largest = max(worst, key=worst.__getitem__, default="")
    return Outcome(**{**vars(outcome), "worst": largest})


def sent(model: Any) -> Iterator[str]:
    """The axes of a stage that split what this rank's pieces but the last one send.

    Of values with several dims: what has one is a loss or a count per micro-batch, which is whole.
    """
    session = model.autopar.session
    pipeline = session.plan.pipeline
    for stage in session.stages if pipeline is not None else ():
        if stage.name == "propagate" and stage.piece < pipeline.pieces - 1:
            for wanted in stage.graph.output_node.meta["wants"]:
                if len(wanted.splits) > 1:
                    yield "&".join(a for s in wanted.splits for a in s.axes if a != MICRO_BATCH)


def error_of(
    mine: Mapping[str, Tensor], reference: Mapping[str, Tensor], worst: dict[str, float]
) -> float:
    """The largest relative error of named tensors; notes it per name in `worst`."""
    assert mine.keys() == reference.keys(), sorted(mine.keys() ^ reference.keys())
    scales = {name: scale_of(value) for name, value in reference.items()}
    floor = FLOOR * max(scales.values(), default=0.0)
    largest = 0.0
    for name, value in reference.items():
        assert mine[name].shape == value.shape, name
        if not value.numel():
            continue
        distance = (mine[name].double() - value.double()).abs().max().item()
        error = distance / max(scales[name], floor, 1e-300)
        error = error if error == error else float("inf")
        worst[name] = max(worst.get(name, 0.0), error)
        largest = max(largest, error)
    return largest


def distance(mine: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The norm of the difference of all tensors together, over that of the reference."""
    square = sum(
        float((mine[n].double() - v.double()).square().sum()) for n, v in reference.items()
    )
    norm = sum(float(v.double().square().sum()) for v in reference.values())
    return math.sqrt(square / norm) if norm else 0.0


def scale_of(value: Tensor) -> float:
    return value.double().abs().max().item() if value.numel() else 0.0
