from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autopar.cost.cluster import parse_cluster
from autopar.cost.profile import (
    OPTIONAL_FIGURES,
    cluster_from_json,
    cluster_to_json,
    load_profile,
    save_profile,
    shipped_profile,
    shipped_profiles,
)
from autopar.errors import UserError


def document(**figures: float) -> dict[str, Any]:
    """The CPU profile without optional figures but those given."""
    made: dict[str, Any] = json.loads(json.dumps(cluster_to_json(parse_cluster("cpu:4"))))
    for device in (made["device"], made["single"]):
        for name in OPTIONAL_FIGURES:
            device.pop(name, None)
    for name, value in figures.items():
        made["device"][name] = {"value": value, "source": "test"}
    return made


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_are_what_they_are_written_as(name: str) -> None:
    cluster = shipped_profile(name)
    assert cluster_from_json(json.loads(json.dumps(cluster_to_json(cluster)))) == cluster


def test_optional_figures_are_zero_where_a_profile_has_none() -> None:
    device = cluster_from_json(document()).device
    assert [getattr(device, name) for name in OPTIONAL_FIGURES] == [0.0] * len(OPTIONAL_FIGURES)


@pytest.mark.parametrize("name", OPTIONAL_FIGURES)
def test_optional_figures_are_kept_with_their_source(name: str, tmp_path: Path) -> None:
    cluster = cluster_from_json(document(**{name: 0.25}))
    save_profile(cluster, tmp_path / "p.json")
    device = load_profile(tmp_path / "p.json").device
    assert getattr(device, name) == 0.25
    assert device.sources[name] == "test"


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"serial_traffic": -0.1}, r"device\.serial_traffic\.value is -0\.1"),
        ({"optimizer_overhead_s": float("nan")}, r"optimizer_overhead_s\.value is nan"),
        ({"serial_trafic": 1.0}, "unknown entry 'serial_trafic'"),
    ],
)
def test_wrong_figures_are_named(figures: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cluster_from_json(document(**figures))
