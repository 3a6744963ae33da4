"""What the compiled path refuses, so that it runs op by op with its masks right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from autopar.runtime.compiled_dropout import CompiledDropout, UncompiledError


def in_place(x: Tensor) -> Tensor:
    return torch.dropout_(x.clone(), 0.5, True)


def in_a_branch(x: Tensor) -> Tensor:
    drops: Callable[[Tensor], Tensor] = lambda y: F.dropout(y, 0.5)  # noqa: E731
    return torch.cond(x.sum() > 0, drops, lambda y: y.clone(), (x,))


def of_any_number(x: Tensor, p: float = 0.5) -> Tensor:
    return F.dropout(x, p)


@pytest.mark.parametrize(
    ("function", "given", "what", "fix"),
    [
        (in_place, (), "in place", "F.dropout(x)"),
        (in_a_branch, (), "inside cond", "before or after cond"),
        (of_any_number, (0.25,), "probability is not known", "attribute of the module"),
    ],
)
def test_masks_without_numbers_are_not_compiled(
    function: Any, given: tuple[float, ...], what: str, fix: str
) -> None:
    """They would be torch's own, and shift the numbers of those after them."""
    run = torch.compile(function, backend=CompiledDropout("eager"), fullgraph=True, dynamic=True)
    with (
        torch._dynamo.config.patch(specialize_float=False),
        pytest.raises(BackendCompilerFailed) as raised,
    ):
        run(torch.ones(3), *given)
    refused = raised.value.inner_exception
    assert isinstance(refused, UncompiledError)
    assert what in refused.what and fix in str(refused.fix)
    line = function.__code__.co_firstlineno + 1
    assert refused.where == f"test_compiled_dropout.py:{line}"
