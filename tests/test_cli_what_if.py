"""`autopar what-if`, as a user types it."""

from __future__ import annotations

import pytest

from autopar.cli_what_if import resized
from autopar.cost.cluster import parse_cluster
from autopar.errors import UserError

from .cli_helpers import run_main
from .test_cli_explain import answer, planned  # noqa: F401  # a fixture

Planned = tuple[str, str]


def test_another_batch(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    found = answer(capsys, "what-if", *planned, "--batch", "4096")
    before, same, new = found["before"], found["same_plan"], found["new_plan"]
    assert isinstance(before, dict) and isinstance(same, dict) and isinstance(new, dict)
    assert same["time_s"] > before["time_s"] and same["memory_bytes"] > before["memory_bytes"]
    assert found["ratio"] == pytest.approx(same["time_s"] / new["time_s"])
    assert new["time_s"] <= same["time_s"] * (1 + 1e-6) and same["fits"]


def test_fewer_devices_and_less_memory(
    planned: Planned,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run_main(capsys, "what-if", *planned, "--devices", "2", "--memory", "200KiB")
    assert code == 0
    assert "does not fit" in out and "on cpu:2" in out
    assert "the model fits on no plan" in out


def test_slower_links_take_longer(
    planned: Planned,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = answer(capsys, "what-if", *planned, "--bandwidth", "host=0.01", "--batch", "1024")
    same, new = found["same_plan"], found["new_plan"]
    assert isinstance(same, dict) and isinstance(new, dict)
    plain = answer(capsys, "what-if", *planned, "--batch", "1024")["same_plan"]
    assert isinstance(plain, dict) and same["time_s"] >= plain["time_s"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to change"),
        (("--batch", "0"), "--batch 0 is not positive"),
        (("--devices", "-4"), "--devices -4 is not positive"),
        (("--devices", "2", "--cluster", "cpu:2"), "leave one out"),
        (("--sequence", "128"), "fixed sequence length"),
        (("--memory", "much"), "cannot read the memory limit 'much'"),
        (("--bandwidth", "fast"), "cannot read the bandwidth 'fast'"),
        (("--bandwidth", "host=zero"), "cannot read the bandwidth"),
        (("--bandwidth", "host=-1"), "is not positive"),
        (("--bandwidth", "orbit=2"), "no level 'orbit'"),
        (("--cluster", "9xQ"), "cannot read the cluster"),
        (("--batch", "8", "--json", "/nowhere/x.json"), "its folder does not exist"),
    ],
)
def test_bad_input(
    planned: Planned,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    code, out, err = run_main(capsys, "what-if", *planned, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_clusters_are_resized_by_whole_hosts() -> None:
    pods = parse_cluster("2x8xH100")
    assert (resized(pods, 4).size, resized(pods, 32).size) == (4, 32)
    assert [level.size for level in resized(parse_cluster("4xH100"), 24).levels] == [8, 24]
    assert str(resized(parse_cluster("cpu:4"), 2)) == "cpu:2"
    with pytest.raises(UserError, match="12 devices are not whole hosts of 8"):
        resized(pods, 12)
