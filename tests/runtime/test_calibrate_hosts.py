"""`autopar calibrate` on two "hosts" of this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from autopar.cost.cluster import COLLECTIVE_KINDS
from autopar.cost.profile import load_profile
from tests.e2e.test_two_hosts import free_port, on_two_hosts


@pytest.mark.slow
@pytest.mark.multiprocess
def test_both_levels_are_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "autopar.cli", "calibrate", "--quick", "--nproc", "2"]
    place = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    files = [tmp_path / f"{i}.json" for i in range(2)]
    done = on_two_hosts(
        *([*command, *place, "--node-rank", str(i), "--out", str(files[i])] for i in range(2)),
        timeout_s=500,
    )
    assert [code for code, _, _ in done] == [0, 0], done
    here, there = (load_profile(file) for file in files)
    assert [(level.name, level.size) for level in here.levels] == [("host", 2), ("network", 4)]
    for level in here.levels:
        assert set(level.collectives) == set(COLLECTIVE_KINDS)
        assert all(c.group == 2 for curves in level.collectives.values() for c in curves)
    assert here.levels == there.levels, "all hosts hear the same"
    assert here.device.overlap_slowdown >= 0 and here.single is not None
