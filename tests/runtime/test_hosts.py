"""How ranks are found to lie on hosts."""

from __future__ import annotations

import pytest

from autopar.runtime.hosts import even_hosts, host_identity


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
