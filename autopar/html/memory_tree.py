"""Memory of one device as a tree: the parts of the prediction, their modules, their layers.

A plan says how large each part is, and how large every parameter and every op's output is on a
device. Within a part, the share of a module is estimated from those.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from autopar.cost.families import op_family
from autopar.plan import Plan
from autopar.units import bytes_text

from .markup import Markup, element, join, table
from .modules import ParameterGroup, copies, module_of, parameter_groups, split_block
from .treemap import Tree, treemap

_STATE = "parameters, gradients, optimizer state"
_SIZES = re.compile(r"\w*?(\d+)\[([\d, ]*)\]")

Shares = Mapping[str, float]  # of a part, by collapsed module


@dataclass(frozen=True)
class _Sources:
    """What the share of a module in a part can be estimated from."""

    stored: Shares
    whole: Shares
    outputs: Shares


def memory_section(plan: Plan) -> Markup:
    """Treemap and table of the predicted memory of the most loaded device."""
    trees = memory_trees(plan)
    if not trees:
        return element("p", "This plan carries no parts of its memory.", class_="absent")
    total = bytes_text(plan.predicted.memory_bytes)
    rows = [
        (tree.name, module.name, module.detail, f"{module.value / _sum(trees):.1%}")
        for tree in trees
        for module in tree.children or (tree,)
    ]
    return join(
        [
            treemap(trees, 960, 420, f"Treemap of the memory of one device, {total} in all"),
            element("p", class_="tip", aria_live="polite"),
            element(
                "p",
                "The areas of parts are predicted. Within gradients, optimizer state, gathered "
                "parameters and activations the share of a module is an estimate: by the bytes of "
                "its parameters, or of its ops' outputs.",
                class_="small",
            ),
            element(
                "details",
                element("summary", "The same as a table"),
                table(
                    "Memory of one device by part and module",
                    ("part", "module", ">bytes", ">share"),
                    rows,
                ),
            ),
        ]
    )


def memory_trees(plan: Plan) -> list[Tree]:
    """A tree per part of the predicted memory: part, block or top module, module inside."""
    sources = _sources(plan)
    parts = dict(plan.predicted.memory_parts)
    if _STATE in parts:
        whole = parts.pop(_STATE)
        stored = min(whole, int(sum(sources.stored.values())))
        parts = {
            "parameters": stored,
            "gradients and optimizer state": whole - stored,
            **parts,
        }
    found = [_tree(name, size, sources) for name, size in parts.items() if size > 0]
    return sorted(found, key=lambda tree: -tree.value)


def _sum(trees: Iterable[Tree]) -> float:
    return sum(tree.value for tree in trees) or 1.0


def _sources(plan: Plan) -> _Sources:
    groups = parameter_groups(plan)
    outputs: dict[str, float] = {}
    for a in plan.activations:
        if op_family(a.op) != "view":
            module = a.module or a.op
            outputs[module] = outputs.get(module, 0.0) + float(a.local_bytes) * a.count
    return _Sources(
        _by_module(groups, lambda g: float(g.local_bytes)),
        _by_module(groups, lambda g: _gathered_bytes(g)),
        outputs,
    )


def _by_module(
    groups: Iterable[ParameterGroup], size: Callable[[ParameterGroup], float]
) -> dict[str, float]:
    found: dict[str, float] = {}
    for group in groups:
        module = module_of(group.name)
        found[module] = found.get(module, 0.0) + size(group)
    return found


def _gathered_bytes(group: ParameterGroup) -> float:
    """Bytes of the whole parameters if they are stored in pieces and their copies are kept."""
    match = _SIZES.fullmatch(group.stored.type)
    split = any(c.isalpha() for c in group.stored.sharding.partition("]")[0])
    if match is None or not split or group.stored.regather:
        return 0.0
    numel = math.prod(int(size) for size in match[2].split(",") if size.strip())
    return float(numel * int(match[1]) // 8 * len(group.names))


def _tree(name: str, size: float, sources: _Sources) -> Tree:
    shares: Shares = {}
    if "gathered" in name:
        shares = sources.whole
    elif "activation" in name:
        shares = sources.outputs
    elif any(word in name for word in ("parameter", "gradient", "optimizer")):
        shares = sources.stored
    total = sum(shares.values())
    if total <= 0:
        return Tree(name, size, detail=bytes_text(size))
    blocks: dict[str, list[Tree]] = {}
    for module, share in shares.items():
        value = size * share / total
        block, inside = split_block(module)
        top = f"{block}" if block else module.partition(".")[0]
        inner = inside if block else module.partition(".")[2]
        if value > 0:
            blocks.setdefault(top, []).append(
                Tree(inner or "(own)", value, detail=bytes_text(value))
            )
    children = [_module(block, leaves) for block, leaves in blocks.items()]
    return Tree(
        name,
        size,
        tuple(sorted(children, key=lambda tree: -tree.value)),
        bytes_text(size),
    )


def _module(name: str, leaves: list[Tree]) -> Tree:
    value = _sum(leaves)
    number = copies(name)
    detail = bytes_text(value)
    if number > 1:
        detail += f" ({number} × {bytes_text(value / number)})"
    only = len(leaves) == 1 and leaves[0].name == "(own)"
    return Tree(name, value, () if only else tuple(leaves), detail)
