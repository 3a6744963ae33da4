"""Kernel time of a step by op family, as torch's profiler sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler import profile

from autopar.cost.families import op_family

MATMUL, ATTENTION, MEMORY_BOUND, OPTIMIZER = "matmul", "attention", "memory-bound", "optimizer"
FAMILY_NAMES = (MATMUL, ATTENTION, MEMORY_BOUND, OPTIMIZER)
# Kernels that the tables of families, which are of ops, do not have.
_ATTENTION_WORDS = ("attention", "flash", "causal_rows")
_MATMUL_WORDS = ("convolution", "mkldnn_linear", "_addmm_activation", "_scaled_mm", "grouped_mm")


def group_of(family: str) -> str:
    """The group that an op family is reported with."""
    if family in ("matmul", "conv"):
        return MATMUL
    return ATTENTION if family == "attention" else MEMORY_BOUND


def kernel_group(name: str) -> str:
    """The group of a kernel by its op's name: `aten::addmm` is a matmul."""
    short = name.rpartition("::")[2]
    if short.startswith("_fused_"):
        return OPTIMIZER
    if any(word in short for word in _ATTENTION_WORDS):
        return ATTENTION
    if any(word in short for word in _MATMUL_WORDS):
        return MATMUL
    return group_of(op_family(short.rstrip("_")))


def family_times(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of one `step()` by group: of GPU kernels, or on CPU of ops without their callees.

    Watching slows a step down, on CPU most; what Python does between ops is in no group.
    """
    cuda = device.type == "cuda"
    make: Any = profile  # untyped
    # Kineto sees kernels on GPUs, and writes to stderr.
    with make(use_device="cuda" if cuda else None, use_kineto=cuda) as watched:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    found = dict.fromkeys(FAMILY_NAMES, 0.0)
    events: Any = watched.key_averages()  # untyped
    for event in events:
        # Kernels have rows of their own, beside those of the ops that launched them.
        if "::" not in event.key or "CPU" not in str(event.device_type):
            continue
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        found[kernel_group(event.key)] += microseconds / 1e6
    return found
