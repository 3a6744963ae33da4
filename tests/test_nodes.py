"""The options of several hosts."""

from __future__ import annotations

import pytest

from autopar.errors import UserError
from autopar.nodes import Nodes, check_nodes


def test_one_host_needs_nothing() -> None:
    assert check_nodes(1, None, "") == Nodes() == check_nodes(1, 0, "ignored")


def test_two_hosts() -> None:
    given = check_nodes(2, 1, "10.0.0.1:29500")
    assert (given.count, given.this, given.backend) == (2, 1, "static")
    assert given.endpoint == "10.0.0.1:29500"
    assert check_nodes(2, None, "[::1]:9").backend == "c10d"
    assert check_nodes(2, None, "[::1]:9").host == "::1"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0, None, ""), "0 hosts"),
        ((1, 1, ""), "--node-rank 1 of one host"),
        ((2, 2, "a:1"), "--node-rank 2 of 2 hosts"),
        ((2, 0, ""), "a place to meet"),
        ((2, 0, "a"), "no HOST:PORT"),
        ((2, 0, "a:70000"), "no HOST:PORT"),
        ((2, None, "a:1", "static"), "which host is this"),
        ((2, 0, "a:1", "etcd"), "unknown rendezvous"),
    ],
)
def test_nonsense_is_named(arguments: tuple[int, int | None, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_nodes(*arguments)
