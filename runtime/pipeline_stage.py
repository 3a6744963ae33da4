"""One piece of the model as a stage of `torch.distributed.pipelining`.

The schedules of torch decide what runs when and send what a stage hands them. What is in a stage
is ours: all values of a boundary travel in one message per dtype, integers cross, a value without a
gradient gets none, and the gradients of weights can be left for later (zero bubble). Shapes are
those of the part that is set, so that another batch needs no new stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.compat import batch_p2p, pipeline_stage_base

from .deferred_weights import Queue, deferring, drain
from .messages import empty_messages, pack, unpack
from .step_parts import BodyPart

_StageBase: Any = pipeline_stage_base()

SENT_GRADIENTS = 3  # messages that may be on their way: the next stage is hardly further behind


class PieceStage(_StageBase):  # type: ignore[misc]
    """Piece `index` of `pieces`, run by whatever `part` is set.

    `group` holds the ranks of one line through the stages; `splits` says that the schedule runs
    the gradients of weights apart, `beside` that it waits for what is sent at the end of the step
    only: the stage lets go of it earlier then.
    """

    def __init__(
        self,
        index: int,
        pieces: int,
        device: torch.device,
        group: dist.ProcessGroup,
        splits: bool,
        beside: bool = False,
    ) -> None:
        super().__init__(nn.Identity(), index, pieces, device, group)
        self.splits, self.beside = splits, beside
        self.part: BodyPart | None = None
        self.args_recv_info = {0: ()}  # newer torch looks whether stages are neighbours
        self.clear_runtime_states()

    def clear_runtime_states(self) -> None:
        self.arrived: dict[int, list[Tensor]] = {}  # messages per micro-batch
        self.arrived_back: dict[int, list[Tensor]] = {}
        self.inputs: dict[int, list[Tensor]] = {}
        self.results: dict[int, tuple[Tensor, ...]] = {}
        self.gradients: dict[int, list[Tensor]] = {}
        self.later: dict[int, Queue] = {}
        self.sent: dict[int, list[dist.Work]] = {}  # per micro-batch
        self.sent_back: deque[list[dist.Work]] = deque()
        self.output_chunks: list[Any] = []

    @property
    def here(self) -> BodyPart:
        assert self.part is not None
        return self.part

    # -- compute ----------------------------------------------------------------------------------

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        del args, kwargs, save_forward_output
        k, receives = fwd_chunk_id, self.here.receives
        received = unpack(self.arrived.pop(k, []), receives)
        if self.has_backward:
            for tensor, crossing in zip(received, receives, strict=True):
                tensor.requires_grad_(crossing.requires_grad)
            self.inputs[k] = received
        queue = self.later[k] = []
        later = self.splits and self.has_backward
        with deferring(queue, self.here.add) if later else nullcontext():
            results = self.here.run(k, received)
        self.results[k] = results
        return results[0] if self.is_last and results else results

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, **kwargs: Any
    ) -> None:
        del loss, kwargs
        if not self.has_backward:
            return
        k = bwd_chunk_id
        results, inputs = self.results.pop(k), self.inputs.pop(k)
        _wait(self.sent.pop(k, []))  # its gradient is here: it has arrived
        roots: list[Tensor] = []
        given: list[Tensor | None] = []
        if self.is_last:
            roots, given = [r for r in results if r.requires_grad], [None] * len(results)
        else:
            sends = [s for s in self.here.sends if s.requires_grad]
            arrived = iter(unpack(self.arrived_back.pop(k, []), sends))
            for result, crossing in zip(results, self.here.sends, strict=True):
                gradient = next(arrived) if crossing.requires_grad else None
                if result.requires_grad and gradient is not None:
                    roots.append(result)
                    given.append(gradient)
        if roots:
            torch.autograd.backward(roots, given[: len(roots)])
        self.gradients[k] = [
            torch.zeros_like(x) if x.grad is None else x.grad for x in inputs if x.requires_grad
        ]
        if full_backward:
            self.backward_weight_one_chunk(k)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        del last_backward
        drain(self.later.pop(bwd_chunk_id, []))

    # -- messages ---------------------------------------------------------------------------------

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_first:
            return []
        buffers = self.arrived[fwd_chunk_id] = empty_messages(self.here.receives, self.device)
        return self._ops(dist.irecv, buffers, self.stage_index - 1)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last:
            return []
        results = self.results[fwd_chunk_id]
        if not self.has_backward:
            del self.results[fwd_chunk_id]
        ops = self._ops(dist.isend, pack(results), self.stage_index + 1)
        if not (self.beside and self.has_backward):
            return ops
        self.sent[fwd_chunk_id] = batch_p2p(ops)
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last or not self.has_backward:
            return []
        sends = [s for s in self.here.sends if s.requires_grad]
        buffers = self.arrived_back[bwd_chunk_id] = empty_messages(sends, self.device)
        return self._ops(dist.irecv, buffers, self.stage_index + 1)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.has_backward:
            return []
        gradients = self.gradients.pop(bwd_chunk_id)
        if self.is_first:
            return []
        ops = self._ops(dist.isend, pack(gradients), self.stage_index - 1)
        if not self.beside:
            return ops
        if len(self.sent_back) == SENT_GRADIENTS:
            _wait(self.sent_back.popleft())
        self.sent_back.append(batch_p2p(ops))
        return []

    def finish_sends(self) -> None:
        """Wait for all that is still on its way, and let go of each message as it has arrived."""
        while self.sent:
            _wait(self.sent.pop(min(self.sent)))
        while self.sent_back:
            _wait(self.sent_back.popleft())

    def _ops(self, what: Any, tensors: Sequence[Tensor], stage: int) -> list[dist.P2POp]:
        assert self.group is not None
        peer = dist.get_global_rank(self.group, self.stage_index_to_group_rank[stage])
        return [dist.P2POp(what, tensor, peer, self.group) for tensor in tensors if tensor.numel()]

    # -- what torch's own stages prepare: parts say it --------------------------------------------

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        del args, kwargs
        return ()

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def _create_grad_recv_info(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        del args, kwargs
        return ()

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Nothing: data parallel sums are part of the step."""
        del grad_scale_factor

    def scale_grads(self, grad_scale_factor: int) -> None:
        """Nothing: the seeds of the backward have the scale."""
        del grad_scale_factor


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()
