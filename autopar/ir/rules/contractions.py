"""Matrix products and einsum: contracted dims are sum reductions, products linear in each side."""

from __future__ import annotations

import torch

from autopar.ir.rule import ShardingRule

from .common import (
    Handler,
    Spec,
    all_whole,
    arguments,
    broadcast,
    input_value,
    is_one,
    letters,
    named_inputs,
    output,
    rule,
    take,
)


def matmul(node: torch.fx.Node) -> ShardingRule:
    """`bij,bjk->bik` for all ranks; batch dims broadcast."""
    left, right = (item.value for item in named_inputs(node))
    out = output(node)
    names = letters()
    k = next(names)
    dims = take(names, out.rank)
    batch = out.rank - (left.rank > 1) - (right.rank > 1)
    row = dims[batch : batch + 1] if left.rank > 1 else []
    column = dims[-1:] if right.rank > 1 else []
    lead = dims[:batch]
    first = [*broadcast(lead, out.shape[:batch], left.shape[:-2]), *row, k]
    second = [*broadcast(lead, out.shape[:batch], right.shape[:-2]), k, *column]
    sides = [item.name for item in named_inputs(node)]
    return rule(node, dict(zip(sides, (first, second), strict=True)), dims, linear=sides)


def added(left: str, right: str) -> Handler:
    """`self + left @ right`; the addend broadcasts, and counts once."""

    def handler(node: torch.fx.Node) -> ShardingRule:
        out = output(node)
        names = letters()
        k = next(names)
        dims = take(names, out.rank)
        batch = dims[: input_value(node, left).rank - 2]
        row = dims[len(batch) : out.rank - (input_value(node, right).rank > 1)]
        column = dims[len(batch) + 1 :]
        inputs = {
            "self": broadcast(dims, out.shape, input_value(node, "self").shape),
            left: [*batch, *row, k],
            right: [*batch, k, *column],
        }
        return rule(node, inputs, dims, linear=[left, right], once=["self"])

    return handler


def token_addmm(node: torch.fx.Node) -> ShardingRule:
    """`n,bsk,kn->bsn; linear(1) linear(2) once(0)`: `autopar.addmm`, for any rank of tokens."""
    out = output(node)
    names = letters()
    k = next(names)
    dims = take(names, out.rank)
    inputs = {
        "self": broadcast(dims, out.shape, input_value(node, "self").shape),
        "mat1": [*dims[:-1], k],
        "mat2": [k, dims[-1]],
    }
    return rule(node, inputs, dims, linear=["mat1", "mat2"], once=["self"])


def linear(node: torch.fx.Node) -> ShardingRule:
    """`bsk,nk,n->bsn; linear(0) linear(1) once(2)`."""
    out = output(node)
    weight = input_value(node, "weight")
    names = letters()
    k = next(names)
    dims = take(names, out.rank)
    column = dims[-1:] if weight.rank == 2 else []
    lead = dims[: out.rank - len(column)]
    inputs: dict[str, Spec] = {"input": [*lead, k], "weight": [*column, k], "bias": column}
    return rule(node, inputs, dims, linear=["input", "weight"], once=["bias"])


def einsum(node: torch.fx.Node) -> ShardingRule:
    """The equation is the rule; a letter twice in one operand (a diagonal) is whole."""
    args = arguments(node)
    values = [item.value for item in named_inputs(node) if item.name == "tensors"]
    left, arrow, right = args["equation"].replace(" ", "").partition("->")
    operands = left.split(",")
    if not arrow:
        once = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        right = ("..." if "." in left else "") + "".join(once)
    used = set(left) | set(right)
    spare = (c for c in letters() if c not in used)
    ranks = [v.rank - len(o.replace("...", "")) for o, v in zip(operands, values, strict=True)]
    ellipsis = take(spare, max(ranks, default=0))
    sizes: dict[str, object] = {}
    specs: list[Spec] = []
    held = {c for o in operands for c in o if c.isalpha() and o.count(c) > 1}
    for operand, rank in zip(operands, ranks, strict=True):
        head, dots, tail = operand.partition("...")
        specs.append([*head, *(ellipsis[len(ellipsis) - rank :] if dots else []), *tail])
    for spec, value in zip(specs, values, strict=True):
        for name, size in zip(spec, value.shape, strict=True):
            if not is_one(size):
                sizes[name] = size
    named = [
        [
            "1" if is_one(size) and c in sizes else f"[{c}]" if c in held else c
            for c, size in zip(spec, value.shape, strict=True)
        ]
        for spec, value in zip(specs, values, strict=True)
    ]
    head, dots, tail = right.partition("...")
    out = [f"[{c}]" if c in held else c for c in [*head, *(ellipsis if dots else []), *tail]]
    passes = " ".join(f"linear({i})" for i in range(len(values)))
    return rule(node, {"tensors": named}, out, clauses=passes)


def outer(node: torch.fx.Node) -> str:
    """Outer product of two vectors."""
    return "a,b->ab; linear(0) linear(1)"


def dot(node: torch.fx.Node) -> str:
    """Inner product of two vectors."""
    return "k,k->.; linear(0) linear(1)"


def bilinear(node: torch.fx.Node) -> ShardingRule:
    """`bi,bj,oij,o->bo`."""
    out = output(node)
    names = letters()
    i, j = take(names, 2)
    dims = take(names, out.rank)
    o = dims[-1:]
    inputs = {"input1": [*dims[:-1], i], "input2": [*dims[:-1], j], "weight": [*o, i, j], "bias": o}
    return rule(node, inputs, dims, linear=["input1", "input2", "weight"], once=["bias"])


RULES: dict[str, Handler] = {
    "aten.matmul": matmul,
    "aten.mm": matmul,
    "aten.bmm": matmul,
    "aten.mv": matmul,
    "aten.linear": linear,
    "aten.addmm": added("mat1", "mat2"),
    "autopar.addmm": token_addmm,
    "aten.addmv": added("mat", "vec"),
    "aten.baddbmm": added("batch1", "batch2"),
    "aten.einsum": einsum,
    "aten.outer": outer,
    "aten.ger": outer,
    "aten.dot": dot,
    "aten.inner": all_whole,
    "aten.bilinear": bilinear,
}
