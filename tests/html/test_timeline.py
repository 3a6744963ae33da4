"""The timeline: spans where they belong, what is not listed hatched, close-ups where they help."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from autopar.html.timeline import timeline_of, timeline_section

from .plans import KIB, PLAN, SPARSE, TIMELINE, with_timeline
from .test_markup import Reader


def test_a_plan_without_a_timeline_says_so() -> None:
    assert "carries no timeline" in timeline_section(None)


@pytest.mark.parametrize("timeline", [TIMELINE, SPARSE])
def test_timeline_of_a_plan_or_of_its_json(timeline: object) -> None:
    assert timeline_of(with_timeline(PLAN, TIMELINE)) == TIMELINE
    made = with_timeline(PLAN, TIMELINE)
    object.__setattr__(made, "timeline", TIMELINE.to_json())
    assert timeline_of(made) == TIMELINE
    object.__setattr__(made, "timeline", {"step_s": 1})
    assert timeline_of(made) is None


def test_spans_are_in_their_lanes_in_proportion() -> None:
    drawn = Reader(timeline_section(TIMELINE))
    spans = [
        a for tag, a in drawn.tags if tag == "rect" and (a.get("class") or "").startswith("span")
    ]
    assert len(spans) == len(TIMELINE.spans)
    by_tip = {a["data-tip"]: a for a in spans}
    first = by_tip["linear_0, forward: 900 us from 0 us"]
    last = by_tip["optimizer, optimizer: 400 us from 11.6 ms"]
    assert float(first["width"] or 0) / float(last["width"] or 0) == pytest.approx(
        0.9 / 0.4, rel=0.01
    )
    assert float(last["x"] or 0) + float(last["width"] or 0) == pytest.approx(952, abs=0.1)
    assert [a["y"] for a in (first, by_tip["add:tp, forward: 500 us from 900 us"])] == ["1", "33"]
    for wanted in ("Simulated step 12 ms", "waiting for dp 600 us", "peak 1.45 MiB at 6 ms"):
        assert wanted in drawn.text


def test_close_ups_and_hatching_where_spans_are_missing() -> None:
    dense, sparse = timeline_section(TIMELINE), timeline_section(SPARSE)
    assert "Close up" not in dense and "Close up" in sparse
    assert 'class="hatch"' in sparse
    assert len(set(re.findall(r"<summary>(From [^<]*)</summary>", sparse))) == 3


def test_memory_curve_is_a_staircase_below_its_peak() -> None:
    flat = replace(TIMELINE, memory=((0.0, 512.0 * KIB), (6e-3, 1024.0 * KIB)))
    path = re.search(r'<path d="(M[^"]*Z)"', timeline_section(flat))
    assert path is not None
    assert re.fullmatch(r"M96.0 [\d.]+V[\d.]+H524.0V[\d.]+H952.0V[\d.]+Z", path[1])


def test_degenerate_timelines() -> None:
    for broken in (
        replace(TIMELINE, spans=(), memory=()),
        replace(TIMELINE, step_s=0.0, spans=(("x", "compute", 0.0, 0.0, ""),)),
        replace(TIMELINE, step_s=1e-300, spans=()),
    ):
        assert "no spans" in timeline_section(broken)
    assert "<svg" in timeline_section(replace(TIMELINE, spans=()))
    assert "<svg" in timeline_section(replace(TIMELINE, memory=()))
