"""Hints: what the user wants of a tensor, whatever the rest of the plan is.

A hint is about one parameter or about what one op gives. Its vocabulary, in code and in files:

- `split`: dims that must be split, each over at least one mesh axis, or `{dim: axis}`;
- `whole`: dims that must not be split, or `{dim: axis}`: not over that axis;
- `replicated`: no dim is split;
- `sharded` (parameters): stored in pieces, whichever the dim (true), or whole (false);
- `gather` (parameters, false): used in the pieces in which it is stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from autopar.errors import UserError

from .lowered import GATHER_INV, GATHER_VARY
from .mesh import Mesh
from .reshard import reshard_steps
from .sharding import Sharding

Dims: TypeAlias = int | Sequence[int] | Mapping[Any, str]
MARK = "hints"  # metadata key of nodes: a tuple of hints

WORDS = ("split", "whole", "replicated", "sharded", "gather")
_EXAMPLE = 'write for example {"param": "layers.*.weight", "split": 0}'


@dataclass(frozen=True)
class Hint:
    """One hint; `target` is the name or pattern it was given for, of a `kind` "param" or "op".

    `split` and `whole` are (dim, axis) with "" for any axis. Prints as it would be written.
    """

    kind: str
    target: str
    split: tuple[tuple[int, str], ...] = ()
    whole: tuple[tuple[int, str], ...] = ()
    replicated: bool = False
    sharded: bool | None = None
    gather: bool | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that it names."""
        return tuple(dict.fromkeys(axis for _, axis in (*self.split, *self.whole) if axis))

    @property
    def dims(self) -> tuple[int, ...]:
        """The dims that it names."""
        return tuple(dict.fromkeys(dim for dim, _ in (*self.split, *self.whole)))

    def allows(self, sharding: Sharding) -> bool:
        """Whether a value may have this sharding; dims are in range and not negative."""
        splits = sharding.splits
        if self.sharded is not None and any(splits) != self.sharded:
            return False
        if self.replicated and not sharding.is_replicated():
            return False
        for dim, axis in self.split:
            if axis not in splits[dim].axes if axis else not splits[dim]:
                return False
        for dim, axis in self.whole:
            if axis in splits[dim].axes if axis else bool(splits[dim]):
                return False
        return True

    def words(self) -> dict[str, Any]:
        """What it says, without the target."""
        said: dict[str, Any] = {}
        for word in ("split", "whole"):
            pairs = getattr(self, word)
            if any(axis for _, axis in pairs):
                said[word] = {str(dim): axis for dim, axis in pairs}
            elif pairs:
                said[word] = [dim for dim, _ in pairs] if len(pairs) > 1 else pairs[0][0]
        if self.replicated:
            said["replicated"] = True
        for word in ("sharded", "gather"):
            if getattr(self, word) is not None:
                said[word] = getattr(self, word)
        return said

    def to_json(self) -> dict[str, Any]:
        """The object that a file of hints has; `hint_from_json` is the inverse."""
        return {self.kind: self.target, **self.words()}

    def __str__(self) -> str:
        said = " ".join(f"{word}={json.dumps(value)}" for word, value in self.words().items())
        return f"{self.target} {said}"


def may_reshard(hints: Iterable[Hint], source: Sharding, want: Sharding) -> bool:
    """Whether the hints of a value let its readers have it like this."""
    return all(hint.gather is not False for hint in hints) or not _gathers(source, want)


@lru_cache(maxsize=4096)
def _gathers(source: Sharding, want: Sharding) -> bool:
    try:
        steps = reshard_steps(source, want, Mesh(()))  # the steps do not depend on sizes
    except ValueError:
        return True
    return any(step.op in (GATHER_VARY, GATHER_INV) for step in steps)


def make_hint(kind: str, target: str, **said: Any) -> Hint:
    """A hint from its words; raises UserError for one that says nothing or contradicts itself."""
    given = {word: value for word, value in said.items() if value is not None}
    where = f"the hint for {target}"
    for word in given:
        if word not in WORDS:
            raise UserError(f"{where} says {word!r}", fix=f"use {', '.join(WORDS)}")
    for word in ("replicated", "sharded", "gather"):
        if word in given and not isinstance(given[word], bool):
            raise UserError(f"{where} has {word}={given[word]!r}, not true or false")
    hint = Hint(
        kind,
        target,
        _dims(given.get("split"), f"{where}: split"),
        _dims(given.get("whole"), f"{where}: whole"),
        bool(given.get("replicated", False)),
        given.get("sharded"),
        given.get("gather"),
    )
    _check(hint, where)
    return hint


def _check(hint: Hint, where: str) -> None:
    if not hint.words() or hint.gather is True:
        raise UserError(f"{where} asks for nothing", fix=f"use {', '.join(WORDS)}")
    if hint.kind == "op" and (hint.sharded is not None or hint.gather is not None):
        raise UserError(
            f"{where} says sharded or gather, which are about parameters",
            fix="use split, whole or replicated for what an op gives",
        )
    never = {(dim, axis) for dim, axis in hint.whole}
    both = [d for d, axis in hint.split if (d, axis) in never or (d, "") in never]
    if both:
        raise UserError(f"{where} contradicts itself: dim {both[0]} is both split and whole")
    if hint.split and (hint.replicated or hint.sharded is False):
        word = "replicated" if hint.replicated else "sharded=false"
        raise UserError(f"{where} contradicts itself: split together with {word}")
    if hint.replicated and hint.sharded:
        raise UserError(f"{where} contradicts itself: replicated together with sharded")
    axes = [axis for _, axis in hint.split if axis]
    if len(axes) != len(set(axes)):
        raise UserError(f"{where} contradicts itself: one axis cannot split two dims")


def _dims(given: Any, where: str) -> tuple[tuple[int, str], ...]:
    if given is None:
        return ()
    if isinstance(given, Mapping):
        pairs = [(key, axis) for key, axis in given.items()]
    else:
        several = isinstance(given, (list, tuple, set, frozenset))
        pairs = [(dim, "") for dim in (given if several else [given])]
    found: list[tuple[int, str]] = []
    for dim, axis in pairs:
        if isinstance(dim, str) and dim.lstrip("-").isdigit():
            dim = int(dim)
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise UserError(
                f"{where} is {given!r}", fix="write a dim, several, or an object {dim: axis}"
            )
        if not isinstance(axis, str):
            raise UserError(f"{where} names the axis {axis!r}", fix='write {0: "tp"}')
        found.append((dim, axis))
    return tuple(dict.fromkeys(found))


def hint_from_json(data: object, where: str = "hint") -> Hint:
    """Read one object of a file of hints; raises UserError that names `where`."""
    if not isinstance(data, dict):
        raise UserError(f"{where} is {data!r}, not an object", fix=_EXAMPLE)
    kinds = [kind for kind in ("param", "op") if kind in data]
    if len(kinds) != 1 or not isinstance(data[kinds[0]], str):
        raise UserError(f"{where} must name either a param or an op", fix=_EXAMPLE)
    said = {str(word): value for word, value in data.items() if word != kinds[0]}
    return make_hint(kinds[0], data[kinds[0]], **said)
