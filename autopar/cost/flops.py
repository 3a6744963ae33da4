"""Matrix work of an op: flops, and the dims of its products.

Plain arithmetic on shapes; a multiply-add counts as 2 flops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .families import canonical_name, op_family
from .local_op import LocalOp, Shape, TensorSpec, numel


def einsum_sizes(equation: str, shapes: Sequence[Shape]) -> dict[str, Any]:
    """Size of every letter of an einsum; the dims of `...` get digits."""
    left = equation.replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, Any] = {}
    for term, shape in zip(left, shapes, strict=False):
        head, dots, tail = term.partition("...")
        spare = len(shape) - len(head) - len(tail)
        letters = [*head, *(str(i) for i in range(spare) if dots), *tail]
        sizes.update(zip(letters, shape, strict=False))
    return sizes


def matmul_dims(op: LocalOp) -> tuple[Any, Any, Any, Any]:
    """(batch, m, n, k) of a matmul-like op; attention as q·kᵀ, einsum as a sum over letters."""
    name = canonical_name(op.name)
    if name == "einsum":
        return _einsum_dims(op)
    if name == "scaled_dot_product_attention":
        q, k = op.inputs[0].shape, op.inputs[1].shape
        return numel(q[:-2]), q[-2], k[-2], q[-1]
    first = 1 if name in ("addmm", "baddbmm", "addmv") else 0
    a, b = op.inputs[first].shape, op.inputs[first + 1].shape
    if name == "linear":
        return 1, numel(a[:-1]), (b[0] if len(b) == 2 else 1), a[-1]
    if len(b) == 1:
        return 1, numel(a[:-1]), 1, a[-1]
    if len(b) == 2:
        return 1, numel(a[:-1]), b[-1], a[-1]
    m = a[-2] if len(a) > 1 else 1
    return numel(op.outputs[0].shape[:-2]) if len(a) > 1 else numel(b[:-2]), m, b[-1], a[-1]


def contractions(op: LocalOp) -> tuple[LocalOp, ...]:
    """The products of two operands that an einsum of more runs as, from left to right.

    Letters that neither a later operand nor the result has are summed at once.
    """
    equation = str(op.info["equation"]).replace(" ", "")
    left, _, out = equation.partition("->")
    sizes = einsum_sizes(equation, [spec.shape for spec in op.inputs])
    letters = {token: token for token in sizes}
    spare = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    for token in sizes:  # the dims of `...` are digits there
        if token.isdigit():
            letters[token] = next(c for c in spare if c not in sizes)
    dots = "".join(letters[token] for token in sizes if token.isdigit())
    terms = [term.replace("...", dots) for term in left.split(",")]
    out = out.replace("...", dots)
    sizes = {letters[token]: size for token, size in sizes.items()}
    found: list[LocalOp] = []
    first, spec = terms[0], op.inputs[0]
    wanted = op.grads or (True,) * len(op.inputs)
    grad = wanted[0]
    for i, term in enumerate(terms[1:], 1):
        later = set(out).union(*terms[i + 1 :])
        made = "".join(c for c in dict.fromkeys(first + term) if c in later)
        last = i == len(terms) - 1
        result = TensorSpec(tuple(sizes[c] for c in made), op.outputs[0].dtype)
        info = {"equation": f"{first},{term}->{out if last else made}"}
        found.append(
            LocalOp(
                op.name,
                (spec, op.inputs[i]),
                (op.outputs[0] if last else result,),
                (grad, wanted[i]),
                info,
            )
        )
        first, spec, grad = made, result, grad or wanted[i]
    return tuple(found)


def _einsum_dims(op: LocalOp) -> tuple[Any, Any, Any, Any]:
    equation = str(op.info["equation"]).replace(" ", "")
    sizes = einsum_sizes(equation, [spec.shape for spec in op.inputs])
    if len(op.inputs) != 2:
        return 1, numel(list(sizes.values())), 1, 1
    left, _, out = equation.partition("->")
    terms = [
        set(term.replace("...", "")) | {s for s in sizes if s.isdigit() and "..." in term}
        for term in left.split(",")
    ]
    kept = set(out.replace("...", "")) | {s for s in sizes if s.isdigit() and "..." in out}

    def size(letters: set[str]) -> Any:
        return numel([sizes[letter] for letter in sorted(letters)])

    both = terms[0] & terms[1]
    return (
        size(both & kept),
        size(terms[0] - terms[1]),
        size(terms[1] - terms[0]),
        size(both - kept),
    )


def op_flops(op: LocalOp) -> Any:
    """Flops of the forward; 0 for what is not matrix work (its time is in bytes)."""
    family = op_family(op.name)
    if family == "matmul":
        if len(op.inputs) > 2 and canonical_name(op.name) == "einsum":
            return sum((op_flops(pair) for pair in contractions(op)), start=0)
        batch, m, n, k = matmul_dims(op)
        return 2 * batch * m * n * k
    if family == "attention":
        batch, m, n, k = matmul_dims(op)
        return 2 * batch * m * n * (k + op.inputs[2].shape[-1])
    if family == "conv":
        weight = op.inputs[1].shape
        transposed = op.info.get("transposed") or op.name.startswith("conv_transpose")
        pixels = op.inputs[0].numel if transposed else op.outputs[0].numel
        return 2 * pixels * numel(weight[1:])
    return 0
