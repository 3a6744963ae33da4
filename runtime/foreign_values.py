"""Which values of ordinary tensors went into parameters: do all ranks have written the same?

A loop may write to parameters what every rank computed for itself: a mask, an array from a file,
averages. Where ranks have other values there, their parameters are no longer one model. To compare
every such tensor when it meets a parameter would be a message that only some ranks may take part
in. So a digest of it goes with what is computed from it, in the memory of those tensors, and the
ranks compare at the next step what has come to parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.compat import FakeTensor, local_of

from .on_stage_arguments import Op, op_of, tensors_in, written_by

Digest = int | Tensor  # a tensor on an accelerator, so that nobody waits for it

_SAMPLES = 1 << 14
_FACTOR = 1_000_003
_MASK = (1 << 62) - 1
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ATTRIBUTE = "_autopar_foreign"


class _Count:
    """How often something foreign has come to a DTensor in this process."""

    def __init__(self) -> None:
        self.value = 0


@functools.cache
def _count() -> _Count:
    return _Count()


def seen() -> int:
    """A number that grows whenever a DTensor is made of ordinary tensors' values."""
    return _count().value


def digest_of(tensor: Tensor) -> Digest:
    """A number that differs, very likely, where a tensor's values do; of large ones a sample."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.layout is not torch.strided:
        return 0
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    flat = flat[:: flat.numel() // _SAMPLES | 1].contiguous()  # an odd step meets all columns
    words = flat.view(_WORDS[flat.element_size()]).to(torch.int64)
    places = torch.arange(1, len(words) + 1, device=words.device)
    found = (words * places).sum() + len(words)
    return int(found) & _MASK if found.device.type == "cpu" else found


def foreign_of(tensor: Tensor) -> Digest:
    """The digest of what went into a DTensor, or that of an ordinary tensor."""
    if not isinstance(tensor, DTensor):
        return digest_of(tensor)
    cell = _memory(tensor).get(_ATTRIBUTE)
    return 0 if cell is None else cell.digest


class _Cell:
    """What went into some memory, for it and for what is a view of it elsewhere."""

    __slots__ = ("digest",)

    def __init__(self) -> None:
        self.digest: Digest = 0


def _memory(tensor: DTensor) -> dict[str, Any]:
    """What is remembered of the memory of this rank's piece."""
    return vars(local_of(tensor).untyped_storage())


def mark(tensor: Tensor, digest: Digest) -> None:
    """Remember what went into a DTensor; nothing did if the digest is 0."""
    if not isinstance(tensor, DTensor):
        return
    memory = _memory(tensor)
    if isinstance(digest, int) and not digest:
        if _ATTRIBUTE in memory:
            memory[_ATTRIBUTE].digest = 0
    else:
        memory.setdefault(_ATTRIBUTE, _Cell()).digest = digest
        _count().value += 1


def together(digests: Iterable[Digest]) -> Digest:
    """One digest of several; that of one is its own."""
    total: Digest = 0
    for digest in digests:
        if isinstance(total, int) and not total:
            total = digest
        elif not isinstance(digest, int) or digest:
            total = total * _FACTOR + digest
            total = total & _MASK if isinstance(total, int) else total
    return total


def followed(run: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `run` makes of an op, with the digests of its arguments on what it makes or writes."""
    op = op_of(func)
    if op.views and not op.written:
        made = run(func, args, kwargs)
        _share(next(tensors_in(args, kwargs)), made)
        return made
    if not _is_foreign(args, kwargs):
        return run(func, args, kwargs)
    written = written_by(op, args, kwargs)
    if written and not any(isinstance(t, DTensor) for t in tensors_in(written, {})):
        return run(func, args, kwargs)
    known = {id(t): foreign_of(t) for t in tensors_in(args, kwargs)}
    rows = [together(known[id(t)] for t in tensors_in(row, {})) for row in _rows(op, args, kwargs)]
    made = run(func, args, kwargs)
    for position, digest in enumerate(rows):
        for value in (made, *written):
            row = value[position] if _is_list(op, value) else value
            for tensor in tensors_in((row,), {}):
                mark(tensor, digest)
    return made


def _share(base: Tensor, made: Any) -> None:
    """Let views have one cell with their base, which has other memory where they are copies.

    So have those of tensors on another pipeline stage, on the ranks that have nothing of them.
    """
    if not isinstance(base, DTensor):
        return
    memory = _memory(base)
    for view in tensors_in((made,), {}):
        if isinstance(view, DTensor) and _memory(view) is not memory:
            _memory(view)[_ATTRIBUTE] = memory.setdefault(_ATTRIBUTE, _Cell())


def _is_foreign(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    for tensor in tensors_in(args, kwargs):
        digest = foreign_of(tensor) if isinstance(tensor, DTensor) else 1
        if not isinstance(digest, int) or digest:
            return True
    return False


def _is_list(op: Op, value: Any) -> bool:
    return op.lists and isinstance(value, (list, tuple))


def _rows(op: Op, args: Any, kwargs: Any) -> list[list[Any]]:
    """The arguments; those of an op on lists position by position, as it treats them."""
    values = [*args, *kwargs.values()]
    if not op.lists:
        return [values]
    count = len(args[0])
    several = [_is_list(op, v) and len(v) == count for v in values]
    return [
        [v[i] if some else v for v, some in zip(values, several, strict=True)] for i in range(count)
    ]


# -- at the next step -----------------------------------------------------------------------------


def forget(parameters: Iterable[Tensor]) -> None:
    """What has come to parameters until now is the same everywhere."""
    for parameter in parameters:
        mark(parameter, 0)


def follow_gradients(parameters: Iterable[Tensor]) -> None:
    """What has come to the gradients of parameters comes to the parameters: a step is made."""
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
            digest = foreign_of(gradient)
            if not isinstance(digest, int) or digest:
                mark(parameter, together((foreign_of(parameter), digest)))


class ForeignValues:
    """What has come to the parameters of one module since all ranks last agreed on it."""

    def __init__(self) -> None:
        self._agreed = 0  # what `seen` was then

    def found(self, module: nn.Module) -> dict[str, int]:
        """The parameters that something foreign has come to, with its digest."""
        if seen() == self._agreed:
            return {}
        parameters = dict(module.named_parameters())
        found = {n: foreign_of(p) for n, p in parameters.items() if isinstance(p, DTensor)}
        return {n: int(d) & _MASK for n, d in found.items() if not isinstance(d, int) or d}

    def agreed(self, module: nn.Module) -> None:
        """All ranks have found the same."""
        if seen() != self._agreed:
            forget(module.parameters())
            self._agreed = seen()
