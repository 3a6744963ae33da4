"""One device's call of an op: the sizes in its arguments made local, its means rescaled.

The rules in `autopar.ir.rules` say how shards recombine *if* every device calls the op on its
shards. Ops that carry sizes (`view`), counts (`mean`), groups (`conv2d`) or a number of classes
need other arguments for that; `local_call` makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.fx

from autopar.errors import PassError

from .graph import tensor_inputs, values_of
from .registry import op_name
from .rules import losses, reductions, views
from .rules.common import arguments, dim_index, named_inputs, schema_of

CONVOLUTIONS = frozenset(f"conv{n}d" for n in (1, 2, 3))

# Ops that read weights and that torch runs on no rows. They must run as such: what autograd saves
# decides when a weight is gathered again in the backward, and that must be the same everywhere.
SAVES_WEIGHTS = CONVOLUTIONS | frozenset(
    {
        *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"),
        *("layer_norm", "rms_norm", "mul", "div"),
    }
)

Shape = tuple[int, ...]
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

aten = torch.ops.aten


@dataclass(frozen=True)
class Local:
    """Local shapes of a call's tensors: inputs in `tensor_inputs` order, then outputs."""

    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]

    def of(self, node: torch.fx.Node, name: str) -> Shape:
        """Local shape of the tensor argument `name`."""
        found = named_inputs(node)
        return next(s for i, s in zip(found, self.inputs, strict=True) if i.name == name)


def local_call(
    node: torch.fx.Node,
    in_local_shapes: Sequence[Sequence[int]],
    out_local_shapes: Sequence[Sequence[int]],
) -> Call:
    """Target, args and kwargs of the call that one device makes in place of `node`.

    Shapes are those of the device's shards, of inputs in `tensor_inputs` order and of outputs. The
    node's own values give the global shapes, which must be integers. Arguments still name the
    node's inputs; a target may be a function of this module (`scaled`, `nothing`).
    Raises PassError for an op that only the runtime can run in pieces (a split vocabulary).
    """
    local = Local(tuple(map(tuple, in_local_shapes)), tuple(map(tuple, out_local_shapes)))
    whole = (
        *(values_of(source)[0].int_shape() for source in tensor_inputs(node)),
        *(value.int_shape() for value in values_of(node)),
    )
    unchanged: Call = (_target(node), node.args, dict(node.kwargs))
    if whole == (*local.inputs, *local.outputs):
        return unchanged
    if not isinstance(node.target, torch._ops.OpOverload):
        return unchanged
    name = op_name(node)
    if local.inputs and all(0 in shape for shape in local.outputs):
        if name.split(".")[1] in SAVES_WEIGHTS and not _is_strange(node, local):
            return _convolution(node, local) if _is_convolution(node) else unchanged
        return _nothing(node, local)
    handler = LOCALISE.get(name) or LOCALISE.get(name.rpartition(".")[0])
    return unchanged if handler is None else handler(node, local)


def scaled(factor: float, op: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`factor` times the op's result: a mean over some of the elements, weighted by their share.

    `op` is an overload's name, `"aten.mean.dim"`: text, so that the call prints and parses back.
    """
    target: Any = torch.ops
    for name in op.split("."):
        target = getattr(target, name)
    result: torch.Tensor = target(*args, **kwargs)
    return result * factor


def _is_convolution(node: torch.fx.Node) -> bool:
    return op_name(node).split(".")[1] in CONVOLUTIONS


def _is_strange(node: torch.fx.Node, local: Local) -> bool:
    """Whether an op that takes an empty batch is given something else that is empty."""
    if not _is_convolution(node):
        return False
    return 0 in local.of(node, "weight") or 0 in local.of(node, "input")[1:]


def nothing(
    shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], *tensors: torch.Tensor | None
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Zeros of the given shapes: what is left to do on a device whose shards have no elements.

    Still a function of `tensors` to autograd (with zero gradients), so that every device runs the
    same backward. Many ops refuse empty inputs, or give them another shape.
    """
    present = [t for t in tensors if t is not None]
    made: list[torch.Tensor] = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        zeros = present[0].new_zeros(tuple(shape), dtype=dtype)
        for tensor in present:
            if _is_differentiable(dtype) and _is_differentiable(tensor.dtype):
                part = tensor.flatten()[:0]
                real = part.real if part.is_complex() and not dtype.is_complex else part
                zeros = zeros + real.sum().to(dtype)
        made.append(zeros)
    return made[0] if len(made) == 1 else tuple(made)


def _is_differentiable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def nothing_detached(
    shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], *tensors: torch.Tensor | None
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """`nothing` of an op that autograd does not flow through: no device runs a backward of it."""
    return nothing(shapes, dtypes, *(t if t is None else t.detach() for t in tensors))


def nothing_of_some(
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[torch.dtype],
    ignored: Sequence[int],
    *tensors: torch.Tensor | None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """`nothing` of an op with inputs that autograd does not flow to: the `other` of `type_as`.

    `ignored` are their places among `tensors`.
    """
    kept = (t if t is None or i not in ignored else t.detach() for i, t in enumerate(tensors))
    return nothing(shapes, dtypes, *kept)


def _target(node: torch.fx.Node) -> Callable[..., Any]:
    if not callable(node.target):
        raise PassError("localise", "calls_functions", f"%{node.name} calls {node.target!r}")
    return node.target


def _with(node: torch.fx.Node, **changed: Any) -> Call:
    """The node's own call with other values for some arguments."""
    args = arguments(node) | changed
    schema = schema_of(node).arguments
    positional = tuple(args[a.name] for a in schema if not a.kwarg_only)
    return _target(node), positional, {a.name: args[a.name] for a in schema if a.kwarg_only}


def _nothing(node: torch.fx.Node, local: Local) -> Call:
    dtypes = [value.dtype for value in values_of(node)]
    shapes = [list(s) for s in local.outputs]
    tensors = tensor_inputs(node)
    if not any(value.requires_grad for value in values_of(node)):  # `detach`, say
        return nothing_detached, (shapes, dtypes, *tensors), {}
    ignored = [i for i, t in enumerate(tensors) if _is_ignored(node, t)]
    if ignored:
        return nothing_of_some, (shapes, dtypes, ignored, *tensors), {}
    return nothing, (shapes, dtypes, *tensors), {}


def _is_ignored(node: torch.fx.Node, source: torch.fx.Node) -> bool:
    """Whether an input has a gradient that autograd does not ask the op for."""
    value = values_of(source)[0]
    if not value.requires_grad:
        return False
    made: dict[torch.fx.Node, torch.Tensor] = {}

    def on_meta(arg: torch.fx.Node) -> torch.Tensor:
        if arg not in made:
            value = values_of(arg)[0]
            shape, wanted = value.int_shape(), arg is source
            made[arg] = torch.empty(shape, dtype=value.dtype, device="meta", requires_grad=wanted)
        return made[arg]

    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), on_meta)
    try:
        with torch.enable_grad():
            result = _target(node)(*args, **kwargs)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return False  # an op that wants values, or a device
    outputs = result if isinstance(result, tuple | list) else (result,)
    return not any(isinstance(t, torch.Tensor) and t.requires_grad for t in outputs)


def _reshape(node: torch.fx.Node, local: Local) -> Call:
    if "dtype" in arguments(node):  # a reinterpretation of bits
        return _target(node), node.args, dict(node.kwargs)
    return aten.reshape.default, (node.args[0], list(local.outputs[0])), {}


def _expand(node: torch.fx.Node, local: Local) -> Call:
    return aten.expand.default, (node.args[0], list(local.outputs[0])), {}


def _repeat(node: torch.fx.Node, local: Local) -> Call:
    before, after = local.inputs[0], local.outputs[0]
    padded = (1,) * (len(after) - len(before)) + before
    times = [a // b if b else 1 for a, b in zip(after, padded, strict=True)]
    return aten.repeat.default, (node.args[0], times), {}


def _repeat_interleave(node: torch.fx.Node, local: Local) -> Call:
    args = arguments(node)
    at = dim_index(args["dim"], len(local.inputs[0]))
    before, after = local.inputs[0][at], local.outputs[0][at]
    times = after // before if before else args["repeats"]
    return aten.repeat_interleave.self_int, (node.args[0], times, at), {}


def _split(node: torch.fx.Node, local: Local) -> Call:
    at = dim_index(arguments(node).get("dim", 0), len(local.inputs[0]))
    sizes = [shape[at] for shape in local.outputs]
    return aten.split_with_sizes.default, (node.args[0], sizes, at), {}


def _narrow(node: torch.fx.Node, local: Local) -> Call:
    at = dim_index(arguments(node)["dim"], len(local.inputs[0]))
    return _with(node, length=local.outputs[0][at])


def _fill(node: torch.fx.Node, local: Local) -> Call:
    return _with(node, size=list(local.outputs[0]))


def _one_hot(node: torch.fx.Node, local: Local) -> Call:
    return _with(node, num_classes=local.outputs[0][-1])


def _convolution(node: torch.fx.Node, local: Local) -> Call:
    args = arguments(node)
    taps = local.of(node, "weight")
    lead = len(local.outputs[0]) - len(taps) + 1
    transposed = args.get("transposed", "transpose" in op_name(node))
    channels = local.outputs[0][lead] if transposed else local.of(node, "input")[lead]
    if 0 in taps:
        return _bias_only(node, local, lead)
    return _with(node, groups=channels // taps[1])


def _bilinear(node: torch.fx.Node, local: Local) -> Call:
    if 0 not in local.of(node, "weight"):
        return _target(node), node.args, dict(node.kwargs)
    return _bias_only(node, local, len(local.outputs[0]) - 1)


def _bias_only(node: torch.fx.Node, local: Local, channel_dim: int) -> Call:
    bias = arguments(node)["bias"]
    if bias is None:
        return _nothing(node, local)
    tensors = tensor_inputs(node)
    shape = list(local.outputs[0])
    return biased, (shape, channel_dim, tensors.index(bias), *tensors), {}


def biased(shape: Sequence[int], dim: int, at: int, *tensors: torch.Tensor) -> torch.Tensor:
    """A convolution over no input channels: the bias along `dim`, still a function of `tensors`.

    The bias is `tensors[at]`: every device reads its inputs in the same order, in which overlapped
    collectives wait.
    """
    bias = tensors[at]
    zeros = nothing([shape], [bias.dtype], *tensors)
    assert isinstance(zeros, torch.Tensor)
    return zeros + bias.reshape([-1 if i == dim else 1 for i in range(len(shape))])


def _mean(node: torch.fx.Node, local: Local) -> Call:
    dims = reductions.reduced_dims(node)
    shape = values_of(tensor_inputs(node)[0])[0].int_shape()
    count = math.prod(local.inputs[0][d] for d in dims)
    total = math.prod(shape[d] for d in dims)
    if count == 0:
        op = aten.sum.dim_IntList if "dim" in arguments(node) else aten.sum.default
        return op, node.args, dict(node.kwargs)
    return _weighted(node, count, total)


def _weighted(node: torch.fx.Node, count: int, total: int) -> Call:
    """The node's own call times `count / total`."""
    if count == total:
        return _target(node), node.args, dict(node.kwargs)
    return scaled, (count / total, op_name(node), *node.args), dict(node.kwargs)


def _loss(node: torch.fx.Node, local: Local) -> Call:
    args = arguments(node)
    if args["reduction"] != losses.MEAN:
        return _target(node), node.args, dict(node.kwargs)
    total = math.prod(map(int, losses.loss_shape([i.value.shape for i in named_inputs(node)])))
    return _mean_loss(node, math.prod(map(int, losses.loss_shape(local.inputs))), total)


def _loss_of_rows(node: torch.fx.Node, local: Local) -> Call:
    if arguments(node)["reduction"] != losses.MEAN:
        return _target(node), node.args, dict(node.kwargs)
    rows = named_inputs(node)[0].value.int_shape()[:-1]
    return _mean_loss(node, math.prod(local.inputs[0][:-1]), math.prod(rows))


def _mean_loss(node: torch.fx.Node, count: int, total: int) -> Call:
    if count:
        return _weighted(node, count, total)
    return _with(node, reduction=losses.SUM)


def _cross_entropy(node: torch.fx.Node, local: Local) -> Call:
    args = arguments(node)
    found = dict(zip((i.name for i in named_inputs(node)), named_inputs(node), strict=True))
    logits = found["self"].value.int_shape()
    shape = local.of(node, "self")
    dense = found["target"].value.dtype.is_floating_point
    last = op_name(node).startswith("autopar.")
    at = len(logits) - 1 if last else min(1, len(logits) - 1)
    if shape[at] != logits[at]:
        raise PassError("localise", "vocabulary_is_whole", f"%{node.name} splits its classes")
    if args["reduction"] != losses.MEAN:
        return _target(node), node.args, dict(node.kwargs)
    if not dense:
        raise PassError(
            "localise",
            "count_is_known",
            f"%{node.name} divides by a count of targets that only the runtime knows",
        )
    return _mean_loss(node, math.prod(shape) // shape[at], math.prod(logits) // logits[at])


def _attention(node: torch.fx.Node, local: Local) -> Call:
    rows = named_inputs(node)[0].value.shape[-2]
    if arguments(node)["is_causal"] and local.of(node, "query")[-2] != rows:
        raise PassError(
            "localise", "rows_are_whole", f"%{node.name} splits rows that its mask counts"
        )
    return _target(node), node.args, dict(node.kwargs)


def _embedding(node: torch.fx.Node, local: Local) -> Call:
    if local.of(node, "weight")[0] != named_inputs(node)[0].value.shape[0]:
        raise PassError("localise", "vocabulary_is_whole", f"%{node.name} splits its rows")
    return _target(node), node.args, dict(node.kwargs)


def _grouped_mm(node: torch.fx.Node, local: Local) -> Call:
    if local.inputs[0][0] != named_inputs(node)[0].value.shape[0]:
        raise PassError("localise", "rows_are_whole", f"%{node.name} splits rows that ends count")
    return _target(node), node.args, dict(node.kwargs)


def _extreme(node: torch.fx.Node, local: Local) -> Call:
    """A maximum over no elements is the smallest value of the dtype."""
    args = arguments(node)
    dims = reductions.reduced_dims(node) if "other" not in args else []
    if all(local.inputs[0][d] for d in dims):
        return _target(node), node.args, dict(node.kwargs)
    dtype = values_of(node)[0].dtype
    largest = ".amax" in op_name(node) or ".max" in op_name(node)
    limits: Any = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    lowest, highest = (-math.inf, math.inf) if dtype.is_floating_point else (limits.min, limits.max)
    value = lowest if largest else highest
    return aten.new_full.default, (args["self"], list(local.outputs[0]), value), {}


Localiser = Callable[[torch.fx.Node, Local], Call]

LOCALISE: Mapping[str, Localiser] = MappingProxyType(
    {
        **{f"aten.{name}": _reshape for name in (*views.RESHAPES, "view")},
        **{f"aten.{name}": _split for name in views.SPLITS},
        **{f"aten.{name}": _expand for name in ("expand", "expand_as", "broadcast_to")},
        **{f"aten.{name}": _repeat for name in ("repeat", "tile")},
        "aten.repeat_interleave.self_int": _repeat_interleave,
        "aten.narrow": _narrow,
        **{f"aten.{name}": _fill for name in ("full", "zeros", "ones", "empty")},
        **{f"aten.new_{name}": _fill for name in ("full", "zeros", "ones", "empty")},
        "aten.one_hot": _one_hot,
        **{
            f"aten.{kind}{n}d": _convolution
            for kind in ("conv", "conv_transpose")
            for n in (1, 2, 3)
        },
        "aten.convolution": _convolution,
        "aten.bilinear": _bilinear,
        "aten.mean": _mean,
        **{f"aten.{name}": _loss for name in losses.ELEMENTWISE},
        **{f"aten.{name}": _loss_of_rows for name in losses.OF_ROWS},
        "aten.cross_entropy_loss": _cross_entropy,
        "autopar.cross_entropy": _cross_entropy,
        "aten.embedding": _embedding,
        "aten._grouped_mm": _grouped_mm,
        "transformers.grouped_mm_fallback": _grouped_mm,
        "aten.scaled_dot_product_attention": _attention,
        **{f"aten.{name}": _extreme for name in ("amax", "amin", "max", "min")},
    }
)
