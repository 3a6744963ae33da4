"""Treemaps: areas are the values, boxes fill the whole and do not overlap."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.html.memory_tree import memory_trees
from autopar.html.treemap import Box, Tree, squarified, treemap

from .plans import KIB, PLAN

WHOLE = Box(3, 5, 900, 400)


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=30))
def test_areas_are_proportional_and_disjoint(values: list[float]) -> None:
    values.sort(reverse=True)
    boxes = squarified(values, WHOLE)
    for value, box in zip(values, boxes, strict=True):
        area = value / sum(values) * WHOLE.width * WHOLE.height
        assert math.isclose(box.width * box.height, area, rel_tol=1e-6, abs_tol=1e-6)
        assert box.x >= WHOLE.x - 1e-6 and box.x + box.width <= WHOLE.x + WHOLE.width + 1e-6
        assert box.y >= WHOLE.y - 1e-6 and box.y + box.height <= WHOLE.y + WHOLE.height + 1e-6
    for a, b in combinations(boxes, 2):
        across = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
        down = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
        assert min(across, down) <= 1e-6


def test_equal_values_are_nearly_square() -> None:
    for box in squarified([1.0] * 12, Box(0, 0, 400, 300)):
        assert max(box.width / box.height, box.height / box.width) < 1.5


def test_the_example_of_the_paper() -> None:
    """Figure 4 of Bruls et al.: areas 6 6 4 3 2 2 1 in a rectangle of 6 x 4."""
    boxes = squarified([6, 6, 4, 3, 2, 2, 1], Box(0, 0, 6, 4))
    assert [round(b.width, 2) for b in boxes] == [3, 3, 1.71, 1.29, 1.2, 1.2, 0.6]
    assert [round(b.height, 2) for b in boxes] == [2, 2, 2.33, 2.33, 1.67, 1.67, 1.67]


def test_nothing_to_draw() -> None:
    assert squarified([], WHOLE) == []
    assert "<rect" not in treemap([Tree("empty", 0)], 100, 100, "x")


def test_names_are_cut_to_their_boxes() -> None:
    drawn = treemap([Tree("layers.attention.query", 1, detail="1 B")], 60, 40, "x")
    assert ">query</text>" in drawn and "layers.attention.query: 1 B" in drawn
    drawn = treemap([Tree("blocks.layers.{0..3}", 1, detail="1 B")], 110, 40, "x")
    assert ">layers.{0..3}</text>" in drawn
    drawn = treemap([Tree("layers.{0..3}", 1, detail="1 B")], 60, 40, "x")
    assert ">laye…</text>" in drawn


def test_memory_of_a_plan_adds_up() -> None:
    trees = {tree.name: tree for tree in memory_trees(PLAN)}
    assert sum(tree.value for tree in trees.values()) == PLAN.predicted.memory_bytes
    assert trees["parameters"].value == 256 * KIB  # what its parameters store
    assert trees["gradients and optimizer state"].value == 768 * KIB
    for tree in trees.values():
        assert sum(child.value for child in tree.children) == pytest.approx(tree.value)
        for child in tree.children:
            if child.children:
                assert sum(leaf.value for leaf in child.children) == pytest.approx(child.value)
    (kept,) = trees["gathered parameters"].children  # `up` is gathered again, `wte` never
    assert kept.name == "blocks.{0..3}" and [leaf.name for leaf in kept.children] == ["down"]
    assert kept.detail == "20 KiB (4 × 5 KiB)"
