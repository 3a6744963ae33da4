"""Passes on a captured graph before it is planned: what they make is planned and lowered."""

from __future__ import annotations

from autopar.ir.graph import Graph

from .decompose_random_attention import decompose_random_attention
from .free_factories import free_factories
from .index_whole_rows import index_whole_rows
from .join_log_softmax import join_log_softmax
from .unflatten_tokens import unflatten_tokens


def prepare(graph: Graph) -> Graph:
    """The graph that the planner sees."""
    apart = unflatten_tokens(join_log_softmax(decompose_random_attention(graph)))
    return index_whole_rows(free_factories(apart))
