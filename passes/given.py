"""What every rank is given whole: the batch of the user's loop, and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import sympy
import torch.fx

from autopar.cost.step import GIVEN, Step
from autopar.ir.graph import Graph, values_of

from .follow_micro_batches import BATCH


def given_size(node: torch.fx.Node) -> sympy.Expr:
    """Bytes of an input, a buffer or a constant, in the graph's symbols; 0 of any other node."""
    if node.op != "placeholder" or node.meta["role"] not in ("input", "buffer", "constant"):
        return sympy.Integer(0)
    return sympy.Add(*(v.numel() * v.dtype.itemsize for v in values_of(node)))


def given_bytes(
    symbolic: Graph, symbols: Mapping[sympy.Symbol, int], micro_batches: int = 1
) -> float:
    """Bytes of the whole batch and of all buffers; `symbols` are the sizes of one micro-batch."""
    whole = {s: n * micro_batches if str(s) == BATCH else n for s, n in symbols.items()}
    return float(sum(int(given_size(node).subs(whole)) for node in symbolic.placeholders()))


def with_given(step: Step, nbytes: float) -> Step:
    """The step with what it is given among what it stores."""
    return replace(step, state_bytes={**step.state_bytes, GIVEN: nbytes}) if nbytes else step
