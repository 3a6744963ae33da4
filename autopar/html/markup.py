"""HTML and SVG built from values; every text is escaped unless it is `Markup` already."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator

# What HTML cannot hold: control characters, and halves of surrogate pairs, which UTF-8 cannot hold.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = frozenset({"meta", "br", "col"})


class Markup(str):
    """Text that is HTML already, made by this module only."""

    __slots__ = ()


Child = str | Iterable["Child"] | None


def escaped(text: str) -> Markup:
    """The text as HTML that shows it; unprintable characters become U+FFFD."""
    return Markup(html.escape(_UNPRINTABLE.sub("\ufffd", text)))


def join(children: Child) -> Markup:
    """One piece of HTML from texts (escaped), markup (as it is), nested sequences and None."""
    return Markup("".join(_pieces(children)))


def _pieces(child: Child) -> Iterator[str]:
    if child is None:
        return
    if isinstance(child, Markup):
        yield child
    elif isinstance(child, str):
        yield escaped(child)
    else:
        for each in child:
            yield from _pieces(each)


def element(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """`<name attributes>children</name>`.

    An attribute's name ends in `_` where Python has that word itself (`class_`), and `-` is `_`. An
    attribute that is None or False is left out, a True one has no value, numbers are rounded to
    hundredths.
    """
    opening = "".join(
        _attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()
    )
    if name in _VOID:
        return Markup(f"<{name}{opening}>")
    return Markup(f"<{name}{opening}>{join(children)}</{name}>")


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or isinstance(value, bool):
        return f" {name}" if value else ""
    if isinstance(value, float):
        value = f"{value:.2f}".rstrip("0").rstrip(".")
    return f' {name}="{escaped(str(value))}"'


def verbatim(text: str, closing: str) -> Markup:
    """The text of a style sheet or script of ours, in which the closing tag must not occur."""
    if closing in text:
        raise ValueError(f"{closing} inside the text")
    return Markup(text)


def table(
    caption: str, columns: Iterable[str], rows: Iterable[Iterable[Child]], class_: str = ""
) -> Markup:
    """A table; a column whose name begins with `>` has numbers, and is aligned to the right."""
    names = list(columns)
    numeric = ["num" if name.startswith(">") else None for name in names]
    head = [
        element("th", name.lstrip(">"), scope="col", class_=kind)
        for name, kind in zip(names, numeric, strict=True)
    ]
    body = [
        element(
            "tr",
            [element("td", c, class_=kind) for c, kind in zip(row, numeric, strict=True)],
        )
        for row in rows
    ]
    return element(
        "div",
        element(
            "table",
            element("caption", caption),
            element("thead", element("tr", head)),
            element("tbody", body),
            class_=class_ or None,
        ),
        class_="scroll",
        role="region",
        aria_label=caption,
        tabindex=0,
    )
