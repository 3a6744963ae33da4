"""How ranks are found to lie on hosts."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from autopar.runtime.arena import Memory
from autopar.runtime.hosts import even_hosts, host_identity
from autopar.runtime.shared_memory import _CONTROL_BYTES, _NONCE, _Offer, _opened


@pytest.mark.parametrize(
    ("hosts", "each"),
    [
        ("a", 1),
        ("aaaa", 4),
        ("aabb", 2),
        ("abcd", 1),
        ("abbb", None),
        ("aba", None),
        ("abab", None),
    ],
)
def test_members_per_host(hosts: str, each: int | None) -> None:
    assert even_hosts(hosts) == each


def test_the_environment_names_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOPAR_HOST", raising=False)
    own = host_identity()
    assert own and own == host_identity()
    monkeypatch.setenv("AUTOPAR_HOST", "left")
    assert host_identity() == "left"


def test_containers_are_not_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOPAR_HOST", raising=False)
    mine = host_identity()
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    assert host_identity() != mine


def test_memory_of_another_process_is_not_taken_for_a_peers() -> None:
    controls = [Memory.create(_CONTROL_BYTES) for _ in range(2)]
    for control in controls:
        control.map[_NONCE:_CONTROL_BYTES] = b"n" * 16
    fds = (controls[0].fd, controls[1].fd)
    mine = _Offer("host", os.getpid(), fds, b"n" * 16)
    assert len(_opened([mine, mine], 0, controls, 1) or []) == 2
    stranger = replace(mine, nonce=b"m" * 16)  # has the same numbers, elsewhere
    assert _opened([mine, stranger], 0, controls, 1) is None
    small = Memory.create(4096)
    other_file = replace(mine, controls=(small.fd, small.fd))
    assert _opened([mine, other_file], 0, controls, 0) is None
    assert _opened([mine, replace(mine, controls=(10**6, 10**6))], 0, controls, 0) is None
