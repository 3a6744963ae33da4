"""Views and copies that rearrange dims: compound factors where sizes allow, whole where not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy
import torch

from autopar.ir.graph import Size, values_of
from autopar.ir.rule import ShardingRule

from .common import (
    Handler,
    Spec,
    all_whole,
    arguments,
    broadcast,
    dim_index,
    dim_indices,
    hold,
    input_value,
    is_one,
    letters,
    named_inputs,
    output,
    rule,
    same,
    take,
    words,
)


def quotient(a: Size, b: Size) -> Size | None:
    """`a / b` if it is an integer for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    ratio = sympy.sympify(a) / sympy.sympify(b)
    if sympy.denom(ratio) != 1:
        ratio = sympy.cancel(ratio)
    if sympy.denom(ratio) != 1 or not ratio.is_polynomial(*ratio.free_symbols):
        return None
    return int(ratio) if ratio.is_Integer else ratio


def match_dims(left: Sequence[Size], right: Sequence[Size]) -> tuple[Spec, Spec]:
    """Specs of the two shapes of a view, whose sizes have equal products.

    Walks both shapes from the front and then from the back, cutting off the smaller of the two
    sizes as a factor as long as it divides the larger; what is left in the middle is whole.
    """
    names = letters()
    shapes = (list(left), list(right))
    if any(same(size, 0) for size in (*left, *right)):
        return [f"[{f}]" for f in take(names, len(left))], [
            f"[{f}]" for f in take(names, len(right))
        ]
    # Per dim: factors cut from its front, size that remains, factors cut from its back.
    front: tuple[list[Spec], list[Spec]] = ([[] for _ in left], [[] for _ in right])
    back: tuple[list[Spec], list[Spec]] = ([[] for _ in left], [[] for _ in right])

    def walk(found: tuple[list[Spec], list[Spec]], backwards: bool) -> None:
        order = [[i for i, size in enumerate(s) if not is_one(size)] for s in shapes]
        while order[0] and order[1]:
            i, j = (o[-1 if backwards else 0] for o in order)
            a, b = shapes[0][i], shapes[1][j]
            left_over, right_over = quotient(a, b), quotient(b, a)
            if left_over is None and right_over is None:
                return
            name = next(names)
            found[0][i].append(name)
            found[1][j].append(name)
            shapes[0][i] = 1 if left_over is None else left_over
            shapes[1][j] = 1 if right_over is None else right_over
            for side, at in ((0, i), (1, j)):
                if is_one(shapes[side][at]):
                    order[side].remove(at)

    walk(front, backwards=False)
    walk(back, backwards=True)
    specs: list[Spec] = []
    for side in (0, 1):
        spec: Spec = []
        for head, rest, tail in zip(front[side], shapes[side], back[side], strict=True):
            middle = [] if is_one(rest) else [f"[{next(names)}]"]
            parts = [*head, *middle, *reversed(tail)]
            spec.append(
                "1" if not parts else parts[0] if len(parts) == 1 else f"({''.join(parts)})"
            )
        specs.append(spec)
    return specs[0], specs[1]


def compound(parts: Spec) -> str:
    """One dim made of the given factors."""
    return "1" if not parts else parts[0] if len(parts) == 1 else f"({''.join(parts)})"


def view(node: torch.fx.Node) -> ShardingRule:
    """Any reshape: `b(hd)->bhd`, `bsd->(bs)d`."""
    before, after = match_dims(input_value(node, "self").shape, output(node).shape)
    return rule(node, {"self": before, "other": after}, after, linear=["self"])


def view_dtype(node: torch.fx.Node) -> ShardingRule:
    """`x.view(shape)`, or a reinterpretation of bits as another dtype (last dim may change)."""
    if "dtype" not in arguments(node):
        return view(node)
    x, out = input_value(node, "self"), output(node)
    names = letters()
    before = take(names, x.rank)
    if not same(x.shape[-1] if x.rank else 1, out.shape[-1] if out.rank else 1):
        return rule(node, {"self": hold(before, [x.rank - 1])}, [*before[:-1], f"[{next(names)}]"])
    return rule(node, {"self": before}, before)


def reorder(order: Callable[[torch.fx.Node, int], list[int]]) -> Handler:
    """Handler of a permutation; `order(node, rank)` lists the input dim of each output dim."""

    def handler(node: torch.fx.Node) -> ShardingRule:
        names = take(letters(), output(node).rank)
        name = named_inputs(node)[0].name
        dims = order(node, len(names))
        return rule(node, {name: names}, [names[i] for i in dims], linear=[name])

    return handler


def permuted(node: torch.fx.Node, rank: int) -> list[int]:
    """`permute(dims)`."""
    return [dim_index(d, rank) for d in arguments(node)["dims"]]


def transposed(node: torch.fx.Node, rank: int) -> list[int]:
    """`transpose(dim0, dim1)`."""
    args = arguments(node)
    keys = [("dim0", "dim1"), ("axis0", "axis1")]
    a, b = next((args[p], args[q]) for p, q in keys if p in args)
    order = list(range(rank))
    if rank:
        i, j = dim_index(a, rank), dim_index(b, rank)
        order[i], order[j] = order[j], order[i]
    return order


def last_swapped(node: torch.fx.Node, rank: int) -> list[int]:
    """`t()` of a matrix, `mT` of a batch of them."""
    return [*range(rank - 2), rank - 1, rank - 2] if rank > 1 else list(range(rank))


def all_reversed(node: torch.fx.Node, rank: int) -> list[int]:
    """`x.T`."""
    return list(reversed(range(rank)))


def moved(node: torch.fx.Node, rank: int) -> list[int]:
    """`movedim(source, destination)`."""
    args = arguments(node)
    source, target = dim_indices(args["source"], rank), dim_indices(args["destination"], rank)
    placed = dict(zip(target, source, strict=True))
    rest = iter(d for d in range(rank) if d not in source)
    return [placed[d] if d in placed else next(rest) for d in range(rank)]


def expand(node: torch.fx.Node) -> ShardingRule:
    """`b1->bn`: a broadcast dim is a new factor, which each device makes in its size."""
    out = output(node)
    names = take(letters(), out.rank)
    before = broadcast(names, out.shape, input_value(node, "self").shape)
    # A dim that was one and stays one has nothing to split; new dims are free.
    return rule(node, {"self": before, "other": names}, names, linear=["self"])


def repeat(node: torch.fx.Node) -> ShardingRule:
    """`a->(ra)`: the repeats are the major factor."""
    x, out = input_value(node, "self"), output(node)
    names = letters()
    before = take(names, x.rank)
    extra = out.rank - x.rank
    after = take(names, extra)
    for name, small, large in zip(before, x.shape, out.shape[extra:], strict=True):
        if same(small, large):
            after.append(name)
        elif is_one(small):
            after.append(next(names))
        else:
            after.append(f"({next(names)}{name})")
    before = [
        "1" if is_one(s) and not is_one(o) else f
        for f, s, o in zip(before, x.shape, out.shape[extra:], strict=True)
    ]
    return rule(node, {"self": before}, after, linear=["self"])


def repeat_interleave(node: torch.fx.Node) -> ShardingRule:
    """`a->(ar)` for a number of repeats; a tensor of repeats makes data-dependent sizes."""
    args = arguments(node)
    x, out = (input_value(node, "self"), output(node)) if "self" in args else (None, None)
    if x is None or out is None or not isinstance(args["repeats"], int):
        return all_whole(node)
    names = letters()
    before = take(names, x.rank)
    if args["dim"] is None:
        held = [f"[{f}]" for f in before]
        return rule(node, {"self": held}, [f"[{next(names)}]"], linear=["self"])
    at = dim_index(args["dim"], x.rank)
    after = list(before)
    after[at] = f"({before[at]}{next(names)})"
    return rule(node, {"self": before}, after, linear=["self"])


def split(node: torch.fx.Node) -> ShardingRule:
    """Equal parts of a fused dim are `([t]a)->a,a,a`; unequal parts leave the dim whole."""
    name = named_inputs(node)[0].name
    x = named_inputs(node)[0].value
    at = dim_index(arguments(node).get("dim", 0), x.rank)
    names = letters()
    dims = take(names, x.rank)
    outs = values_of(node)
    sizes = [value.shape[at] for value in outs]
    if len(outs) == 1:
        return rule(node, {name: dims}, dims, linear=[name])
    if all(same(size, sizes[0]) for size in sizes[1:]):
        before = [*dims[:at], f"([{next(names)}]{dims[at]})", *dims[at + 1 :]]
        return rule(node, {name: before}, *([dims] * len(outs)), linear=[name])
    parts = [[*dims[:at], f"[{next(names)}]", *dims[at + 1 :]] for _ in outs]
    return rule(node, {name: hold(dims, [at])}, *parts, linear=[name])


def glu(node: torch.fx.Node) -> ShardingRule:
    """Two halves of a dim: `([t]a)->a`."""
    x = input_value(node, "self")
    at = dim_index(arguments(node)["dim"], x.rank)
    names = letters()
    dims = take(names, x.rank)
    before = [*dims[:at], f"([{next(names)}]{dims[at]})", *dims[at + 1 :]]
    return rule(node, {"self": before}, dims)


def drop_dim(node: torch.fx.Node) -> ShardingRule:
    """`select`, `unbind`: the dim that goes away is whole."""
    x = input_value(node, "self")
    at = dim_index(arguments(node)["dim"], x.rank)
    names = take(letters(), x.rank)
    after = [*names[:at], *names[at + 1 :]]
    return rule(
        node, {"self": hold(names, [at])}, *([after] * len(values_of(node))), linear=["self"]
    )


def cut(node: torch.fx.Node) -> ShardingRule:
    """`slice`, `narrow`: the dim is whole unless all of it is kept."""
    x, out = input_value(node, "self"), output(node)
    args = arguments(node)
    at = dim_index(args["dim"], x.rank)
    names = letters()
    dims = take(names, x.rank)
    if same(x.shape[at], out.shape[at]):
        return rule(node, {"self": dims}, dims, linear=["self"])
    after = [*dims[:at], f"[{next(names)}]", *dims[at + 1 :]]
    return rule(node, {"self": hold(dims, [at])}, after, linear=["self"])


def cat(node: torch.fx.Node) -> ShardingRule:
    """The concatenated dim is whole."""
    values = [item.value for item in named_inputs(node)]
    out = output(node)
    args = arguments(node)
    at = dim_index(args["dim"], out.rank)
    names = letters()
    dims = take(names, out.rank)
    specs = [
        [*dims[:at], f"[{next(names)}]", *dims[at + 1 :]] if value.rank == out.rank else ["1"]
        for value in values  # an old-style empty tensor has rank one
    ]
    return rule(node, {"tensors": specs}, hold(dims, [at]), linear=["tensors"])


def stack(node: torch.fx.Node) -> ShardingRule:
    """`ab,ab->a[n]b`."""
    out = output(node)
    at = dim_index(arguments(node)["dim"], out.rank)
    names = take(letters(), out.rank)
    inputs = [[*names[:at], *names[at + 1 :]]] * len(named_inputs(node))
    return rule(node, {"tensors": inputs}, hold(names, [at]), linear=["tensors"])


def put_slice(node: torch.fx.Node) -> ShardingRule:
    """`slice_scatter`, `select_scatter`: the dim written into is whole."""
    x, source = input_value(node, "self"), input_value(node, "src")
    at = dim_index(arguments(node)["dim"], x.rank)
    names = letters()
    dims = take(names, x.rank)
    part = [f"[{next(names)}]"] if source.rank == x.rank else []
    inputs = {"self": hold(dims, [at]), "src": [*dims[:at], *part, *dims[at + 1 :]]}
    return rule(node, inputs, hold(dims, [at]), linear=[("self", "src")])


def last_dims(n: int) -> Handler:
    """Handler of an op on the last `n` dims (tril: 2), which are whole; shape unchanged."""

    def handler(node: torch.fx.Node) -> ShardingRule:
        rank = output(node).rank
        names = hold(take(letters(), rank), range(max(rank - n, 0), rank))
        return rule(node, {"self": names}, names, linear=["self"])

    return handler


def along(argument: str) -> Handler:
    """Handler of a linear op that reorders elements along the dims in `argument` (flip, roll)."""

    def handler(node: torch.fx.Node) -> ShardingRule:
        rank = output(node).rank
        names = hold(take(letters(), rank), dim_indices(arguments(node)[argument], rank))
        return rule(node, {"self": names}, names, linear=["self"])

    return handler


def pad(node: torch.fx.Node) -> ShardingRule:
    """Padded dims are whole; padding with zeros is linear."""
    x = input_value(node, "self")
    args = arguments(node)
    padding: list[int] = args["pad" if "pad" in args else "padding"]
    padded = {x.rank - 1 - i // 2 for i, amount in enumerate(padding) if amount != 0}
    if args.get("mode", "constant") != "constant" or "padding" in args:
        padded = set(range(x.rank - len(padding) // 2, x.rank))
    names = letters()
    before = hold(take(names, x.rank), padded)
    after = [f"[{next(names)}]" if i in padded else f for i, f in enumerate(before)]
    passes = not args.get("value")
    return rule(node, {"self": before}, after, linear=["self"] if passes else [])


def window(node: torch.fx.Node) -> ShardingRule:
    """`x.unfold(dim, size, step)`: `a[d]b->a[n]b[w]`."""
    x = input_value(node, "self")
    at = dim_index(arguments(node)["dimension"], x.rank)
    names = letters()
    dims = hold(take(names, x.rank), [at])
    after = [*dims[:at], f"[{next(names)}]", *dims[at + 1 :], f"[{next(names)}]"]
    return rule(node, {"self": dims}, after, linear=["self"])


def diagonal(node: torch.fx.Node) -> ShardingRule:
    """`b[i][j]->b[d]`."""
    x = input_value(node, "self")
    args = arguments(node)
    at = {dim_index(args["dim1"], x.rank), dim_index(args["dim2"], x.rank)}
    names = letters()
    dims = hold(take(names, x.rank), at)
    after = [f for i, f in enumerate(dims) if i not in at]
    return rule(node, {"self": dims}, [*after, f"[{next(names)}]"], linear=["self"])


def as_complex(node: torch.fx.Node) -> str:
    """`ab[t]->ab`."""
    names = take(letters(), output(node).rank)
    text = "".join(names)
    return f"{text}[Z]->{text or '.'}; linear(0)"


def as_real(node: torch.fx.Node) -> str:
    """`ab->ab[t]`."""
    names = take(letters(), output(node).rank - 1)
    text = "".join(names)
    return f"{text or '.'}->{text}[Z]; linear(0)"


def pixel_shuffle(node: torch.fx.Node) -> ShardingRule:
    """`n(c[r][q])hw->nc(h[r])(w[q])`."""
    x = input_value(node, "self")
    names = letters()
    lead = take(names, x.rank - 3)
    c, h, w, r, q = take(names, 5)
    before = [*lead, f"({c}[{r}][{q}])", h, w]
    after = [*lead, c, f"({h}[{r}])", f"({w}[{q}])"]
    return rule(node, {"self": before}, after, linear=["self"])


def pixel_unshuffle(node: torch.fx.Node) -> ShardingRule:
    """`nc(h[r])(w[q])->n(c[r][q])hw`."""
    x = input_value(node, "self")
    names = letters()
    lead = take(names, x.rank - 3)
    c, h, w, r, q = take(names, 5)
    before = [*lead, c, f"({h}[{r}])", f"({w}[{q}])"]
    after = [*lead, f"({c}[{r}][{q}])", h, w]
    return rule(node, {"self": before}, after, linear=["self"])


RESHAPES = words(
    "reshape _unsafe_view flatten unflatten squeeze unsqueeze reshape_as view_as ravel"
)
SPLITS = words("split unsafe_split split_with_sizes chunk unsafe_chunk tensor_split")

RULES: dict[str, Handler] = {
    **{f"aten.{name}": view for name in RESHAPES},
    **{f"aten.{name}": split for name in SPLITS},
    "aten.view": view_dtype,
    "aten.permute": reorder(permuted),
    **{f"aten.{name}": reorder(transposed) for name in ("transpose", "swapaxes", "swapdims")},
    "aten.t": reorder(last_swapped),
    "aten.mT": reorder(last_swapped),
    "aten.numpy_T": reorder(all_reversed),
    "aten.movedim": reorder(moved),
    "aten.moveaxis": reorder(moved),
    "aten.expand": expand,
    "aten.expand_as": expand,
    "aten.broadcast_to": expand,
    "aten.repeat": repeat,
    "aten.tile": repeat,
    "aten.repeat_interleave": repeat_interleave,
    "aten.glu": glu,
    "aten.select": drop_dim,
    "aten.unbind": drop_dim,
    "aten.slice": cut,
    "aten.narrow": cut,
    "aten.cat": cat,
    "aten.concat": cat,
    "aten.concatenate": cat,
    "aten.stack": stack,
    "aten.slice_scatter": put_slice,
    "aten.select_scatter": put_slice,
    "autopar.slice_scatter": put_slice,
    "autopar.select_scatter": put_slice,
    "aten.tril": last_dims(2),
    "aten.triu": last_dims(2),
    "aten.flip": along("dims"),
    "aten.roll": along("dims"),
    "aten.rot90": all_whole,
    "aten.constant_pad_nd": pad,
    "aten.pad": pad,
    **{f"aten.{kind}_pad{n}d": pad for kind in ("reflection", "replication") for n in (1, 2, 3)},
    "aten.unfold": window,
    "aten.diagonal": diagonal,
    "aten.view_as_complex": as_complex,
    "aten.view_as_real": as_real,
    "aten.pixel_shuffle": pixel_shuffle,
    "aten.pixel_unshuffle": pixel_unshuffle,
}
