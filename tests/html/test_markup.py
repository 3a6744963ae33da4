"""What is written is what is read back, whatever the text."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.html.markup import Markup, element, join, table, verbatim


class Reader(HTMLParser):
    """Tags, attributes and text of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")), max_size=40))
def test_text_and_attributes_are_escaped(text: str) -> None:
    read = Reader(element("p", text, title=text))
    assert read.tags == [("p", {"title": text})]
    assert read.text == text


def test_markup_is_kept_and_nested_sequences_are_joined() -> None:
    assert element("p", [element("b", "<"), ["x", None]]) == "<p><b>&lt;</b>x</p>"
    assert isinstance(join(["a", Markup("<br>")]), Markup)


def test_attributes() -> None:
    made = element(
        "rect", x=1.005, y=2.0, width=10, class_="a", data_tip='"', hidden=True, id=None, open=False
    )
    assert made == '<rect x="1" y="2" width="10" class="a" data-tip="&quot;" hidden></rect>'


def test_what_utf8_cannot_hold_is_replaced() -> None:
    assert element("p", "a\x00b\ud800c").encode() == "<p>a\ufffdb\ufffdc</p>".encode()


def test_a_style_sheet_cannot_end_its_element() -> None:
    with pytest.raises(ValueError, match="</style inside"):
        verbatim("a {} </style>", "</style")


def test_table_aligns_numbers() -> None:
    read = Reader(table("Sizes", ("name", ">bytes"), [("<w>", "1 KiB")]))
    assert ("td", {"class": "num"}) in read.tags
    assert ("caption", {}) in read.tags
    assert "<w>" in read.text
