"""Types and shardings as people read them: `f32[8/dp, 32] +tp`, each mesh axis in its colour."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from autopar.plan import Plan

from .markup import Child, Markup, element, join

COLOURS = 6  # of mesh axes, in style.css
_SHARDING = re.compile(r"\[(?P<dims>[^\]]*)\](?P<rest>.*)", re.DOTALL)
_TYPE = re.compile(r"(?P<dtype>[^\[]*)\[(?P<sizes>[^\]]*)\]", re.DOTALL)
_WHERE: Mapping[int, str] = {0: "inside a host", 1: "between hosts"}
_WORD = re.compile(r"\w+|\W+")


def axis_class(axes: Sequence[str], axis: str) -> str:
    """The class of a mesh axis's colour."""
    return f"axis a{axes.index(axis) % COLOURS}"


def coloured(text: str, axes: Sequence[str]) -> Markup:
    """The text with every mesh axis that it names in its colour."""
    return join(
        element("b", word, class_=axis_class(axes, word)) if word in axes else word
        for word in _WORD.findall(text)
    )


def placed(type_: str, sharding: str, axes: Sequence[str]) -> Markup:
    """A type with the axes that split each dim; the two texts as they are if they do not agree."""
    kind, where = _TYPE.fullmatch(type_), _SHARDING.fullmatch(sharding)
    if kind is not None and where is not None:
        sizes, splits = kind["sizes"].split(", "), where["dims"].split(", ")
        if len(sizes) == len(splits):
            dims = ", ".join(
                size if split in ("-", "") else f"{size}/{split}"
                for size, split in zip(sizes, splits, strict=True)
            )
            return whole(coloured(f"{kind['dtype']}[{dims}]{where['rest']}", axes))
    return whole(coloured(f"{type_} {sharding}".strip(), axes))


def whole(child: Child) -> Markup:
    """The text on one line, as wide as it is."""
    return element("span", child, class_="whole")


def axis_key(plan: Plan) -> Markup:
    """What the colours stand for, and how to read a sharding."""
    names = plan.mesh.names
    keys = [
        element(
            "li",
            element("b", axis.name, class_=axis_class(names, axis.name)),
            f" {axis.size} devices, ",
            _WHERE.get(axis.level, f"across level {axis.level} of the cluster"),
        )
        for axis in plan.mesh
    ]
    return element("ul", keys, class_="key") if keys else Markup()
