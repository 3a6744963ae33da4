"""Two "hosts" on one machine: namespaces joined by a virtual link of a bandwidth that `tc` sets.

A host is a network and a UTS namespace that a small process holds open, with an even part of the
cores. Nothing of it is seen outside and nothing is left behind: the kernel takes the namespaces and
the link down with their last process, and the holders end when this process does, however it does.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Self

INTERFACE = "veth0"
_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000  # linux/sched.h
# tbf lets so much through at once: what the link carries between two looks at the clock, and ten
# packets. More would let small messages pass a link as if it were fast.
_BURST_S, _LEAST_BURST_BYTES = 1e-3, 16 << 10
_LATENCY_MS = 200  # of the queue before the link: longer, and packets are dropped


@dataclass(frozen=True)
class Host:
    """A place for processes: the process that holds the namespaces, cores, and an address."""

    name: str
    holder: int
    cores: tuple[int, ...]
    address: str

    def enter(self) -> None:
        """Move this process, which must not have made threads, into the host."""
        libc = ctypes.CDLL(None, use_errno=True)
        for kind, flag in (("net", _CLONE_NEWNET), ("uts", _CLONE_NEWUTS)):
            fd = os.open(f"/proc/{self.holder}/ns/{kind}", os.O_RDONLY)
            try:
                if libc.setns(fd, flag):
                    raise OSError(ctypes.get_errno(), f"cannot enter the {kind} namespace")
            finally:
                os.close(fd)
        os.sched_setaffinity(0, self.cores)


def missing() -> str:
    """Why two hosts cannot be made here, or an empty text."""
    if not sys.platform.startswith("linux"):
        return "namespaces need Linux"
    if os.geteuid() != 0:
        return "namespaces need root"
    absent = [tool for tool in ("ip", "tc", "nsenter") if shutil.which(tool) is None]
    if absent:
        return f"{' and '.join(absent)} not found (Debian: iproute2, util-linux)"
    if len(os.sched_getaffinity(0)) < 2:
        return "two hosts need two cores"
    return ""


class TwoHosts:
    """Two hosts and the link between them; use it as a context manager."""

    def __init__(self) -> None:
        self._holders: list[subprocess.Popen[bytes]] = []
        self.hosts: tuple[Host, ...] = ()

    def __enter__(self) -> Self:
        cores = sorted(os.sched_getaffinity(0))
        half = len(cores) // 2
        try:
            for i in range(2):
                name = f"autopar-{os.getpid()}-{i}"
                holder = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.network", name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
                self._holders.append(holder)
                part = tuple(cores[i * half : (i + 1) * half])
                self.hosts += (Host(name, holder.pid, part, f"192.0.2.{i + 1}"),)  # RFC 5737
            for holder in self._holders:
                assert holder.stdout is not None
                if holder.stdout.readline() != b"ready\n":
                    raise OSError("cannot make a namespace")
            self._join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for holder in self._holders:
            holder.kill()
        for holder in self._holders:
            holder.communicate()
        self._holders, self.hosts = [], ()

    def _join(self) -> None:
        a, b = self.hosts
        _run(
            *("ip", "link", "add", INTERFACE, "netns", str(a.holder), "type", "veth"),
            *("peer", "name", INTERFACE, "netns", str(b.holder)),
        )
        for host in self.hosts:
            self._inside(host, "ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                self._inside(host, "ip", "link", "set", device, "up")

    def set_rate(self, bits_per_s: float) -> None:
        """Let the link carry so much in each direction."""
        burst = max(int(bits_per_s / 8 * _BURST_S), _LEAST_BURST_BYTES)
        for host in self.hosts:
            self._inside(
                host,
                *("tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf"),
                *("rate", f"{bits_per_s:.0f}bit", "burst", f"{burst}b"),
                *("latency", f"{_LATENCY_MS}ms"),
            )

    def sent_bytes(self) -> tuple[int, ...]:
        """What each host has sent to the other so far, headers counted."""
        sent = []
        for host in self.hosts:
            text = self._inside(host, "ip", "-json", "-statistics", "link", "show", INTERFACE)
            sent.append(int(json.loads(text)[0]["stats64"]["tx"]["bytes"]))
        return tuple(sent)

    @staticmethod
    def _inside(host: Host, *command: str) -> str:
        return _run("nsenter", "--target", str(host.holder), "--net", "--uts", *command)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _hold(name: str) -> None:
    """Make the namespaces and stay until standard input ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET | _CLONE_NEWUTS):
        raise OSError(ctypes.get_errno(), "cannot make namespaces")
    socket.sethostname(name)
    print("ready", flush=True)
    sys.stdin.buffer.read()


if __name__ == "__main__":
    _hold(sys.argv[1])
