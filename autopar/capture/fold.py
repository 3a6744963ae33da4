"""Capture a deep model from a few of its repeated layers.

`plan_folding` finds the repeated blocks and checks, without tracing them, that forward does the
same in each; the model is captured with three copies of each block; `unfold.unfold` then inserts
the other copies into the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .probe import NAME, UnknownTensorError, probe
from .repeats import Places, Run, find_runs, nested, shortened
from .tandem import CannotFoldError, Item, Ref, find_repeat, lengthen_all, reference, same_sequence


def plan_folding(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Run, ...]:
    """The runs of layers of which `KEPT` units tell all that forward does.

    Established by running forward without storage, whole and shortened, and comparing the records
    call for call. Raises `CannotFoldError`.
    """
    candidates = find_runs(module)
    if not candidates:
        raise CannotFoldError("no container holds four or more layers that are alike")
    names = _names(module)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_reason("forward needs the values of tensors, or real devices"))
        whole = probe(module, args, kwargs, names)
    runs = _regular(whole, candidates)
    if not runs:
        raise CannotFoldError(f"forward does not do the same in each of {candidates[0]}")
    reason = ""
    for chosen in [runs, [max(runs, key=lambda run: len(run.children))]][: len(runs)]:
        try:
            _check(module, args, kwargs, names, whole, chosen)
        except CannotFoldError as error:
            reason = reason or str(error)
        else:
            return tuple(chosen)
    raise CannotFoldError(reason)


@contextlib.contextmanager
def _as_reason(what: str) -> Iterator[None]:
    try:
        yield
    except UnknownTensorError:
        raise CannotFoldError("forward uses a tensor of unknown origin") from None
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CannotFoldError(f"{what} ({type(error).__name__}: {text})") from error


def _check(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Mapping[int, str],
    whole: Sequence[Item],
    runs: Sequence[Run],
) -> None:
    """The calls of the module are those of the shortened one, lengthened."""
    with _as_reason(f"forward fails with fewer layers than {runs[0]}"), shortened(module, runs):
        part = probe(module, args, kwargs, names)
    places = Places(runs)
    longer = lengthen_all(_located(part, places), [run.units for run in runs])
    if longer is None or not same_sequence(longer, _located(whole, places)):
        raise CannotFoldError(f"forward does more than repeat {runs[0]}: it depends on the depth")


def _names(module: nn.Module) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        names.setdefault(id(tensor), name)
    return names


def _regular(whole: Sequence[Item], candidates: Sequence[Run]) -> list[Run]:
    """The runs, outer before inner, that the whole record repeats."""
    runs = _outermost(candidates)
    left = [run for run in candidates if run not in runs]
    while runs:
        places = Places(runs)
        items = _located(whole, places)
        failed = [run for i, run in enumerate(runs) if not find_repeat(items, i, run.units)]
        if not failed:
            break
        runs = [run for run in runs if run not in failed]
        inner = _outermost([run for run in left if any(nested(run, outer) for outer in failed)])
        left = [run for run in left if run not in inner]
        runs += inner
    return runs


def _outermost(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if not any(nested(run, other) for other in runs)]


def _located(items: Sequence[Item], places: Places) -> list[Item]:
    """The record with names in runs as references to their units."""

    def locate(ref: Ref) -> Ref:
        return reference(str(ref.tag), places) if ref.kind == NAME else ref

    return [Item(item.key, tuple(map(locate, item.refs)), item.origin) for item in items]
