"""The vocabulary of hints, and those that say nothing or contradict themselves."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.errors import UserError
from autopar.ir.hint import hint_from_json, make_hint, may_reshard
from autopar.ir.parse import parse_sharding

dims = (
    st.integers(0, 3)
    | st.lists(st.integers(0, 3), max_size=3)
    | st.dictionaries(st.integers(0, 3), st.sampled_from(["dp", "tp"]), max_size=2)
)
words = st.fixed_dictionaries(
    {},
    optional={
        "split": dims,
        "whole": dims,
        "replicated": st.booleans(),
        "sharded": st.booleans(),
        "gather": st.just(False),
    },
)


@given(words)
def test_json_and_back(said: dict[str, Any]) -> None:
    try:
        hint = make_hint("param", "w", **said)
    except UserError:
        return
    assert hint_from_json(json.loads(json.dumps(hint.to_json()))) == hint


@pytest.mark.parametrize(
    ("said", "allowed", "forbidden"),
    [
        ({"split": 0}, ["[dp, -]", "[dp&tp, -]", "[dp, tp]"], ["[-, -]", "[-, dp]", "[-, -] +dp"]),
        ({"split": [0, 1]}, ["[dp, tp]"], ["[dp, -]"]),
        ({"split": {0: "tp"}}, ["[tp, -]", "[dp&tp, -]"], ["[dp, tp]", "[dp, -]"]),
        ({"whole": 1}, ["[dp, -]", "[-, -]", "[-, -] +tp"], ["[-, tp]"]),
        ({"whole": {"1": "tp"}}, ["[-, dp]"], ["[dp, tp]"]),
        ({"replicated": True}, ["[-, -]", "[-, -] ~dp"], ["[dp, -]", "[-, -] +dp"]),
        ({"sharded": True}, ["[-, tp]"], ["[-, -]"]),
        ({"sharded": False}, ["[-, -]"], ["[-, tp]"]),
    ],
)
def test_what_a_hint_allows(said: dict[str, Any], allowed: list[str], forbidden: list[str]) -> None:
    hint = make_hint("param", "w", **said)
    for text in allowed:
        assert hint.allows(parse_sharding(text)), text
    for text in forbidden:
        assert not hint.allows(parse_sharding(text)), text


def test_no_gathering_leaves_slices_and_sums() -> None:
    hints = [make_hint("param", "w", gather=False)]
    pieces, whole = parse_sharding("[tp, -]"), parse_sharding("[-, -]")
    assert not may_reshard(hints, pieces, whole) and may_reshard(hints, whole, pieces)
    assert may_reshard([], pieces, whole)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "hint 1 is 3, not an object"),
        ({"split": 0}, "must name either a param or an op"),
        ({"param": "w", "op": "x", "split": 0}, "must name either a param or an op"),
        ({"param": "w"}, "the hint for w asks for nothing"),
        ({"param": "w", "gather": True}, "asks for nothing"),
        ({"param": "w", "spilt": 0}, "the hint for w says 'spilt'"),
        ({"param": "w", "split": "first"}, "split is 'first'"),
        ({"param": "w", "split": True}, "split is True"),
        ({"param": "w", "split": {"0": 1}}, "names the axis 1"),
        ({"param": "w", "replicated": "yes"}, "replicated='yes', not true or false"),
        ({"op": "x", "sharded": True}, "are about parameters"),
        ({"param": "w", "split": 0, "whole": [0, 1]}, "dim 0 is both split and whole"),
        ({"param": "w", "split": {"0": "tp"}, "whole": {"0": "tp"}}, "both split and whole"),
        ({"param": "w", "split": 0, "replicated": True}, "split together with replicated"),
        ({"param": "w", "split": 0, "sharded": False}, "split together with sharded"),
        ({"param": "w", "replicated": True, "sharded": True}, "replicated together with sharded"),
        ({"param": "w", "split": {"0": "tp", "1": "tp"}}, "one axis cannot split two dims"),
    ],
)
def test_a_hint_that_cannot_be(data: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        hint_from_json(data, "hint 1")
    assert message in caught.value.what
