"""What the compiled path refuses, so that it runs op by op with its masks right."""

from __future__ import annotations

import pytest
import torch
import torch.fx

from autopar.runtime.compiled_dropout import UncompiledError, count_random_calls


def test_masks_drawn_in_place_are_not_compiled() -> None:
    """They would be torch's own, and shift the numbers of those after them."""
    graph = torch.fx.Graph()
    made = graph.call_function(torch.dropout_, (graph.placeholder("x"), 0.5, True))
    graph.output(made)
    with pytest.raises(UncompiledError, match="in place"):
        count_random_calls(torch.fx.GraphModule(torch.nn.Module(), graph))
