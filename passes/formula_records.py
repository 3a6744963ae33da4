"""The formulas of one op, one edge, one stored tensor: sympy expressions of seconds and bytes."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

ZERO = sympy.Integer(0)


@dataclass(frozen=True)
class CollectiveFormula:
    """One collective: seconds, and the bytes that one device sends."""

    kind: str
    axis: str
    backward: bool
    seconds: sympy.Expr
    sent: sympy.Expr


@dataclass(frozen=True)
class OpFormula:
    """Formulas of one op on the device with the largest shards.

    Flops and bytes moved of the forward, seconds of forward and backward compute, the collectives
    that the op issues by itself, bytes that it keeps for the backward.
    """

    family: str
    flops: sympy.Expr
    moved: sympy.Expr
    forward: sympy.Expr
    backward: sympy.Expr
    own: tuple[CollectiveFormula, ...]
    saved: sympy.Expr

    @property
    def seconds(self) -> sympy.Expr:
        """Forward, backward and own collectives."""
        return self.forward + self.backward + sympy.Add(*(c.seconds for c in self.own))

    @property
    def forward_seconds(self) -> sympy.Expr:
        """What running the forward again takes."""
        return self.forward + sympy.Add(*(c.seconds for c in self.own if not c.backward))


@dataclass(frozen=True)
class StoredFormula:
    """Formulas of one parameter: seconds of its update, bytes of its state."""

    seconds: sympy.Expr
    stored: sympy.Expr


@dataclass(frozen=True)
class EdgeFormula:
    """Formulas of one edge: its collectives, and the bytes kept if the reader needs the value."""

    collectives: tuple[CollectiveFormula, ...]
    kept: sympy.Expr

    @property
    def seconds(self) -> sympy.Expr:
        """All its collectives."""
        return sympy.Add(*(c.seconds for c in self.collectives))

    @property
    def forward_seconds(self) -> sympy.Expr:
        """The collectives of the forward."""
        return sympy.Add(*(c.seconds for c in self.collectives if not c.backward))
