"""A plan: where every tensor lives and what every op splits, with its predicted cost.

Plans are JSON files: versioned, bound to a captured graph by its fingerprint, checked on load.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from dataclasses import fields as fields_of
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .cost.schedules import Schedule
from .cost.timeline import TimelineSummary
from .errors import UserError
from .files import replace_file
from .ir.mesh import Axis, Mesh
from .ir.text import parse_sharding
from .kernel_use import KERNELS, ON_AXES, KernelUse

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

VERSION = 3
PIPELINE_AXIS = "pp"  # the outermost mesh axis of a plan with a pipeline
MICRO_BATCH_AXIS = "mb"  # the virtual axis along which micro-batches follow each other
T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of one training step on the slowest device: that of its simulated timeline.

    Times in seconds, memory in bytes; `comm_s` is the communication that compute waits for, and
    `memory_bytes` the peak. `comm_bytes` is what one device sends per step, per
    collective name.
    """

    time_s: float
    compute_s: float
    comm_s: float
    optimizer_s: float
    memory_bytes: int
    memory_parts: Mapping[str, int] = field(default_factory=dict)
    comm_bytes: Mapping[str, int] = field(default_factory=dict)


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


def plan_from_json(text: str, where: str = "plan") -> Plan:
    """Read a plan; raises UserError if it is truncated, of another version or malformed."""
    fix = "make it again with `autopar plan ... --json FILE`"
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"the plan file is not complete JSON ({error.msg} at line {error.lineno})",
            where=where,
            fix=fix,
        ) from None
    if not isinstance(raw, dict) or "version" not in raw:
        raise UserError("the file is not an autopar plan", where=where, fix=fix)
    if raw["version"] != VERSION:
        raise UserError(
            f"the plan file has version {raw['version']}, this autopar reads version {VERSION}",
            where=where,
            fix=fix,
        )
    try:
        return _build(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the plan file lacks or misspells something ({type(error).__name__}: {error})",
            where=where,
            fix=fix,
        ) from None


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Load a plan file; raises UserError if it cannot be read."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the plan file: {error}", where=str(path)) from None
    return plan_from_json(text, where=str(path))


def _build(raw: dict[str, Any]) -> Plan:
    fields = dict(raw)
    fields["mesh"] = Mesh(
        tuple(
            Axis(
                str(a["name"]), _positive(a["size"], f"the mesh axis {a['name']}"), int(a["level"])
            )
            for a in raw["mesh"]["axes"]
        )
    )
    fields["params"] = {
        str(name): _storage(str(name), storage) for name, storage in raw["params"].items()
    }
    fields["choices"] = {
        str(node): {str(axis): str(choice) for axis, choice in chosen.items()}
        for node, chosen in raw["choices"].items()
    }
    fields["predicted"] = _checked(Prediction(**raw["predicted"]))
    fields["alternatives"] = tuple(_checked(Alternative(**a)) for a in raw["alternatives"])
    fields["notes"] = tuple(map(str, raw["notes"]))
    fields["recompute"] = tuple(_recompute(r) for r in raw["recompute"])
    fields["activations"] = tuple(_checked(Activation(**a)) for a in raw["activations"])
    fields["traffic"] = tuple(_checked(Traffic(**t)) for t in raw["traffic"])
    fields["model"] = tuple(
        _checked(ModelPart(p["module"], p["copies"], tuple(map(str, p["ops"]))))
        for p in raw["model"]
    )
    fields["hinted"] = tuple(_checked(HintPrice(**h)) for h in raw["hinted"])
    fields["micro_batches"] = _positive(raw["micro_batches"], "micro_batches")
    if raw["pipeline"] is not None:
        cuts = tuple(map(str, raw["pipeline"]["cuts"]))
        fields["pipeline"] = _checked(Pipeline(**{**raw["pipeline"], "cuts": cuts}))
    if raw["timeline"] is not None:
        fields["timeline"] = TimelineSummary.from_json(raw["timeline"])
    fields["kernels"] = _kernel_uses(raw.get("kernels", []))
    for name in sorted(set(Plan.__dataclass_fields__) - set(fields)):
        raise KeyError(name)
    plan = _checked(Plan(**fields))
    _check_names(plan)
    _check_pipeline(plan)
    return plan


_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
}


def _checked(record: T) -> T:
    """The same record; raises TypeError where a plain field has a value of another type."""
    for field_ in fields_of(record):
        kind, value = _TYPES.get(str(field_.type)), getattr(record, field_.name)
        if kind is not None and not isinstance(value, kind):
            raise TypeError(f"{field_.name} is {value!r}, not {field_.type}")
    return record


def _recompute(raw: dict[str, Any]) -> Recompute:
    made = _checked(Recompute(**raw))
    if min(made.full, made.selective) < 0 or made.full + made.selective > made.copies:
        raise ValueError(f"recompute: {made.full} + {made.selective} of {made.copies} copies")
    return made


def _kernel_uses(raw: Any) -> tuple[KernelUse, ...]:
    if not isinstance(raw, list) or not all(isinstance(use, dict) for use in raw):
        raise ValueError(f"kernels is {raw!r}, not a list of entries")
    return tuple(map(_kernel_use, raw))


def _kernel_use(raw: dict[str, Any]) -> KernelUse:
    where = raw["where"]
    if not isinstance(where, (list, tuple)) or not all(isinstance(w, str) for w in where):
        raise ValueError(f"kernels: where is {where!r}, not a list of names")
    made = _checked(KernelUse(**{**raw, "where": tuple(where)}))
    if made.kernel not in KERNELS:
        raise ValueError(f"kernels: unknown kernel {made.kernel!r}; there are {', '.join(KERNELS)}")
    _positive(made.count, f"kernels: the count of {made.kernel}")
    if not (math.isfinite(made.time_s) and math.isfinite(made.unfused_s)):
        raise ValueError(f"kernels: a time of {made.kernel} is not finite")
    return made


def _storage(name: str, raw: dict[str, Any]) -> Storage:
    stages = raw.get("stages", ())
    if not all(isinstance(s, int) and s >= 0 for s in stages) or len(set(stages)) < len(stages):
        raise ValueError(f"params: {name}: stages is {stages!r}, not different stage numbers")
    return _checked(Storage(**{**raw, "stages": tuple(stages)}))


def _check_pipeline(plan: Plan) -> None:
    """Raise ValueError where the pipeline does not go with the mesh, the choices or the storage."""
    pipeline, names = plan.pipeline, plan.mesh.names
    if pipeline is None:
        if PIPELINE_AXIS in names:
            raise ValueError(f"the mesh has the axis {PIPELINE_AXIS}, and there is no pipeline")
    elif names[:1] != (PIPELINE_AXIS,):
        raise ValueError(
            f"the first mesh axis of a pipeline is {PIPELINE_AXIS}: it has {plan.mesh}"
        )
    else:
        try:
            schedule = Schedule(plan.stages, pipeline.chunks, pipeline.schedule)
        except UserError as error:
            raise ValueError(f"pipeline: {error.what}") from None
        if pipeline.pieces != schedule.stages * schedule.chunks or "" in pipeline.cuts:
            raise ValueError(
                f"pipeline: {len(pipeline.cuts)} cuts make {pipeline.pieces} pieces, and "
                f"{schedule} have {schedule.stages * schedule.chunks}"
            )
        if len(set(pipeline.cuts)) < len(pipeline.cuts):
            raise ValueError("pipeline: two cuts are at the same node")
    if MICRO_BATCH_AXIS in names:
        raise ValueError(f"a mesh axis is called {MICRO_BATCH_AXIS}, as micro-batches are")
    for node, chosen in plan.choices.items():
        if PIPELINE_AXIS in chosen:
            raise ValueError(f"{node} splits something on {PIPELINE_AXIS}, which stages are on")
    for name, stored in plan.params.items():
        _check_stages(name, stored, plan)


def _check_stages(name: str, stored: Storage, plan: Plan) -> None:
    sharding = parse_sharding(stored.sharding)
    if PIPELINE_AXIS in {*sharding.used_axes(), *sharding.varying}:
        raise ValueError(f"params: {name} is split on {PIPELINE_AXIS}: use `stages` instead")
    if (plan.pipeline is None) != (not stored.stages):
        raise ValueError(
            f"params: {name} is on no stage"
            if plan.pipeline
            else f"params: {name} is on the stages {list(stored.stages)}, and there is no pipeline"
        )
    if stored.stages and max(stored.stages) >= plan.stages:
        raise ValueError(
            f"params: {name} is on stage {max(stored.stages)} of {plan.stages} stages, from 0"
        )


def _check_names(plan: Plan) -> None:
    """Raise ValueError where a sharding cannot be read or an axis is not one of the mesh."""
    axes = set(plan.mesh.names)
    if len(axes) != len(plan.mesh.axes):
        raise ValueError(f"two mesh axes have one name: {', '.join(plan.mesh.names)}")
    for name, stored in plan.params.items():
        try:
            sharding = parse_sharding(stored.sharding)
        except ValueError as error:
            raise ValueError(f"params: {name}: sharding {stored.sharding!r}: {error}") from None
        _check_axes(name, {*sharding.used_axes(), *sharding.varying}, axes)
    for node, chosen in plan.choices.items():
        _check_axes(node, set(chosen), axes)
    for use in plan.kernels:
        if use.kernel in ON_AXES:
            _check_axes(f"kernels: {use.kernel}", set(use.where), axes)


def _check_axes(of: str, used: set[str], axes: set[str]) -> None:
    if used - axes:
        has = ", ".join(sorted(axes))
        raise ValueError(
            f"{of} names the axis {min(used - axes)!r}, which the mesh lacks: it has {has}"
        )


def _positive(value: Any, what: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} is {value!r}, not a positive number")
    return value
