"""One rank's programs of a training step on micro-batches, as passes hand them to the runtime."""

from __future__ import annotations

from dataclasses import dataclass

from .graph import Graph


@dataclass(frozen=True)
class Combine:
    """How a result of all micro-batches is made of theirs.

    `kind` is "cat" (along `dim`, seen as `outer` repeats of the parts), "sum", "max", "min" or
    "last" (they are all the same).
    """

    kind: str
    dim: int = 0
    outer: int = 1


@dataclass(frozen=True)
class StepGraphs:
    """The programs of one rank's step.

    `prologue` gives the values that do not depend on the micro-batch: `prepared` names them, and
    they are placeholders of role "prepared" in the other two. `body` gives the values in
    `combine`, which are the placeholders of role "combined" of `tail`, then new values of buffers;
    `tail` gives what the user's code returns, then new values of buffers. Of a piece that is not
    the last one, `body` gives first what is sent to the next. `objective` is which result of the
    body is the micro-batch's part of the loss, and `loss` which result of the tail is the loss;
    None without gradients.
    """

    prologue: Graph
    body: Graph
    tail: Graph
    prepared: tuple[str, ...] = ()
    combine: tuple[Combine, ...] = ()
    objective: int | None = None
    loss: int | None = None
