"""One launch over many tensors: every element once, whatever the sizes and the alignment."""

from __future__ import annotations

import pytest
import torch

from autopar.runtime.kernels.emit import Kernel, fill
from autopar.runtime.kernels.launch import launch
from autopar.runtime.kernels.table import Table, make_table

ADD = """
@triton.jit
def add(rows_ptr, blocks_ptr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.load(blocks_ptr + 2 * tl.program_id(0))
    first = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    entry = rows_ptr + row * 3
    n = tl.load(entry)
    x_ptr = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
    i = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(x_ptr + i, x + tl.load(entry + 2).to(tl.float32), mask=i < n)
"""


def add(table: Table, block: int) -> None:
    kernel = Kernel("add", fill(ADD))
    arguments = (table.rows, table.blocks)
    launch(kernel, (table.programs,), *arguments, ALIGNED=table.aligned, BLOCK=block)


@pytest.mark.parametrize("sizes", [(5, 0, 1, 700, 512), (0, 0), (256,), (257,)])
def test_every_element_once(sizes: tuple[int, ...]) -> None:
    tensors = [torch.zeros(n) for n in sizes]
    table = make_table([tensors, list(range(3, 3 + len(sizes)))], 256)
    assert table.programs == sum(-(-n // 256) for n in sizes)
    add(table, 256)
    for number, x in enumerate(tensors, 3):
        assert torch.equal(x, torch.full_like(x, number))


def test_alignment_is_that_of_the_addresses() -> None:
    x = torch.zeros(101)
    assert make_table([[x[:100]], [-1]], 256).aligned
    table = make_table([[x[1:]], [1]], 256)
    assert not table.aligned
    add(table, 256)
    assert x.sum() == 100


def test_other_numbers_make_another_table() -> None:
    x = torch.zeros(10)
    for number in (1, 2, -1):
        add(make_table([[x], [number]], 256), 256)
    assert torch.equal(x, torch.full((10,), 2.0))


def test_columns_of_different_lengths() -> None:
    with pytest.raises(ValueError, match=r"columns of lengths \[1, 2\]"):
        make_table([[torch.zeros(1)], [1, 2]], 256)
