"""The bandwidth benchmark, tried in the interpreter: every kernel gives the right result there."""

from __future__ import annotations

import json
from pathlib import Path

from autopar.runtime.kernels.registry import MODULES
from benchmarks.gpu.kernel_cases import CASES
from benchmarks.gpu.kernels import Row, main

ALONE = {"all_reduce_norm"}  # needs several GPUs


def test_results_are_right(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    main(["--device", "cpu", "--tiny", "--rounds", "1", "--calls", "1", "--json", str(out)])
    rows = json.loads(out.read_text())
    assert len(rows) == len(CASES)
    assert not [row for row in rows if "wrong result" in row["misses"]]
    assert all(row["ours_s"] > 0 for row in rows)


def test_every_kernel_has_a_case() -> None:
    assert {name.split(":")[0] for name in CASES} | ALONE >= set(MODULES)


def test_misses_are_named() -> None:
    good = Row("k", "c", 2000.0, 0.95, 1e-3, {"torch": 2e-3, "inductor": 1.1e-3}, 0.0, 0.0)
    assert good.misses == []
    bad = Row("k", "c", 2000.0, 0.5, 1e-3, {"torch": 0.9e-3}, float("nan"), 1.0)
    assert bad.misses == ["wrong result", "below the copy", "a baseline is faster"]
