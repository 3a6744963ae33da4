"""The two hosts of benchmarks.two_hosts, and which contenders are run on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import two_hosts
from benchmarks.network import TwoHosts, missing
from benchmarks.two_hosts import Race, Result, verdict

needs_namespaces = pytest.mark.skipif(bool(missing()), reason=missing())

# Say who holds the hosts, then wait to be ended.
DRIVER = """
import time
from benchmarks.network import TwoHosts
with TwoHosts() as two:
    print(*(host.holder for host in two.hosts), flush=True)
    time.sleep(60)
"""


@needs_namespaces
def test_hosts_are_apart_and_joined_by_one_link() -> None:
    with TwoHosts() as two:
        two.set_rate(1e8)
        a, b = two.hosts
        names = [two._inside(host, "uname", "-n").strip() for host in two.hosts]
        assert names == [a.name, b.name]
        assert not set(a.cores) & set(b.cores)
        before = two.sent_bytes()
        message = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x' * {}, ('{}', 9))"
        two._inside(a, sys.executable, "-c", message.format(1400, b.address))
        sent = [after - first for first, after in zip(before, two.sent_bytes(), strict=True)]
        assert sent[0] > 1400 > sent[1]
        assert "rate 100Mbit" in two._inside(b, "tc", "qdisc", "show", "dev", "veth0")
        holders = [host.holder for host in two.hosts]
    assert not any(Path(f"/proc/{holder}/ns/net").exists() for holder in holders)


@needs_namespaces
def test_nothing_outlives_a_driver_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        holders = [int(word) for word in driver.stdout.readline().split()]
        assert len(holders) == 2
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        deadline = time.monotonic() + 10
        while any(os.path.exists(f"/proc/{holder}/ns/net") for holder in holders):
            assert time.monotonic() < deadline, "a holder outlives its driver"
            time.sleep(0.05)


def test_without_root_it_is_skipped_with_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["two_hosts"])
    assert two_hosts.main() == 0
    assert capsys.readouterr().out == "skipped: namespaces need root\n"


def race(sent: dict[str, float]) -> Race:
    nothing: Any = None
    return Race("gpt", nothing, Path(), 10e6, 2, 3, 1.0, 30.0, sent, "auto")


def test_what_cannot_be_the_best_is_not_run() -> None:
    results = {name: Result() for name in ("FSDP2 hybrid", "DDP", "FSDP2")}
    known = race({"FSDP2 hybrid": 100e6, "DDP": 150e6, "FSDP2": 90e6})
    assert not any(known._decided(name, results) for name in results), "nothing is timed yet"
    results["FSDP2 hybrid"].step_s = [12.0]
    assert known._decided("DDP", results) and results["DDP"].median_s == 15.0
    assert not known._decided("FSDP2", results), "its bytes take 9 s: it may be faster"
    assert not known._decided("FSDP2 hybrid", results), "it has more turns"
    results["FSDP2 hybrid"].step_s = [31.0]
    assert known._decided("FSDP2 hybrid", results), "a long step is timed once"


def test_the_verdict_compares_with_the_best_baseline() -> None:
    results = {
        "one process": Result(step_s=[1.0], losses=[2.0, 1.0]),
        "DDP": Result(step_s=[3.0, 9.0, 4.0]),
        "FSDP2": Result(at_least_s=5.0),
        "autopar": Result(step_s=[2.0], predicted_s=1.9, losses=[2.0, 1.1]),
    }
    made = verdict(results)
    assert (made["best"], made["ratio"]) == ("DDP", 2.0)
    assert made["predicted_over_measured"] == pytest.approx(0.95)
    assert made["loss_error"] == pytest.approx(0.1)
    results["DDP"].failure = "it ended"
    assert verdict(results)["best"] == "FSDP2"
