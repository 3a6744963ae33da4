"""Which gradients travel compressed, if a user asks for it: `parallelize(compress="int8")`."""

from __future__ import annotations

from dataclasses import replace

from .errors import UserError
from .ir.mesh import Mesh
from .kernel_use import COMPRESSIONS, Places
from .plan import PIPELINE_AXIS, Plan
from .units import seconds_text, signed_seconds

KERNEL = "int8"
_NOTE = "compress: "  # how a plan's note on it begins


def checked_compression(compress: str | None) -> str | None:
    """The same; raises UserError for what there is not."""
    if compress not in COMPRESSIONS:
        raise UserError(f"unknown compression {compress!r}", fix="use 'int8', or leave it out")
    return compress


def compressed_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes along which sums of parameters' gradients travel compressed.

    Those that cross the cluster's slowest level (hosts), if any axis of the mesh does; on one host
    all of them. `mesh` is a plan's, with the axis of a pipeline, along which no gradients of
    parameters are summed.
    """
    slowest = max((axis.level for axis in mesh), default=0)
    return tuple(a.name for a in mesh if a.level == slowest and a.name != PIPELINE_AXIS)


def with_compression(places: Places, mesh: Mesh, compress: str | None) -> Places:
    """Places of kernels with those of the compression: where the user asks for it, nowhere else."""
    of = {kernel: found for kernel, found in places.of.items() if kernel != KERNEL}
    if compress == KERNEL:
        of[KERNEL] = frozenset(compressed_axes(mesh))
    return Places(of)


def with_note(plan: Plan, compress: str | None) -> Plan:
    """The plan whose notes say what travels compressed."""
    notes = [note for note in plan.notes if not note.startswith(_NOTE)]
    if compress == KERNEL:
        axes = " and ".join(compressed_axes(plan.mesh))
        notes.append(
            f"{_NOTE}gradients along {axes} travel as int8, with errors that one device does not "
            f"make (docs/compression.md){_prices(plan)}"
            if axes
            else f"{_NOTE}no gradients are summed between hosts, and none travel as int8"
        )
    return replace(plan, notes=tuple(notes))


def _prices(plan: Plan) -> str:
    """What the sums are predicted to take, as a clause, where the plan says."""
    uses = [use for use in plan.kernels if use.kernel == KERNEL]
    if not uses:
        return ""
    took = seconds_text(sum(use.time_s for use in uses))
    whole = seconds_text(sum(use.unfused_s for use in uses))
    change = sum(use.step_s for use in uses)
    step = f"; the predicted step counts {signed_seconds(change)} for it" if change else ""
    return f": predicted {took} per step in place of {whole}{step}"
