"""Parameters that have no memory until a plan says which part of them this process keeps.

Inside `deferred()`, a module's `__init__` runs as always: its tensors are real, except that a
parameter gives its memory back as soon as it is made. What was computed to make it, and what is
done to it afterwards, is recorded (`tape`) and computed again when the values are wanted
(`replay`): the same ops in the same order with the state of the random generator from before each
random op, so that the values are those of one device to the last bit. Random ops are run at once as
well, on memory that is thrown away, so that the generator is where it would be on one device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from autopar.compat import active_dispatch_modes

from .deferred_tensor import DeferredTensor, deferred_parameters, has_memory, real_value
from .recording import TRIMMED_BYTES, Recording

__all__ = ["TRIMMED_BYTES", "DeferredTensor", "deferred", "deferred_parameters", "real_value"]


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Build modules whose parameters take no memory until `autopar.parallelize` has a plan.

    Every process then computes, one parameter at a time, the values that one device would have, and
    keeps its own part. Buffers and all other tensors are real at once. Random numbers are drawn as
    on one device, so that what follows draws the same, too. Code that initialises, ties, casts or
    loads parameters works, inside and afterwards. Parameters that have to stay in memory (what they
    are made of is in use elsewhere, or something asked for their address) cause a `ShardingWarning`
    that says why.
    """
    if any(isinstance(mode, Recording) for mode in active_dispatch_modes()):
        yield
        return
    mode = Recording()
    original = nn.Parameter.__dict__["__new__"]

    def new(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        if cls is not nn.Parameter or not has_memory(data):
            return original.__func__(cls, data, requires_grad)
        return mode.parameter(data, requires_grad)

    parameter: Any = nn.Parameter
    parameter.__new__ = staticmethod(new)
    try:
        with mode:
            yield
    finally:
        parameter.__new__ = original
        mode.close()
