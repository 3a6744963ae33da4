"""Parameters that several stages of a pipeline read: one stage stores them, the others borrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Tied:
    """A parameter that `users` (stages, without the owner) read and `owner` stores.

    `shape` is that of a rank's piece of it.
    """

    name: str
    owner: int
    users: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


class TiedParameters:
    """Sends tied parameters to where they are read at the start of a step, and gradients back.

    `group` holds the ranks of one line through the stages in order: every rank has its own piece.
    All ranks of a line have the same list.
    """

    def __init__(
        self, group: dist.ProcessGroup, tied: Sequence[Tied], device: torch.device
    ) -> None:
        self.group, self.tied, self.device = group, tuple(tied), device
        self.stage = dist.get_rank(group)

    def borrow(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pieces that this rank reads and does not store, by name; collective on the line."""
        borrowed: dict[str, Tensor] = {}
        messages = []
        for tied in self.tied:
            if self.stage == tied.owner:
                piece = stored[tied.name].detach().contiguous()
                messages += [self._message(dist.isend, piece, user) for user in tied.users]
            elif self.stage in tied.users:
                borrowed[tied.name] = self._empty(tied)
                messages.append(self._message(dist.irecv, borrowed[tied.name], tied.owner))
        _exchange(messages)
        return borrowed

    def give_back(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """What the owner adds to the gradients of its parameters, by name; collective.

        `gradients` are those of this rank's borrowed pieces; None counts as zeros. They are added
        up in the order of the stages.
        """
        arriving: dict[str, list[Tensor]] = {}
        messages = []
        for tied in self.tied:
            if self.stage == tied.owner:
                arriving[tied.name] = [self._empty(tied) for _ in tied.users]
                for piece, user in zip(arriving[tied.name], tied.users, strict=True):
                    messages.append(self._message(dist.irecv, piece, user))
            elif self.stage in tied.users:
                gradient = gradients.get(tied.name)
                if gradient is None:
                    gradient = self._empty(tied).zero_()
                sent = gradient.to(tied.dtype).contiguous()
                messages.append(self._message(dist.isend, sent, tied.owner))
        _exchange(messages)
        return {name: _sum(pieces) for name, pieces in arriving.items()}

    def _empty(self, tied: Tied) -> Tensor:
        return torch.empty(tied.shape, dtype=tied.dtype, device=self.device)

    def _message(self, what: Any, piece: Tensor, stage: int) -> dist.P2POp:
        peer = dist.get_global_rank(self.group, stage)
        return dist.P2POp(what, piece, peer, self.group)


def _exchange(messages: Sequence[dist.P2POp]) -> None:
    """Send and receive all of them; what has no elements is not sent."""
    filled = [message for message in messages if message.tensor.numel()]
    for work in dist.batch_isend_irecv(filled) if filled else ():
        work.wait()


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
