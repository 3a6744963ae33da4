"""Convolutions, pooling, resampling: samples and channels split, spatial dims are whole."""

from __future__ import annotations

import torch

from autopar.ir.graph import values_of
from autopar.ir.rule import ShardingRule

from .common import (
    Handler,
    Spec,
    all_whole,
    arguments,
    input_value,
    letters,
    named_inputs,
    output,
    rule,
    take,
    words,
)


def convolution(node: torch.fx.Node) -> ShardingRule:
    """`nc[h][w],oc[i][j],o->no[p][q]; linear(0) linear(1) once(2)`.

    With groups the channels are compound: `n(gc)hw,(go)cij,(go)->n(go)pq`. A transposed
    convolution's weight is `(gc)oij`.
    """
    args = arguments(node)
    weight = input_value(node, "weight")
    spatial = weight.rank - 2
    names = letters()
    n, g, c, o = take(names, 4)
    grouped = args["groups"] != 1

    def channels(f: str) -> str:
        return f"({g}{f})" if grouped else f

    lead = [n] if output(node).rank == weight.rank else []
    schema = str(node.target)
    transposed = bool(args.get("transposed", "transpose" in schema))
    window = [f"[{f}]" for f in take(names, spatial)]
    taps = [channels(c), o] if transposed else [channels(o), c]
    inputs: dict[str, Spec] = {
        "input": [*lead, channels(c), *window],
        "weight": [*taps, *(f"[{f}]" for f in take(names, spatial))],
        "bias": [channels(o)],
    }
    after = [*lead, channels(o), *(f"[{f}]" for f in take(names, spatial))]
    return rule(node, inputs, after, linear=["input", "weight"], once=["bias"])


def spatial(n: int | None, *linear: str) -> Handler:
    """Handler of an op on the last `n` dims (None: all but two): `nc[h][w]->nc[p][q]`."""

    def handler(node: torch.fx.Node) -> ShardingRule:
        item = named_inputs(node)[0]
        held = item.value.rank - 2 if n is None else n
        names = letters()
        lead = take(names, item.value.rank - held)
        before = [*lead, *(f"[{f}]" for f in take(names, held))]
        after = [*lead, *(f"[{f}]" for f in take(names, held))]
        return rule(node, {item.name: before}, *([after] * len(values_of(node))), linear=linear)

    return handler


def im2col(node: torch.fx.Node) -> ShardingRule:
    """Windows as columns (`F.unfold`): only samples split."""
    x, out = named_inputs(node)[0], output(node)
    names = letters()
    lead = take(names, 1) if out.rank == 3 else []
    before = [*lead, *(f"[{f}]" for f in take(names, x.value.rank - len(lead)))]
    after = [*lead, *(f"[{f}]" for f in take(names, out.rank - len(lead)))]
    return rule(node, {x.name: before}, after, linear=[x.name])


CONVOLUTIONS = words(
    """
conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d
"""
)
UPSAMPLES = words(
    """
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
_upsample_nearest_exact1d _upsample_nearest_exact2d
"""
)

RULES: dict[str, Handler] = {
    **{f"aten.{name}": convolution for name in CONVOLUTIONS},
    **{f"aten.max_pool{n}d": spatial(n) for n in (1, 2, 3)},
    **{f"aten.max_pool{n}d_with_indices": spatial(n) for n in (1, 2, 3)},
    **{f"aten.adaptive_max_pool{n}d": spatial(n) for n in (1, 2, 3)},
    **{f"aten.avg_pool{n}d": spatial(n, "self") for n in (1, 2, 3)},
    **{f"aten.adaptive_avg_pool{n}d": spatial(n, "self") for n in (1, 2, 3)},
    **{f"aten._adaptive_avg_pool{n}d": spatial(n, "self") for n in (2, 3)},
    **{f"aten.{name}": spatial(None) for name in UPSAMPLES},
    "aten.im2col": im2col,
    "aten.col2im": im2col,
    "aten.grid_sampler": all_whole,
}
