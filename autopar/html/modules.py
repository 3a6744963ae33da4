"""The modules of a plan: which belong to a repeated block, and how often it is repeated."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autopar.passes.describe import collapse, pattern
from autopar.plan import Activation, Plan, Storage

_LAYERS = re.compile(r"\{([^}]*)\}")


def split_block(module: str) -> tuple[str, str]:
    """(`layers.{0..5}`, `attn.query`) of `layers.{0..5}.attn.query`; ("", module) without layers.

    The outermost numbers count: the experts of a layer are inside its block.
    """
    match = _LAYERS.search(module)
    if match is None:
        return "", module
    return module[: match.end()], module[match.end() :].lstrip(".")


def copies(block: str) -> int:
    """How many layers the braces of a collapsed name stand for: 7 of `layers.{0..5,8}`."""
    match = _LAYERS.search(block)
    if match is None:
        return 1
    total = 0
    for span in match[1].split(","):
        first, dots, last = span.partition("..")
        if not (first.isdigit() and (not dots or last.isdigit())):
            return 1
        total += int(last) - int(first) + 1 if dots else 1
    return max(1, total)


@dataclass(frozen=True)
class Block:
    """Consecutive ops of one repeated block (`name` is `layers.{0..5}`), or between blocks ("")."""

    name: str
    ops: tuple[Activation, ...]

    @property
    def copies(self) -> int:
        return copies(self.name)

    @property
    def title(self) -> str:
        """The block's name, or the modules that the ops between two blocks are in."""
        if self.name:
            return self.name
        modules = list(dict.fromkeys(a.module or a.op for a in self.ops if a.module))
        modules = modules or list(dict.fromkeys(a.op for a in self.ops))
        return ", ".join(modules[:3]) + (", …" if len(modules) > 3 else "")


def blocks_of(activations: Iterable[Activation]) -> list[Block]:
    """The model in forward order, each repeated block once."""
    runs = itertools.groupby(activations, key=lambda a: split_block(a.module)[0])
    return [Block(name, tuple(ops)) for name, ops in runs]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of the same place in repeated layers that are stored alike."""

    name: str
    names: tuple[str, ...]
    stored: Storage

    @property
    def local_bytes(self) -> int:
        return self.stored.local_bytes * len(self.names)


def parameter_groups(plan: Plan) -> list[ParameterGroup]:
    """The plan's parameters, collapsed over layers."""
    groups: dict[tuple[str, Storage], list[str]] = {}
    for name, stored in plan.params.items():
        groups.setdefault((pattern(name), stored), []).append(name)
    return [
        ParameterGroup(collapse(names), tuple(names), stored)
        for (_, stored), names in groups.items()
    ]


def module_of(parameter: str) -> str:
    """`layers.{0..5}.attn.query` of `layers.{0..5}.attn.query.weight`."""
    module, _, name = parameter.rpartition(".")
    return module or name


def main_file(activations: Sequence[Activation]) -> str:
    """The source file of most ops, "" if no op has a source."""
    files = [a.source.rpartition(":")[0] for a in activations if a.source]
    return max(dict.fromkeys(files), key=files.count) if files else ""
