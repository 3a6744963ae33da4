"""What is said of a forward that is not compiled: why, where and what to change."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo import exc

from autopar.errors import UserError
from autopar.runtime.not_compiled import note_backend, why_not_compiled


def forward() -> None:
    """Stands for a user's."""


HERE = f"test_not_compiled.py:{forward.__code__.co_firstlineno}"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (exc.InternalTorchDynamoError("AttributeError: no\nmore"), "TorchDynamoError: Attr"),
        (exc.TorchRuntimeError(""), "TorchRuntimeError"),
        (exc.BackendCompilerFailed(print, IndexError(), None), "IndexError"),
        (exc.BackendCompilerFailed(print, ValueError("\n\nno\nmore"), None), "ValueError: no"),
        (exc.Unsupported("Observed exception"), "Unsupported: Observed exception"),
        (IndexError(), "IndexError"),
        (exc.FailOnRecompileLimitHit(""), "compiled anew too often"),
    ],
)
def test_every_failure_has_a_reason_a_place_and_a_way_out(error: Exception, said: str) -> None:
    found = why_not_compiled(error, forward)
    assert said in found.what and "more" not in found.what
    assert found.where == HERE
    assert found.fix


def test_a_graph_break_has_the_line_and_remedy_of_a_capture() -> None:
    def branches(x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x

    with pytest.raises(exc.Unsupported) as raised:
        torch.compile(branches, backend="eager", fullgraph=True)(torch.ones(3))
    found = why_not_compiled(raised.value, forward)
    assert found.where == f"test_not_compiled.py:{branches.__code__.co_firstlineno + 1}"
    assert "branches on a tensor's value" in found.what and "torch.where" in str(found.fix)


def test_what_a_backend_of_ours_refuses_is_said_as_it_is() -> None:
    refused = UserError("it does", "model.py:3", "do not")
    assert why_not_compiled(exc.BackendCompilerFailed(print, refused, None), forward) is refused


def test_only_a_failure_of_the_backend_is_noted() -> None:
    failed, other = exc.BackendCompilerFailed(print, ValueError("no"), None), ValueError("no")
    note_backend(failed, forward)
    note_backend(other, forward)
    assert failed.__notes__ == [
        f"autopar compiles the forward of {HERE}; to run it op by op, "
        'pass backend="eager" to autopar.parallelize'
    ]
    assert not hasattr(other, "__notes__")
