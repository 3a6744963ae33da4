"""Op names and the families that share a cost formula and a measured curve."""

from __future__ import annotations

from typing import Any

import torch


def op_name(target: Any) -> str:
    """`linear` for aten.linear.default, F.linear, a lowered op or the text itself."""
    if isinstance(target, str):
        name = target
    elif isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
    else:
        name = str(getattr(target, "__name__", target))
    name = name.split("::")[-1]
    if name.startswith("aten."):
        name = name.split(".")[1]
    return name.rstrip("_") or name


_NATIVE = {
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "_safe_softmax": "softmax",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_efficient_attention": "scaled_dot_product_attention",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "native_batch_norm": "batch_norm",
    "_native_batch_norm_legit": "batch_norm",
    "native_dropout": "dropout",
    "_to_copy": "to",
    "cross_entropy_loss": "cross_entropy",
    "conv1d": "convolution",
    "conv2d": "convolution",
    "conv3d": "convolution",
    "_convolution": "convolution",
    "truediv": "div",
}

_FAMILY_NAMES = {
    "view": """view reshape _unsafe_view flatten unflatten permute transpose t mT numpy_T movedim
        swapdims unsqueeze squeeze expand expand_as view_as slice select narrow split
        split_with_sizes tensor_split chunk unbind getitem detach alias as_strided diagonal unfold
        view_as_real view_as_complex sym_size lift_fresh positive hint pvary keep_first slice_vary
        slice_inv""",
    "matmul": """linear mm bmm matmul addmm baddbmm einsum mv addmv dot _grouped_mm
        grouped_mm_fallback grouped_mm""",
    "conv": "convolution conv_transpose1d conv_transpose2d conv_transpose3d",
    "attention": "scaled_dot_product_attention causal_attention",
    "transcendental": """gelu silu tanh sigmoid exp exp2 expm1 log log2 log1p erf cos sin pow
        softplus mish hardswish elu celu selu logsigmoid log_sigmoid rsqrt atan2 logit""",
    "reduction": """sum mean amax amin max min var std var_mean norm linalg_vector_norm argmax
        argmin prod any all logsumexp count_nonzero""",
    "softmax": "softmax log_softmax cross_entropy nll_loss",
    "norm": "layer_norm rms_norm group_norm instance_norm",
    "batch_norm": "batch_norm",
    "embedding": "embedding masked_embedding embedding_bag",
    "gather": "index gather index_select take take_along_dim",
    "scatter": """index_put scatter scatter_add index_add index_copy scatter_reduce slice_scatter
        select_scatter masked_scatter index_fill""",
    "dropout": """dropout feature_dropout alpha_dropout bernoulli rand rand_like randn
        randn_like""",
    "copy": """clone contiguous to type_as copy cat stack concat pad constant_pad_nd repeat tile
        roll flip repeat_interleave""",
    "pool": """max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d
        _adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d
        max_pool1d avg_pool1d""",
    "sort": "topk sort argsort cumsum cumprod nonzero unique bincount searchsorted one_hot",
    "create": """zeros ones full empty arange zeros_like ones_like full_like empty_like
        scalar_tensor new_zeros new_ones new_full eye linspace""",
}
FAMILY: dict[str, str] = {
    name: family for family, text in _FAMILY_NAMES.items() for name in text.split()
}


def names(text: str) -> frozenset[str]:
    """A set of op names written as words."""
    return frozenset(text.split())


def canonical_name(name: str) -> str:
    """The name under which an op is in the tables: `softmax` for `_softmax`."""
    return _NATIVE.get(name, name)


def short_name(name: str) -> str:
    """What tables call an op: `sdpa` for scaled_dot_product_attention."""
    return {"scaled_dot_product_attention": "sdpa", "_to_copy": "to"}.get(name, name)


def op_family(name: str) -> str:
    """Family of an op by name; what is in no table is "pointwise"."""
    return FAMILY.get(canonical_name(name), "pointwise")
