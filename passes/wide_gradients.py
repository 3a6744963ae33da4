"""What float32 sums of 16-bit gradients take, over several micro-batches (`runtime.wide_sums`).

The sum of a parameter that is gathered once per step is there until its backward, in place of the
whole gradient; that of any other is there in place of the stored gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.fx

from autopar.ir.graph import tensor_inputs, value_of
from autopar.ir.sharding import Sharding

from .narrow_gathers import is_narrow, summed, travelling
from .options import Option
from .price import Pricer
from .widening import widening

Node = torch.fx.Node


def is_summed_whole(source: Sharding, want: Sharding, regather: bool) -> bool:
    """Whether a parameter's gradient is summed as its readers want it, and reduced once."""
    return not regather and want.without_varying() != source


def is_summed_apart(node: Node, source: Sharding, want: Sharding, regather: bool) -> bool:
    """Whether what is summed is another tensor than the stored gradient: gathered, or cast."""
    return is_summed_whole(source, want, regather) or (is_narrow(node) and not regather)


def stored_sum_bytes(node: Node, option: Mapping[Node, Option], pricer: Pricer) -> float:
    """Bytes that the sums of a parameter take beyond its stored gradient.

    A parameter that is gathered for every micro-batch has one sum, any other one per way in which
    it is read. What is gathered once is summed whole and is not counted here.
    """
    given = option[node]
    value = value_of(summed(node, given.regather))
    wider = widening(value.dtype) if pricer.micro_batches > 1 and value.requires_grad else 0
    if not wider:
        return 0.0
    wider += value is not value_of(node)  # the cast's gradient beside the stored one
    source, read = given.gives[0], travelling(node)
    wants = {
        option[user].wants[slot]
        for user in read.users
        if user in option
        for slot, given_to in enumerate(tensor_inputs(user))
        if given_to is read
    }
    stored = pricer.local_bytes(value, source)
    in_place = [w for w in wants if pricer.local_bytes(value, w.without_varying()) == stored]
    return (1 if given.regather else len(in_place)) * wider * stored
