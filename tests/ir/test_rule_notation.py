"""The text form of sharding rules: what is printed parses back, and what is written means that."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.ir.mesh import Mesh
from autopar.ir.rule import Choice, ShardingRule, factor_sizes, parse_rule, place
from autopar.ir.rules.common import letters, take

names = st.sampled_from(string.ascii_letters + "αβγ")
dims = st.lists(names, max_size=3, unique=True).map(tuple)
tensors = st.lists(dims, max_size=4).map(tuple)


@st.composite
def rules(draw: st.DrawFn) -> ShardingRule:
    inputs = draw(st.lists(tensors, max_size=4).map(tuple))
    outputs = draw(st.lists(tensors, min_size=1, max_size=3).map(tuple))
    factors = sorted({f for dims in (*inputs, *outputs) for dim in dims for f in dim})
    some = st.lists(st.sampled_from(factors), unique=True) if factors else st.just([])
    whole = frozenset(draw(some))
    reductions = {f: draw(st.sampled_from(["max", "min"])) for f in draw(some)}
    comm = frozenset(draw(some))
    indices = st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True).map(tuple)
    linear = draw(st.lists(indices, max_size=3).map(tuple))
    once = draw(st.one_of(st.just(()), indices))
    return ShardingRule(inputs, outputs, whole, reductions, linear, once, comm)


@given(rules())
@settings(max_examples=300, deadline=None)
def test_printed_rules_parse_back(rule: ShardingRule) -> None:
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    "text",
    [
        "bsk,nk,n->bsn; linear(0) linear(1) once(2)",
        "(ab)c->abc",
        "bs[d],[d]->bs[d]",
        "b1->bn",
        "->ab",
        ".,a->a",
        "ab->a; max(b)",
        "nv,n->.; comm(v)",
        "a([t]b)->ab,ab",
        "ab,ab->ab; linear(0,1)",
    ],
)
def test_notation_is_its_own_print(text: str) -> None:
    assert str(parse_rule(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab,b", "no '->'"),
        ("a?b->ab", r"cannot read '\?b'"),
        ("ab->ab; twice(0)", r"unknown clause 'twice\(0\)'"),
    ],
)
def test_bad_notation_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_rule(text)


def test_sizes_of_compound_factors_are_what_remains() -> None:
    rule = parse_rule("(ab)c->a(bc)")
    assert factor_sizes(rule, [(6, 4), (2, 12)]) == {"a": 2, "b": 3, "c": 4}


def test_a_split_minor_factor_is_strided() -> None:
    rule = parse_rule("b([t]d)->bd,bd")
    sizes = factor_sizes(rule, [(2, 8), (2, 4), (2, 4)])
    placed = place(rule, sizes, Mesh.of(tp=2), {"tp": Choice("d")})
    assert placed is not None
    assert [str(s) for s in (*placed.inputs, *placed.outputs)] == [
        "[-, 2:tp]",
        "[-, tp]",
        "[-, tp]",
    ]


def test_two_factors_of_one_dim_are_not_split_at_once() -> None:
    rule = parse_rule("(ab)->ab")
    sizes = factor_sizes(rule, [(6,), (2, 3)])
    assert place(rule, sizes, Mesh.of(x=2, y=2), {"x": Choice("a"), "y": Choice("b")}) is None


def test_letters_do_not_run_out() -> None:
    names = take(letters(), 500)
    assert len(set(names)) == 500
    assert str(parse_rule(f"{''.join(names)}->.")) == f"{''.join(names)}->."
