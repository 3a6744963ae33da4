"""Numbers that pass through compiled code unseen.

A number that a compiler sees is a constant: the code is compiled anew for every other one, until it
is no longer compiled at all. The seed of a step and the number of a micro-batch are read by ops
alone that the compiler leaves alone, and travel to them in an object, of which it sees the type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

ROLES = ("seed", "micro_batch")  # of a program's placeholders


class Unseen:
    """What holds a number."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def _seen(x: Any) -> Any:
    return x.number if isinstance(x, Unseen) else x


def left_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a call that no compiler looks into, and which is given numbers as numbers."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_seen, args), **{name: _seen(x) for name, x in kwargs.items()})

    made: Callable[..., Any] = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
    return made


def with_unseen(run: Callable[..., Any], roles: Sequence[str]) -> Callable[..., Any]:
    """`run`, whose arguments of some `ROLES` it is given as `Unseen`."""
    hidden = [i for i, role in enumerate(roles) if role in ROLES]
    if not hidden:
        return run

    def hiding(*values: Any) -> Any:
        given = list(values)
        for i in hidden:
            given[i] = Unseen(given[i])
        return run(*given)

    return hiding
