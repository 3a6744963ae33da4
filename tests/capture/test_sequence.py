"""The sequence length as a symbol, and plans that fit captures with and without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.capture import Capture, capture
from autopar.ir.text import print_graph
from tests.capture_helpers import assert_equals_eager
from tests.zoo import ZOO

from .deep import assert_identical, deep, folded_and_whole, is_folded


def lengths_of(captured: Capture) -> dict[Any, int]:
    """The symbols other than the batch, with their values at capture."""
    return {symbol: n for symbol, n in captured.symbols.items() if symbol.name != "b"}


def assert_fits_plain(symbolic: Capture, plain: Capture) -> None:
    """A plan made for `symbolic` serves `plain`, which has a symbolic batch only."""
    assert symbolic.fingerprint == plain.fingerprint
    assert [s.name for s in plain.symbols] == ["b"]
    fixed = symbolic.specialised(lengths_of(symbolic))
    assert print_graph(fixed.graph) == print_graph(plain.graph)
    assert (fixed.symbols, fixed.symbol_of) == (plain.symbols, plain.symbol_of)
    kept = {node.name: node.target for node in symbolic.graph.calls()}
    for node in plain.graph.calls():
        assert kept.pop(node.name) == node.target
    assert all(name.rstrip("_0123456789").endswith("_dynamic") for name in kept)


@pytest.mark.parametrize(
    "name",
    [
        "gpt",
        "hf_bert",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "hf_gpt2")),
    ],
)
def test_symbolic_sequence_equals_eager_and_fits_other_lengths(name: str) -> None:
    entry = ZOO[name]
    module = entry.double(entry.build().double()).train()
    args, kwargs = entry.inputs(0, torch.float64)
    captured = capture(module, args, kwargs, dynamic_sequence=True)
    assert [s.name for s in captured.symbols] == ["b", "s"]
    if name in ("gpt", "llama"):  # attention stays one causal operation
        calls = [n for n in captured.graph.calls() if "attention" in n.name]
        assert calls and all(any(a is True for a in (*n.args, *n.kwargs.values())) for n in calls)
    assert_equals_eager(captured, module, args, kwargs, entry.loss)
    args, kwargs = entry.inputs(1, torch.float64, entry.batch_size // 2 + 1)
    args = tuple(a[:, :5].contiguous() for a in args)
    kwargs = {k: v[:, :5].contiguous() for k, v in kwargs.items()}
    assert_equals_eager(captured, module, args, kwargs, entry.loss)
    plain = capture(module, *entry.inputs(0, torch.float64))
    assert_fits_plain(captured, plain)


@pytest.mark.parametrize("name", ["gpt", pytest.param("hf_llama", marks=pytest.mark.slow)])
def test_folded_with_symbolic_sequence(name: str) -> None:
    module, args, kwargs = deep(name, 5)
    folded, whole = folded_and_whole(module, args, kwargs, dynamic_sequence=True)
    assert is_folded(folded) and len(folded.symbols) == 2
    assert_identical(folded, whole)
    assert_fits_plain(folded, capture(module, args, kwargs))


class Tokens(nn.Module):
    """Embeds tokens and applies a function to (module, hidden, tokens)."""

    def __init__(self, function: Any, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.register_buffer("table", torch.randn(length, 8))
        self.function = function

    def forward(self, ids: Tensor, *rest: Tensor) -> Any:
        return self.function(self, self.embed(ids), *rest)


def with_mask(self: Any, x: Tensor, targets: Tensor) -> Tensor:
    """What people write before they know of is_causal."""
    s = x.shape[1]
    mask: Tensor = torch.triu(torch.full((s, s), float("-inf")), diagonal=1)
    positions = torch.arange(s).unsqueeze(0).expand(x.shape[0], -1)
    table: Tensor = self.table[positions]
    x = x + table
    y = F.softmax(x @ x.transpose(1, 2) / s**0.5 + mask, dim=-1) @ x
    return (y.sum(-1) - targets).square().mean()


def cut_table(self: Any, x: Tensor, targets: Tensor) -> Tensor:
    table: Tensor = self.table[: x.shape[1]]
    return ((x + table).sum(-1) * targets).sum() / x.shape[1]


def whole_table(self: Any, x: Tensor) -> Tensor:
    table: Tensor = self.table
    return x + table


def whole_table_and_targets(self: Any, x: Tensor, targets: Tensor) -> Tensor:
    logits = whole_table(self, x)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten() % 8)


def both_sizes(self: Any, x: Tensor) -> Tensor:
    return x.sum(-1) @ x.sum(-1)


def capture_tokens(
    function: Any, table: int, batch: int, length: int, inputs: int = 2, **options: Any
) -> Capture:
    torch.manual_seed(0)
    module = Tokens(function, table)
    ids = [torch.randint(32, (batch, length)) for _ in range(inputs)]
    captured = capture(module, ids, {}, **options)
    assert_equals_eager(captured, module, ids, tolerance=1e-5)
    return captured


@pytest.mark.parametrize(("batch", "length"), [(4, 6), (6, 6), (4, 12)])
def test_masks_positions_and_tables_of_the_sequence(batch: int, length: int) -> None:
    for function in (with_mask, cut_table):
        captured = capture_tokens(function, 12, batch, length, dynamic_sequence=True)
        assert {s.name: n for s, n in captured.symbols.items()} == {"b": batch, "s": length}
        assert captured.notes == ()
        assert captured.bind([torch.zeros(5, 7, dtype=torch.int64)] * 2) is not None
        assert captured.bind([torch.zeros(5, n, dtype=torch.int64) for n in (7, 8)]) is None
        assert_fits_plain(captured, capture_tokens(function, 12, batch, length))


def test_a_cut_that_cuts_nothing_is_in_the_symbolic_graph_only() -> None:
    captured = capture_tokens(cut_table, 12, 4, 12, dynamic_sequence=True)
    dynamic = [node.name for node in captured.graph.calls() if node.name.endswith("_dynamic")]
    assert dynamic == ["slice_dynamic"]
    plain = capture_tokens(cut_table, 12, 4, 12)
    assert not any("slice" in node.name for node in plain.graph.calls())
    assert captured.bind([torch.zeros(4, 13, dtype=torch.int64)] * 2) is None


def test_sequence_that_forward_fixes_is_static() -> None:
    for function, batch, length, inputs in (
        (whole_table, 4, 12, 1),
        (whole_table_and_targets, 4, 12, 2),
        (both_sizes, 6, 6, 1),
    ):
        captured = capture_tokens(function, 12, batch, length, inputs, dynamic_sequence=True)
        assert [s.name for s in captured.symbols] in (["b"], [])
        (note,) = captured.notes
        assert note.startswith("the sequence is static") and str(length) in note
        assert_identical(captured, capture_tokens(function, 12, batch, length, inputs))


def test_images_and_features_have_no_sequence() -> None:
    images = torch.randn(4, 8, 8, 8)
    for module, x in ((nn.Conv2d(8, 8, 3), images), (nn.Linear(8, 8), torch.randn(4, 8))):
        captured = capture(module, (x,), {}, dynamic_sequence=True)
        assert [s.name for s in captured.symbols] == ["b"] and captured.notes == ()
    captured = capture(nn.Linear(8, 8), (torch.randn(4, 6, 8),), {}, dynamic_sequence=True)
    assert [s.name for s in captured.symbols] == ["b", "s"]


def test_specialised_checks_guards_and_batch_may_be_fixed() -> None:
    captured = capture_tokens(cut_table, 12, 4, 6, dynamic_sequence=True)
    b, s = captured.symbols
    with pytest.raises(ValueError, match="not right for"):
        captured.specialised({s: 13})
    fixed = captured.specialised({b: 5, s: 12})
    assert fixed.symbols == {} and fixed.symbol_of == () and fixed.guards == ()
    ids = [torch.randint(32, (5, 12)) for _ in range(2)]
    assert_equals_eager(fixed, Tokens(cut_table, 12), ids, tolerance=1e-5)
    assert captured.specialised({}).graph.fx is not captured.graph.fx


def test_fingerprint_does_not_depend_on_lengths() -> None:
    (small, large) = (
        capture_tokens(with_mask, 12, batch, length, dynamic_sequence=True)
        for batch, length in ((4, 6), (3, 9))
    )
    names = [[node.name for node in captured.graph.calls()] for captured in (small, large)]
    assert names[0] == names[1]
