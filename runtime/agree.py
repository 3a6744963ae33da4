"""Agreement among ranks: one plan, one schedule of collectives, one batch, one seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.errors import UserError

from .foreign_values import digest_of
from .group import Group

T = TypeVar("T")


def from_rank_zero(text: str | None) -> str:
    """The text that rank 0 gives, on every rank; collective. Rank 0's UserError is everyone's."""
    box: list[Any] = [text]
    dist.broadcast_object_list(box, src=0)
    assert isinstance(box[0], str)
    return box[0]


def check_same(what: str, mine: str, fix: str) -> None:
    """Raise UserError on every rank unless all ranks give the same text; collective."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    check_told(what, gathered, fix)


def made_alike(what: str, make: Callable[[], T], text: Callable[[T], str], fix: str) -> T:
    """What `make` makes on this rank, where all ranks make the same by its text; collective.

    Raises what it raises; UserError where it raises on another rank, or the texts differ.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    try:
        made = make()
        mine = ("ok", text(made))
    except Exception as error:
        dist.all_gather_object(gathered, ("error", f"{type(error).__name__}: {error}"))
        raise
    dist.all_gather_object(gathered, mine)
    for rank, (state, said) in enumerate(gathered):
        if state == "error":
            raise UserError(f"{what} could not be made on rank {rank}: {said}", fix=fix)
    check_told(what, [said for _, said in gathered], fix)
    return made


def check_told(what: str, texts: Sequence[str], fix: str) -> None:
    """Raise UserError unless all texts, those of ranks in order, are the same."""
    for rank, other in enumerate(texts):
        if other != texts[0]:
            raise UserError(
                f"{what} on rank {rank} differs from rank 0's: {_short(other)} against "
                f"{_short(texts[0])}",
                fix=fix,
            )


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def number(text: str) -> int:
    """A 62-bit digest of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 2


def batch_digest(tensors: Sequence[Tensor]) -> int:
    """A number that differs, very likely, where elements of the batch or their order do.

    Of large tensors, a sample of 16384 elements is looked at.
    """
    total = 0
    for i, tensor in enumerate(tensors):
        total = (total * 1_000_003 + int(digest_of(tensor)) + i) % (1 << 61)
    return total


class StepCheck:
    """One small message per step: do all ranks run the same program on the same batch and seed?"""

    def __init__(self, group: Group) -> None:
        self.group = group

    def run(
        self, shapes: str, digest: int, seed: int, program: int, written: Mapping[str, int]
    ) -> tuple[int, bool]:
        """Rank 0's seed, and whether all ranks have the program of the same number, which is not 0.

        `written` are digests of what the loop wrote to parameters, by their names. Raises UserError
        on every rank where shapes or contents of the batch or what was written differ.
        """
        writes = number(repr(sorted(written.items()))) if written else 0
        mine = torch.tensor([number(shapes), digest, seed, program, writes], dtype=torch.int64)
        rows = self.group.wait(self.group.all_gather(mine)).view(self.group.size, len(mine))
        differs = (rows != rows[0]).any(0).tolist()
        if differs[0]:
            every: list[Any] = [None] * self.group.size
            dist.all_gather_object(every, shapes)
            told = "; ".join(f"rank {r}: {s}" for r, s in enumerate(every))
            raise UserError(
                f"the ranks were given batches of different shapes or kinds ({told})",
                fix="give every rank the same global batch; autopar splits it",
            )
        if differs[1]:
            raise UserError(
                "the ranks were given different batches of the same shape",
                fix="give every rank the same global batch (no DistributedSampler, the same seed "
                "for shuffling); autopar splits it",
            )
        if differs[4]:
            self._tell_writes(written)
        return int(rows[0, 2]), program != 0 and not differs[3]

    def _tell_writes(self, written: Mapping[str, int]) -> None:
        every: list[Any] = [None] * self.group.size
        dist.all_gather_object(every, dict(written))
        names = sorted({name for found in every for name in found})
        wrong = [n for n in names if any(found.get(n) != every[0].get(n) for found in every)]
        for rank, found in enumerate(every):
            if found.get(wrong[0]) != every[0].get(wrong[0]):
                raise UserError(
                    f"rank {rank} wrote other values to the parameter {_listed(wrong)} (or its "
                    "gradient) than rank 0",
                    fix="write the same on every rank: seed all ranks alike, or broadcast rank 0's",
                )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
