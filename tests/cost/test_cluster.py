from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from autopar.cost.cluster import Cluster, group_span, make_mesh, mesh_levels, parse_cluster
from autopar.cost.curve import Curve
from autopar.cost.profile import (
    cluster_from_json,
    cluster_to_json,
    load_profile,
    save_profile,
    shipped_profile,
    shipped_profiles,
)
from autopar.errors import UserError


def test_curve_interpolates_in_logs_and_is_constant_outside() -> None:
    curve = Curve.of([(100, 4.0), (1, 1.0)])
    assert curve(10) == pytest.approx(2.0)
    assert curve(1e-3) == 1.0 and curve(1e6) == 4.0


@pytest.mark.parametrize(
    ("spec", "size", "host", "levels"),
    [("cpu:4", 4, 4, 1), ("8xH100", 8, 8, 1), ("2x8xh100", 16, 8, 2), ("32x4xA100", 128, 4, 2)],
)
def test_specs(spec: str, size: int, host: int, levels: int) -> None:
    cluster = parse_cluster(spec)
    assert (cluster.size, cluster.host_size, len(cluster.levels)) == (size, host, levels)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("H100", "cannot read the cluster 'H100'"),
        ("8xH900", "cannot read the cluster '8xH900'"),
        ("cpu:", "cannot read the cluster 'cpu:'"),
        ("4xcpu-gloo-", "cannot read the cluster"),
        ("-1xH100", "cannot read the cluster"),
        ("", "cannot read the cluster ''"),
        ("0xH100", "the cluster '0xH100' has no devices"),
        ("cpu:0", "the cluster 'cpu:0' has no devices"),
        ("16xH100", "has 16 devices in one host, but a host of H100 has 8"),
        ("no/such/file.json", "cannot read the cluster profile no/such/file.json: No such file"),
    ],
)
def test_bad_specs_say_what_is_accepted(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_cluster(spec)
    assert message in caught.value.what
    assert caught.value.fix


def test_ranks_share_the_hosts_memory() -> None:
    four, eight = parse_cluster("cpu:4"), parse_cluster("cpu:8")
    assert eight.device.memory_bytes * 2 == pytest.approx(four.device.memory_bytes)


def test_one_process_has_all_the_threads() -> None:
    cluster = parse_cluster("cpu:4")
    assert cluster.device_for(1) is cluster.single
    assert cluster.device_for(4) is cluster.device
    h100 = parse_cluster("8xH100")
    assert h100.device_for(1) is h100.device


def test_axes_fill_a_host_before_they_cross_the_network() -> None:
    cluster = parse_cluster("8x8xH100")
    mesh = make_mesh(cluster, {"dp": 8, "tp": 8})
    assert [(axis.name, axis.level) for axis in mesh] == [("dp", 1), ("tp", 0)]
    assert mesh_levels(cluster, (2, 4, 8)) == (0, 0, 1)
    assert mesh_levels(cluster, (1, 16, 4)) == (0, 1, 1)
    assert mesh_levels(cluster, (3, 2)) == (1, 1)


def test_span_counts_devices_in_a_host_and_hosts() -> None:
    cluster = parse_cluster("2x8xH100")
    mesh = make_mesh(cluster, {"dp": 4, "tp": 4})
    assert group_span(cluster, mesh, ("tp",)) == (4, 1)
    assert group_span(cluster, mesh, ("dp",)) == (2, 2)
    assert group_span(cluster, mesh, ("dp", "tp")) == (8, 2)
    assert group_span(cluster, make_mesh(cluster, {"dp": 2, "tp": 8}), ("dp",)) == (1, 2)


def test_a_mesh_must_fit() -> None:
    with pytest.raises(UserError, match="dp=4 x tp=4 needs 16 devices, but 8xH100 has 8"):
        make_mesh(parse_cluster("8xH100"), {"dp": 4, "tp": 4})
    with pytest.raises(UserError, match="'dp' has size 0"):
        make_mesh(parse_cluster("8xH100"), {"dp": 0})


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_round_trip_and_name_their_sources(name: str, tmp_path: Path) -> None:
    cluster = shipped_profile(name)
    save_profile(cluster, tmp_path / "again.json")
    assert load_profile(tmp_path / "again.json") == cluster
    assert [f.name for f in tmp_path.iterdir()] == ["again.json"]
    document = cluster_to_json(cluster)

    def check(data: Any, at: str) -> None:
        if isinstance(data, dict):
            if "source" in data:
                assert data["source"], f"{name}: {at} has no source"
                assert not data["source"].startswith("/")
            for key, item in data.items():
                check(item, f"{at}.{key}")
        elif isinstance(data, list):
            for i, item in enumerate(data):
                check(item, f"{at}[{i}]")

    check(document, "")


def test_every_device_ships() -> None:
    wanted = {"cpu-gloo", "v100", "a100", "h100", "h200", "b200", "mi300x"}
    assert wanted <= set(shipped_profiles())


def _document() -> dict[str, Any]:
    return copy.deepcopy(cluster_to_json(shipped_profile("h100")))


def _edit(path: str, value: Any) -> dict[str, Any]:
    document: Any = _document()
    at = document
    *parents, last = path.split(".")
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at[key]
    if value is KeyError:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return document  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("version", 2, "has version 2; this autopar reads version 1"),
        ("version", KeyError, "the document has no 'version'"),
        ("device", KeyError, "the document has no 'device'"),
        ("extra", 1, "the document has an unknown entry 'extra'"),
        ("name", 3, "name is 3, not a text"),
        ("device.memory_bytes.value", -1, "device.memory_bytes.value is -1, not a positive number"),
        ("device.memory_bytes.value", True, "is True, not a positive number"),
        ("device.op_overhead_s.value", float("inf"), "is inf, not a positive number"),
        ("device.op_overhead_s", 1.0, "device.op_overhead_s is not an object"),
        ("device.op_overhead_s.source", KeyError, "device.op_overhead_s has no 'source'"),
        ("device.rates", {}, "device.rates has no 'matmul'"),
        ("device.bandwidth", {}, "device.bandwidth has no 'default'"),
        ("device.narrow.points", [], "device.narrow.points is not a list of [x, y] pairs"),
        ("device.narrow.points", [[1, 2, 3]], "points[0] is [1, 2, 3], not a pair [x, y]"),
        ("device.narrow.points", [[2, 1], [1, 1]], "are not in ascending order at index 1"),
        ("device.narrow.points", [[1, "fast"]], "is 'fast', not a positive number"),
        ("levels", [], "levels is not a list of levels"),
        ("levels.0.size", 0, "levels[0].size is 0, not a positive whole number"),
        ("levels.0.size", 3, "has 8192 devices, not a multiple of the 3 of level 'host'"),
        ("levels.0.collectives.all_gather", KeyError, "has no 'all_gather'"),
        ("levels.0.collectives.all_gather", [], "all_gather is not a list of curves"),
        ("levels.0.collectives.all_gather.0.group", 1, "a group has at least 2 members"),
        ("levels.0.collectives.all_gather.0.group", 9, "is not in ascending order of group"),
    ],
)
def test_malformed_profiles(path: str, value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(_edit(path, value)))
    with pytest.raises(UserError) as caught:
        load_profile(file)
    assert message in caught.value.what
    assert str(file) in caught.value.what
    assert caught.value.fix


def test_truncated_profile(tmp_path: Path) -> None:
    text = json.dumps(_document())
    for cut in (0, 1, len(text) // 2, len(text) - 1):
        (tmp_path / "cut.json").write_text(text[:cut])
        with pytest.raises(UserError, match="is not JSON, perhaps truncated"):
            load_profile(tmp_path / "cut.json")


def test_files_that_are_no_profiles(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="the document is not an object"):
        load_profile(tmp_path / "list.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="it is not a text file"):
        load_profile(tmp_path / "binary.json")
    with pytest.raises(UserError, match="cannot read the cluster profile"):
        load_profile(tmp_path)


def test_a_document_reads_back_equal() -> None:
    cluster: Cluster = cluster_from_json(json.loads(json.dumps(_document())))
    assert cluster == shipped_profile("h100")
    assert hash(cluster) == hash(shipped_profile("h100"))
