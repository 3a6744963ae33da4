"""What autopar's own kernels change of a plan's predicted step."""

from __future__ import annotations

from dataclasses import replace

from .kernel_use import KernelUse
from .plan import Plan, Prediction


def with_kernels_counted(plan: Plan, uses: tuple[KernelUse, ...]) -> Plan:
    """The plan with these kernels in place of its own, and with what they change of its step."""
    without = without_kernels(plan.predicted, plan.kernels)
    return replace(plan, kernels=uses, predicted=_with(without, uses))


def without_kernels(predicted: Prediction, uses: tuple[KernelUse, ...]) -> Prediction:
    """The prediction of the same step without the kernels `uses`, if it counts them."""
    if not any(use.step_s or use.sent_bytes for use in uses) or not _counts(predicted, uses):
        return predicted
    return replace(
        predicted,
        time_s=predicted.time_s - predicted.kernels_s,
        kernels_s=0.0,
        comm_bytes=_sent(predicted, uses, -1),
    )


def _counts(predicted: Prediction, uses: tuple[KernelUse, ...]) -> bool:
    """Whether a prediction has in it what the kernels change."""
    return bool(predicted.kernels_s) or not any(use.step_s for use in uses)


def _with(predicted: Prediction, uses: tuple[KernelUse, ...]) -> Prediction:
    change = sum(use.step_s for use in uses)
    return replace(
        predicted,
        time_s=predicted.time_s + change,
        kernels_s=change,
        comm_bytes=_sent(predicted, uses, 1),
    )


def _sent(predicted: Prediction, uses: tuple[KernelUse, ...], sign: int) -> dict[str, int]:
    """Bytes by collective with (1) or without (-1) what the kernels change of them."""
    found = dict(predicted.comm_bytes)
    for use in uses:
        for kind, change in use.sent_bytes.items():
            found[kind] = max(0, found.get(kind, 0) + sign * change)
    return {kind: n for kind, n in sorted(found.items()) if n}
