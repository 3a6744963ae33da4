"""Which inputs are known to be indices, and the error for one that is out of bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.capture import capture
from autopar.index_checks import check_indices, indices_of
from autopar.passes.prepare import prepare

ROWS = 7


class Looked(nn.Module):
    """Looks up something in a table of 7 rows."""

    def __init__(self, look: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ROWS, 4))
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        return self.look(self.weight, x).square().mean()


def bags(weight: Tensor, x: Tensor) -> Tensor:
    return F.embedding_bag(x.select(1, 0), weight, torch.tensor([0, 2]))


# The input is [4, 5]; its first column has what is looked up.
LOOKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "embedding": lambda weight, x: F.embedding(x, weight),
    "a column": lambda weight, x: F.embedding(x[:, 0], weight),
    "a slice": lambda weight, x: F.embedding(x[:, :1].flatten(), weight),
    "all but": lambda weight, x: F.embedding(x[:, :-4], weight),
    "of a split": lambda weight, x: F.embedding(x.split([1, 4], 1)[0].squeeze(1), weight),
    "of floats": lambda weight, x: F.embedding((x.double()[:, 0]).long(), weight),
    "smaller integers": lambda weight, x: F.embedding(x[:, 0].to(torch.int32), weight),
    "embedding_bag": bags,
    "index_select": lambda weight, x: weight.index_select(0, x[:, 0]),
    "gather": lambda weight, x: weight.gather(0, x[:, :1].expand(-1, 4)),
    "index": lambda weight, x: weight[x[:, 0]],
    "second dim": lambda weight, x: weight.t()[:, x[:, 0]],
}


@pytest.mark.parametrize("name", LOOKS)
def test_indices_are_seen(name: str) -> None:
    x = torch.zeros(4, 5, dtype=torch.int64)
    model = Looked(LOOKS[name])
    made = capture(model, (x,), {})
    found = indices_of(prepare(made.graph))
    check_indices(found, made.flatten((x,), {}))
    x[2, 0] = ROWS - 1
    check_indices(found, made.flatten((x,), {}))
    x[2, 0] = ROWS
    with pytest.raises(
        IndexError, match=rf"index 7 is out of bounds for a (table|dim) of size {ROWS}"
    ):
        check_indices(found, made.flatten((x,), {}))
    with pytest.raises((IndexError, RuntimeError)):
        model(x)
    x[2, 0] = -1
    if name in ("index", "second dim"):
        check_indices(found, made.flatten((x,), {}))
        x[2, 0] = -ROWS - 1
    with pytest.raises(IndexError, match=r"index -\d is out of bounds"):
        check_indices(found, made.flatten((x,), {}))


def test_indices_of_two_dims_are_below_the_smaller_one() -> None:
    x = torch.zeros(4, dtype=torch.int64)
    made = capture(Looked(lambda weight, x: weight[x, x]), (x,), {})
    found = indices_of(prepare(made.graph))
    x[2] = 3
    check_indices(found, made.flatten((x,), {}))
    x[2] = 4  # a row, but no column
    with pytest.raises(IndexError, match="index 4 is out of bounds for a dim of size 4"):
        check_indices(found, made.flatten((x,), {}))


def test_other_columns_are_not_indices() -> None:
    x = torch.zeros(4, 5, dtype=torch.int64)
    made = capture(Looked(LOOKS["a column"]), (x,), {})
    x[:, 1:] = 100
    check_indices(indices_of(prepare(made.graph)), made.flatten((x,), {}))


def test_indices_that_are_computed_are_not_followed() -> None:
    x = torch.zeros(4, 5, dtype=torch.int64)
    made = capture(Looked(lambda weight, x: F.embedding(x % ROWS, weight)), (x,), {})
    assert indices_of(prepare(made.graph)) == ()


def test_ignored_classes_may_be_there() -> None:
    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return F.cross_entropy(weight.t()[:, :], x[:, 0], ignore_index=-100)

    x = torch.zeros(4, 5, dtype=torch.int64)
    made = capture(Looked(loss), (x,), {})
    found = indices_of(prepare(made.graph))
    x[:, 0] = -100
    check_indices(found, made.flatten((x,), {}))
    x[1, 0] = -1
    with pytest.raises(IndexError, match="index -1 is out of bounds for classes of size 7"):
        check_indices(found, made.flatten((x,), {}))
