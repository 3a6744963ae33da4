"""A plan: where every tensor lives and what every op splits, with its predicted cost.

Plans are JSON files: versioned, bound to a captured graph by its fingerprint, checked on load.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError
from .ir.mesh import Axis, Mesh

VERSION = 1


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of one training step on the slowest device.

    Times in seconds, memory in bytes. `comm_bytes` is what one device sends per step, per
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
    the forward and gathered again in the backward (ZeRO-3), not kept (ZeRO-2).
    """

    sharding: str
    regather: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that the lowering needs beside the captured graph.

    `choices[node][axis]` is what an op does on a mesh axis (the text of a `Choice`; absent: it
    runs replicated). `params[name]` is keyed by the parameter's first fully qualified name.
    `hints` are the sizes of the captured symbols for which the plan was made.
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
    version: int = VERSION

    @property
    def world_size(self) -> int:
        return self.mesh.size

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        target = Path(path)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name)
        with os.fdopen(handle, "w") as file:
            file.write(self.to_json() + "\n")
        os.replace(name, target)

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
            f"the plan file lacks or misspells a field ({type(error).__name__}: {error})",
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
            Axis(str(a["name"]), _positive(a["size"]), int(a["level"])) for a in raw["mesh"]["axes"]
        )
    )
    fields["params"] = {name: Storage(**storage) for name, storage in raw["params"].items()}
    fields["choices"] = {
        str(node): {str(axis): str(choice) for axis, choice in chosen.items()}
        for node, chosen in raw["choices"].items()
    }
    fields["predicted"] = Prediction(**raw["predicted"])
    fields["alternatives"] = tuple(Alternative(**a) for a in raw["alternatives"])
    fields["notes"] = tuple(raw["notes"])
    return Plan(**fields)


def _positive(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"mesh axis of size {value!r}")
    return value
