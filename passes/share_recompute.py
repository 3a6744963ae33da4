"""Share out recomputation: how many copies of each repeated block run again, and how.

With everything else fixed, a copy of block `r` in mode `m` takes `time[r, m]` and keeps
`memory[r, m]`: an integer programme of three counts per block, solved exactly by HiGHS::

    minimise  sum time[r, m] * n[r, m]
    such that sum_m n[r, m] = copies_r,   sum memory[r, m] * n[r, m] <= what the limit leaves
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import highspy
import numpy as np
import torch.fx

from autopar.ir.graph import Graph
from autopar.plan import Recompute

from .accounts import FULL, MODES, NONE, SELECTIVE, Accounts, Paid, bill
from .blocks import Blocks
from .options import Option

Node = torch.fx.Node


@dataclass(frozen=True)
class Shares:
    """Seconds and bytes of one copy of a block in each of `MODES`, and its copies."""

    copies: int
    time_s: tuple[float, float, float]
    memory_bytes: tuple[float, float, float]


@dataclass(frozen=True)
class Shared:
    """Recomputation shared out: the copies of every block, a step's seconds and bytes with it."""

    recompute: tuple[Recompute, ...]
    time_s: float
    memory_bytes: float


def share_recompute(
    graph: Graph,
    blocks: Blocks,
    option: Mapping[Node, Option],
    accounts: Accounts,
    memory_limit: float,
) -> Shared:
    """The fastest recomputation of an assignment within the limit; all in full if none fits."""
    shares, least = shares_of(graph, blocks, option, accounts)
    counts = best_shares(shares, memory_limit - least.memory_bytes)
    recompute = tuple(
        Recompute(first.name, copies, full=n[FULL], selective=n[SELECTIVE])
        for (first, _, copies), n in zip(blocks.regions, counts, strict=True)
        if n[FULL] or n[SELECTIVE]
    )
    time_s, memory = least.time_s(accounts.overlap), least.memory_bytes
    for share, n in zip(shares, counts, strict=True):
        time_s += sum(n[m] * t for m, t in zip(MODES, share.time_s, strict=True))
        time_s -= share.copies * share.time_s[MODES.index(FULL)]
        memory += sum(n[m] * b for m, b in zip(MODES, share.memory_bytes, strict=True))
    return Shared(recompute, time_s, memory)


def shares_of(
    graph: Graph, blocks: Blocks, option: Mapping[Node, Option], accounts: Accounts
) -> tuple[list[Shares], Paid]:
    """What each block's copies take by mode, and the bill if all is recomputed in full.

    A block is billed in every mode, the others recomputed in full; differences are per copy.
    """
    regions = range(len(blocks.regions))
    all_full = dict.fromkeys(regions, FULL)
    least = bill(graph, blocks, option, replace(accounts, modes=all_full))
    shares = []
    for r in regions:
        copies = blocks.regions[r][2]
        bills = [
            bill(graph, blocks, option, replace(accounts, modes={**all_full, r: mode}))
            for mode in MODES
        ]
        times = [(b.time_s(accounts.overlap) - least.time_s(accounts.overlap)) for b in bills]
        memory = [b.memory_bytes - least.memory_bytes for b in bills]
        low = min(times)
        shares.append(
            Shares(
                copies,
                tuple((t - low) / copies for t in times),  # type: ignore[arg-type]
                tuple(m / copies for m in memory),  # type: ignore[arg-type]
            )
        )
    return shares, least


def best_shares(shares: Sequence[Shares], room_bytes: float) -> list[dict[str, int]]:
    """Copies of each block per mode; `room_bytes` is beyond what full recomputation needs."""
    if not shares:
        return []
    n = 3 * len(shares)
    time_s = np.array([t for s in shares for t in s.time_s])
    memory = np.array([m for s in shares for m in s.memory_bytes]) / 2**20
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = n, len(shares) + 1
    lp.col_cost_ = time_s * (1e3 / max(float(np.abs(time_s).max()), 1e-30))
    lp.col_lower_ = np.zeros(n)
    lp.col_upper_ = np.repeat([float(s.copies) for s in shares], 3)
    lp.row_lower_ = np.array([float(s.copies) for s in shares] + [-highspy.kHighsInf])
    lp.row_upper_ = np.array([float(s.copies) for s in shares] + [room_bytes / 2**20])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.array([*range(0, n + 1, 3), 2 * n], dtype=np.int32)
    lp.a_matrix_.index_ = np.concatenate((np.arange(n), np.arange(n))).astype(np.int32)
    lp.a_matrix_.value_ = np.concatenate((np.ones(n), memory))
    lp.integrality_ = [highspy.HighsVarType.kInteger] * n
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)  # as all others: HiGHS fixes it for the whole process
    solver.passModel(lp)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return [{NONE: 0, SELECTIVE: 0, FULL: s.copies} for s in shares]
    found = np.rint(np.array(solver.getSolution().col_value)).astype(int).reshape(-1, 3)
    return [dict(zip(MODES, map(int, row), strict=True)) for row in found]
