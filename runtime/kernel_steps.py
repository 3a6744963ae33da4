"""Adam and AdamW whose elements go through the kernel; all else of the step is torch's own.

torch's step collects the tensors of a group in `_init_group`, which makes their state, and hands
them to `adam`. Here the kernel takes them in between and leaves for `adam` what it cannot take, so
that state, its keys and its dtypes are torch's.

The kernel's cast copies are not asked for: a program may take a copy in the place of a cast only if
the parameter has not changed since, and `p.add_`, `p.data.copy_` or a broadcast on a DTensor leave
the `_version` of its local tensor as it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels.adamw import LARGEST, NAME, adamw
from .kernels.support import fall_back, usable

Lists = tuple[list[Tensor], ...]


class _ByKernel:
    """Mixed into torch's optimizers, whose method this overrides."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex: bool = super()._init_group(group, *lists)  # type: ignore[misc]
        if why := _why_not(group):
            fall_back(NAME, why)
            return has_complex
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if group["fused"] or (scale is None and found_inf is None):  # else torch says what is wrong
            _step(group, lists, scale, found_inf)
        return has_complex


class KernelAdam(_ByKernel, torch.optim.Adam):
    """Adam through the kernel."""


class KernelAdamW(_ByKernel, torch.optim.AdamW):
    """AdamW through the kernel."""


WITH_KERNEL: Mapping[type, type] = {
    torch.optim.Adam: KernelAdam,
    torch.optim.AdamW: KernelAdamW,
}


def _why_not(group: dict[str, Any]) -> str | None:
    """Why the kernel cannot make this group's step, as a clause."""
    if group["differentiable"]:
        return "its step cannot be differentiated"
    if any(isinstance(b, Tensor) for b in (*group["betas"], group["weight_decay"], group["eps"])):
        return "of a group's numbers, it takes the learning rate alone as a tensor"
    return None


def _step(
    group: dict[str, Any], lists: Lists, scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Make the step of what the kernel takes, and leave the rest in the lists."""
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for k in range(len(lists[0])):
        row = [part[k] for part in lists if part]
        if (key := _key(row, group)) is not None:
            alike[key].append(k)
    done: set[int] = set()
    for chosen in alike.values():
        some = [[part[k] for k in chosen] if part else [] for part in lists]
        if usable(NAME, *some[0], largest=LARGEST):
            _advance(group, some, scale, found_inf)
            done.update(chosen)
    for part in lists:
        part[:] = [x for k, x in enumerate(part) if k not in done]


def _key(row: Sequence[Tensor], group: dict[str, Any]) -> tuple[Any, ...] | None:
    """What the tensors of one launch have in common; None for what torch takes."""
    parameter, step, lr = row[0], row[-1], group["lr"]
    dtype, device = parameter.dtype, parameter.device
    if not dtype.is_floating_point:
        fall_back(NAME, f"it has no form for {str(dtype).removeprefix('torch.')}")
    elif any(x.dtype != dtype or x.device != device for x in row[1:-1]):
        fall_back(NAME, "gradient or state differ from their parameter in dtype or device")
    elif not _laid_out_alike(row[:-1]):
        fall_back(NAME, "parameter, gradient and state are not laid out alike")
    elif isinstance(lr, Tensor) and lr.device.type != "cpu" and step.device.type == "cpu":
        fall_back(NAME, "the learning rate is on the device, and the step on the host")
    elif group["capturable"] and device.type == "cpu":
        return None  # torch raises
    else:
        return (device, dtype, step.device, step.dtype)
    return None


def _laid_out_alike(row: Sequence[Tensor]) -> bool:
    if all(x.is_contiguous() for x in row):
        return True
    return row[0].dim() == 4 and all(
        x.is_contiguous(memory_format=torch.channels_last) for x in row
    )


def _advance(
    group: dict[str, Any], lists: Sequence[list[Tensor]], scale: Tensor | None, inf: Tensor | None
) -> None:
    steps, device = lists[-1], lists[0][0].device
    torch._foreach_add_(steps, 1)
    scale, inf = (x if x is None else x.to(device, non_blocking=True) for x in (scale, inf))
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, _ = lists
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
        grad_scale=scale,
        found_inf=inf,
        decoupled=group["decoupled_weight_decay"],
    )
    if inf is not None:
        torch._foreach_sub_(steps, [inf.to(steps[0].device)] * len(steps))
