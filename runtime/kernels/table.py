"""Many tensors in one launch: a table on the device that says where each of them is.

A row per tensor: its number of elements, then what the kernel asks for, an address or a number. A
program finds its row and its block of that row by its id:

    row = tl.load(blocks_ptr + 2 * tl.program_id(0))
    first = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    entry = rows_ptr + row * COLUMNS
    n = tl.load(entry)
    x_ptr = tl.load(entry + 1).to(tl.pointer_type(tl.float32))

Addresses change from step to step, as gradients are freed and made again, but rarely: a table is
kept on the device and found again by its contents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import or_

import numpy as np
import torch
from torch import Tensor

from .launch import cdiv

ALIGNMENT = 16  # bytes: what a 128-bit load or store needs
TABLES = 512  # more than a step asks for: six per block of a model whose parameters are gathered


@dataclass(frozen=True)
class Table:
    """`rows` is int64 [tensors, columns], `blocks` int32 [programs, 2]: a row, and a block in it.

    `aligned` says that all addresses are multiples of 16 bytes. The table does not keep alive what
    it points to.
    """

    rows: Tensor
    blocks: Tensor
    aligned: bool

    @property
    def programs(self) -> int:
        return self.blocks.shape[0]


def make_table(columns: Sequence[Sequence[Tensor | int]], block: int) -> Table:
    """The table of `columns`: of tensors, whose addresses they are, or of numbers.

    The first column's tensors give the device and the numbers of elements. A tensor without
    elements has a row and no program. Raises ValueError for columns of different lengths.
    """
    first = [x for x in columns[0] if isinstance(x, Tensor)]
    if any(len(column) != len(first) for column in columns):
        raise ValueError(f"table: columns of lengths {[len(c) for c in columns]}")
    sizes = tuple([x.numel() for x in first])
    entries, aligned = [sizes], True
    for column in columns:
        found = tuple([x.data_ptr() if isinstance(x, Tensor) else x for x in column])
        entries.append(found)
        if isinstance(column[0], Tensor):
            aligned = aligned and not reduce(or_, found) % ALIGNMENT
    device = first[0].device
    where = (device, _stream(device))
    return Table(_rows(tuple(entries), *where), _blocks(sizes, block, *where), aligned)


@lru_cache(maxsize=TABLES)
def _rows(entries: tuple[tuple[int, ...], ...], device: torch.device, _: int) -> Tensor:
    rows = torch.from_numpy(np.array(entries, dtype=np.int64).T.copy())
    return _moved(rows, device)


@lru_cache(maxsize=TABLES)
def _blocks(sizes: tuple[int, ...], block: int, device: torch.device, _: int) -> Tensor:
    counts = np.array([cdiv(n, block) for n in sizes], dtype=np.int64)
    row = np.repeat(np.arange(len(sizes)), counts)
    place = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return _moved(torch.from_numpy(np.stack([row, place], axis=1).astype(np.int32)), device)


def _stream(device: torch.device) -> int:
    """The stream that a table is copied on, which alone may read it without waiting."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _moved(x: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
