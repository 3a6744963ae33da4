"""The planning benchmark's functions on a small model; no time is asserted."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
import torch

from autopar.cost.cluster import parse_cluster
from benchmarks.models import GPT
from benchmarks.planning import header, line_of
from benchmarks.planning_cases import (
    CASES,
    by_devices,
    by_layers,
    captured,
    replans,
    slower_network,
)
from benchmarks.planning_plot import Line, plot, round_up


def test_plans_and_replans_of_a_small_model() -> None:
    with torch.device("meta"):
        model = GPT(vocab=64, dim=32, layers=1, heads=2, context=16)
    cluster = parse_cluster("2xH100")
    of = captured(model, 2, 16)
    rows = replans(of, cluster, {"batch 4": (4, cluster), "again": (2, cluster)})
    assert [row["what"] for row in rows] == ["first", "batch 4", "again"]
    assert all(row["candidates"] >= row["solved"] >= 1 for row in rows)
    chosen = [{key: row[key] for key in ("plan", "step_s", "candidates")} for row in rows]
    assert chosen[2] == chosen[0]
    assert chosen[1] != chosen[0]
    cells = {"load_s": 0.0, "build_s": 0.0, "capture_s": 0.0, "total_s": 0.0, "total_cpu_s": 0.0}
    line = line_of("GPT", rows[0] | cells | {"peak_gib": 0.5})
    assert line.count("|") == header("model").splitlines()[0].count("|")


def test_a_slower_network_is_slower_between_hosts_only() -> None:
    cluster = parse_cluster("2x8xH100")
    slow = slower_network(cluster, 2.0)
    assert slow.levels[0] == cluster.levels[0]
    for kind, curves in cluster.levels[1].collectives.items():
        for fast, other in zip(curves, slow.levels[1].collectives[kind], strict=True):
            assert other.bandwidth(1e9) == pytest.approx(fast.bandwidth(1e9) / 2)
            assert other.alpha_s == fast.alpha_s


def test_sweeps_keep_what_they_do_not_vary() -> None:
    assert [case.layers for case in by_layers()] == [8, 16, 32, 64, 128]
    assert {(c.batch, c.sequence, c.devices) for c in by_layers()} == {(512, 8192, 256)}
    assert [case.devices for case in by_devices()] == [8, 64, 256, 1024, 4096, 16384]
    assert {c.batch / c.devices for c in by_devices()} == {2.0}
    assert [case.cluster for case in CASES] == ["32x8xH100", "128x8xH100", "384x8xH100"]


def test_a_plot_has_every_point_inside() -> None:
    lines = [Line("a & b", [(8, 1.0), (64, 3.0)]), Line("c", [(8, 2.5), (64, 0.0)])]
    root = ElementTree.fromstring(plot(lines, "title", "layers", "seconds"))
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 4 + len(lines)  # and the legend's
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for circle in circles:
        assert 0 < float(circle.attrib["cx"]) < width
        assert 0 < float(circle.attrib["cy"]) < height


def test_rounding_up_to_a_tick() -> None:
    found = [round_up(v) for v in (0.07, 1.0, 1.01, 4.9, 5.1)]
    assert all(math.isclose(a, b) for a, b in zip(found, (0.1, 1.0, 2.0, 5.0, 10.0), strict=True))
