"""Which element-wise neighbours of an op its kernel can do besides: a prologue and an epilogue."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx

from autopar.cost.families import op_name
from autopar.ir.graph import Value
from autopar.ir.lowered import CLOSE, EXCHANGE, GATHER_VARY, PVARY
from autopar.ir.pointwise import IDENTITY, Fusion, Pointwise
from autopar.ir.recomputed import SELECTIVE, mark_of

from .pointwise_of import Folded, folded, rounded

Node = torch.fx.Node

MOST_EXTRAS = 4  # tensors that a kernel reads besides: registers, and buses
MOST_STEPS = 32


@dataclass(frozen=True)
class Neighbours:
    """What goes into a kernel: its input, the further tensors, and the nodes that are then gone.

    `last` is the node whose value the kernel gives, `why` why there is no more, if that is said.
    """

    fusion: Fusion
    source: Node
    extras: tuple[Node, ...]
    absorbed: tuple[Node, ...]
    last: Node
    why: str = ""


def prologue_of(reader: Node, source: Node) -> Neighbours:
    """The element-wise ops that make `source`, as far back as nobody else reads their values."""
    program, extras = IDENTITY, tuple[Node, ...]()
    absorbed: list[Node] = []
    why = reason(reader, source)
    while not why:
        made, why = _absorbable(source, absorbed[-1] if absorbed else reader)
        if made is None:
            break
        longer = made.program.then(program)
        more = (*made.operands[1:], *extras)
        if len(longer.steps) > MOST_STEPS or len(more) > MOST_EXTRAS:
            break
        program, extras = longer, more
        absorbed.append(source)
        source = made.operands[0]
    return Neighbours(Fusion(program), source, extras, tuple(absorbed), reader, why)


def epilogue_of(made_by: Node, room: int = MOST_EXTRAS) -> Neighbours:
    """The element-wise ops that are the only readers of a value, one after the other."""
    program, extras = IDENTITY, tuple[Node, ...]()
    absorbed: list[Node] = []
    last, why = made_by, reason(made_by, made_by)
    while not why:
        if len(last.users) != 1:
            break
        user = next(iter(last.users))
        if mark_of(user) != mark_of(made_by) or user.op != "call_function":
            break
        found = folded(user, last)
        if found is None or any(map(is_parameter, found.operands[1:])):
            break
        before = program if program else rounded(IDENTITY, last.meta["value"].dtype)
        longer = before.then(found.program)
        more = (*extras, *found.operands[1:])
        if len(longer.steps) > MOST_STEPS or len(more) > room:
            break
        program, extras, last = longer, more, user
        absorbed.append(user)
    return Neighbours(Fusion(IDENTITY, program), made_by, extras, tuple(absorbed), last, why)


def reason(node: Node, source: Node) -> str:
    """Why nothing may be folded into the kernel of a node; nothing if it may be."""
    mark = mark_of(node)
    if mark is not None and mark.mode == SELECTIVE:
        return "its region is recomputed selectively, by what its ops save"
    value = source.meta.get("value")
    if isinstance(value, Value) and 0 in value.shape:
        return "it has no elements here"
    return ""


def _absorbable(node: Node, reader: Node) -> tuple[Folded | None, str]:
    """The node as a program of one of its operands, and what to say if it is none."""
    if node.op != "call_function":
        return None, ""
    operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("value"), Value)]
    # Through the operand that can be absorbed in its turn, if there is one.
    operands.sort(key=lambda n: n.op != "call_function" or len(n.users) != 1 or not _folds(n))
    made = next((f for n in operands if (f := folded(node, n)) is not None), None)
    if made is None:
        return None, ""
    if list(node.users) != [reader]:
        return None, f"the {op_name(node.target)} before it has other readers"
    if mark_of(node) != mark_of(reader):
        return None, f"the {op_name(node.target)} before it is not recomputed with it"
    if any(map(is_parameter, made.operands)):
        return None, f"the {op_name(node.target)} before it reads a parameter"
    return made, ""


def _folds(node: Node) -> bool:
    return any(folded(node, n) is not None for n in node.all_input_nodes)


def is_parameter(node: Node) -> bool:
    """Whether a value is a parameter, or one of a bucket, or gathered.

    Such may be dropped and gathered again, by what every op saves.
    """
    while node.op == "call_function" and str(getattr(node.target, "__name__", "")) == "getitem":
        node = node.args[0]  # type: ignore[assignment]
    if node.op == "placeholder":
        return node.meta.get("role") in ("param", "prepared")
    return node.target in (EXCHANGE, CLOSE) and node.args[0] in (PVARY, GATHER_VARY)


def described(fusion: Fusion | Pointwise) -> str:
    """The text of a fusion in a plan: empty where there is none."""
    if isinstance(fusion, Pointwise):
        return f"{fusion} | x" if fusion else ""
    return str(fusion) if fusion.prologue or fusion.epilogue else ""
