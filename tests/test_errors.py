"""The text of an error is its interface: these tests quote it exactly."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

import autopar
from autopar.errors import PassError, ShardingWarning, UserError


def test_user_error_reads_what_where_fix() -> None:
    error = UserError(
        "forward() branches on the value of a tensor",
        where="model.py:31",
        fix="use torch.where instead of `if`",
    )
    assert str(error) == (
        "forward() branches on the value of a tensor\n"
        "  at:  model.py:31\n"
        "  fix: use torch.where instead of `if`"
    )


def test_user_error_leaves_out_what_it_does_not_know() -> None:
    assert str(UserError("the plan is for 8 ranks, this run has 4")) == (
        "the plan is for 8 ranks, this run has 4"
    )


def test_pass_error_reads_pass_invariant_node() -> None:
    error = PassError("propagate", "axis_used_once", "%h @ [dp, dp] uses an axis twice")
    assert str(error) == ("after propagate: axis_used_once fails: %h @ [dp, dp] uses an axis twice")
    assert str(PassError("p", "i", "s", node="%h: f32[4]")).endswith("\n  node: %h: f32[4]")


@pytest.mark.parametrize(
    "error", [UserError("a", "b.py:1", "c"), UserError("a"), PassError("p", "i", "s", "n")]
)
def test_errors_cross_processes(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_sharding_warning_is_a_user_warning() -> None:
    assert issubclass(ShardingWarning, UserWarning)


def test_autopar_is_light_to_import() -> None:
    probe = "import sys, autopar; print('torch' in sys.modules, 'autopar.api' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", probe], check=True, capture_output=True, text=True
    ).stdout
    assert out.split() == ["False", "False"]
    assert "parallelize" in dir(autopar)
    assert autopar.UserError is UserError


def test_unknown_attribute_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'paralelize'"):
        _ = autopar.paralelize
