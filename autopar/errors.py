"""What autopar raises and warns: errors of the user, errors of ours, and one warning."""

from __future__ import annotations


class UserError(Exception):
    """Something the user wrote or asked for cannot be done, with the place and the way out.

    `what` is a sentence that says what failed, `where` the user's source as `model.py:31` (None
    when no line is to blame), `fix` a sentence that says what to change (None when nothing would
    help).
    """

    def __init__(self, what: str, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what, where, fix)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  at:  {self.where}")
        if self.fix is not None:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class PassError(Exception):
    """A bug of ours: after the pass `pass_name` an invariant no longer holds.

    `invariant` names the invariant (`axis_used_once`), `sentence` is what it returned, `node` the
    printed node at fault (None when no single node is). Reads
    `after propagate: axis_used_once fails: %h @ [dp, dp] uses an axis twice`.
    """

    def __init__(
        self, pass_name: str, invariant: str, sentence: str, node: str | None = None
    ) -> None:
        super().__init__(pass_name, invariant, sentence, node)
        self.pass_name = pass_name
        self.invariant = invariant
        self.sentence = sentence
        self.node = node

    def __str__(self) -> str:
        line = f"after {self.pass_name}: {self.invariant} fails: {self.sentence}"
        return line if self.node is None else f"{line}\n  node: {self.node}"


class ShardingWarning(UserWarning):
    """An op has no sharding rule and none was discovered, so that every rank runs all of it."""


class KernelWarning(UserWarning):
    """A kernel that the plan uses cannot run here, so that its torch reference does."""
