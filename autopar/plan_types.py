"""What a plan is made of: storage, choices, pipeline, kernels, and what all that costs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .cost.timeline import TimelineSummary
from .errors import UserError
from .files import replace_file
from .ir.mesh import Mesh
from .kernel_use import KernelUse

VERSION = 3
PIPELINE_AXIS = "pp"  # the outermost mesh axis of a plan with a pipeline
MICRO_BATCH_AXIS = "mb"  # the virtual axis along which micro-batches follow each other


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of one training step on the slowest device: that of its simulated timeline.

    Times in seconds, memory in bytes; `comm_s` is the communication that compute waits for, and
    `memory_bytes` the peak. `comm_bytes` is what one device sends per step, per
    collective name. `kernels_s` is what autopar's own kernels add to `time_s` (less: below zero),
    which is the sum of the times, of a pipeline's bubble and of this.
    """

    time_s: float
    compute_s: float
    comm_s: float
    optimizer_s: float
    memory_bytes: int
    memory_parts: Mapping[str, int] = field(default_factory=dict)
    comm_bytes: Mapping[str, int] = field(default_factory=dict)
    kernels_s: float = 0.0


@dataclass(frozen=True)
class Alternative:
    """A candidate that was not chosen, and why."""

    name: str
    mesh: str
    time_s: float | None
    memory_bytes: int | None
    why: str


@dataclass(frozen=True)
class Storage:
    """How a parameter is stored between steps.

    `sharding` is the text of a `Sharding`; `regather` says that a gathered copy is dropped after
    the forward and gathered again in the backward (ZeRO-3), not kept (ZeRO-2). `type` (`f32[8, 4]`)
    is the whole parameter's, `local_bytes` what the device with the largest piece stores; both are
    for people. `stages` are the coordinates on `pp` that use the parameter, in order: the first one
    stores it; empty where there is no pipeline.
    """

    sharding: str
    regather: bool = False
    type: str = ""
    local_bytes: int = 0
    stages: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recompute:
    """Activation checkpointing of a repeated block.

    `block` is the first node of its first copy in the captured graph, as `find_blocks` has it. The
    backward runs the first `full` of the `copies` again as a whole, of the next `selective` ones
    all but matrix products and attention, and none of the rest.
    """

    block: str
    copies: int
    full: int = 0
    selective: int = 0


@dataclass(frozen=True)
class Pipeline:
    """How the model is cut into stages along `pp`, the first (outermost) axis of the mesh.

    `schedule` is one of `cost.schedules.KINDS`. `cuts` are the first nodes (names in the captured
    graph) of all pieces but the first, in graph order; there are `chunks` pieces per stage, and
    piece `i` runs on coordinate `i % stages` of `pp`.
    """

    schedule: str
    cuts: tuple[str, ...]
    chunks: int = 1

    @property
    def pieces(self) -> int:
        return len(self.cuts) + 1

    def __str__(self) -> str:
        return f"{self.schedule}, {self.pieces} pieces from {', '.join(self.cuts)}"


@dataclass(frozen=True)
class Activation:
    """How an op runs and what it gives, for people: one line per op of a repeated block.

    `module` has the indices of repeated layers collapsed (`layers.{0..5}.attn`), `splits` is what
    the mesh axes split (`dp:0 tp:sum`: dp dim 0 of the output, tp a dim that is summed over) and
    `rule` the op's rule; `type` and `sharding` are the output's.
    """

    op: str
    module: str
    source: str
    count: int
    rule: str
    splits: str
    type: str
    sharding: str
    local_bytes: int


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind on one mesh axis for one purpose, for people.

    `count` of them per step (before bucketing), in which one device sends `sent_bytes`.
    """

    collective: str
    axis: str
    purpose: str
    count: int
    sent_bytes: int


@dataclass(frozen=True)
class HintPrice:
    """A hint that the plan keeps, as a file of hints has it, and what the best plan without takes.

    An empty `hint` is all of them together. Seconds per step and bytes; None where not known.
    """

    hint: Mapping[str, Any]
    time_s: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class ModelPart:
    """Ops of the planned model, in order: those of `copies` blocks that do the same.

    `module` names the blocks (`layers.{0..5}`; "": all ops outside of blocks), an op reads
    `gelu(%)  model.py:31`. For telling how another model differs.
    """

    module: str
    copies: int
    ops: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that the lowering needs beside the captured graph.

    `choices[node][axis]` is what an op does on a mesh axis (the text of a `Choice`; absent: it
    runs replicated). `params[name]` is keyed by the parameter's first fully qualified name.
    `hints` are the sizes of the captured symbols for which the plan was made, `gap` is how far the
    solver was from proving it the best of its kind (0.01: one percent). `activations` and `traffic`
    describe the plan for people; nothing is read back from them. A step runs `micro_batches`
    forwards and backwards, with a `pipeline` through its stages; `memory_limit` is the bytes per
    device that the plan was made for, `timeline` its simulated step. `kernels` are where it uses
    kernels of autopar's own.
    """

    fingerprint: str
    mesh: Mesh
    cluster: str
    strategy: str
    choices: Mapping[str, Mapping[str, str]]
    params: Mapping[str, Storage]
    predicted: Prediction
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()
    hints: Mapping[str, int] = field(default_factory=dict)
    gap: float = 0.0
    recompute: tuple[Recompute, ...] = ()
    activations: tuple[Activation, ...] = ()
    traffic: tuple[Traffic, ...] = ()
    micro_batches: int = 1
    memory_limit: float | None = None
    timeline: TimelineSummary | None = None
    hinted: tuple[HintPrice, ...] = ()
    model: tuple[ModelPart, ...] = ()
    pipeline: Pipeline | None = None
    kernels: tuple[KernelUse, ...] = ()
    version: int = VERSION

    @property
    def world_size(self) -> int:
        return self.mesh.size

    @property
    def stages(self) -> int:
        """Stages of the pipeline; 1 where there is none."""
        return self.mesh.axes[0].size if self.pipeline is not None else 1

    @property
    def stage_mesh(self) -> Mesh:
        """The mesh inside of one stage: the plan's own without `pp`."""
        return Mesh(self.mesh.axes[1:]) if self.pipeline is not None else self.mesh

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all; raises UserError if it cannot be written."""
        try:
            replace_file(Path(path), self.to_json() + "\n")
        except OSError as error:
            raise UserError(f"cannot write the plan: {error.strerror}", where=str(path)) from None

    def check(self, fingerprint: str, world_size: int | None = None) -> None:
        """Raise UserError if the plan is for another model or another number of devices."""
        if self.fingerprint != fingerprint:
            raise UserError(
                "the plan was made for another model (or for another version of this one): "
                f"its fingerprint is {self.fingerprint[:12]}, the model's is {fingerprint[:12]}",
                fix="make a new plan with `autopar plan`, or load the model the plan was made for",
            )
        if world_size is not None and self.world_size != world_size:
            raise UserError(
                f"the plan is for {self.world_size} devices ({self.mesh}), "
                f"and {world_size} processes were started",
                fix=f"start {self.world_size} processes, or plan for {world_size}",
            )
