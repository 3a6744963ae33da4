"""Find the repeated blocks of a module: consecutive children of a container that are alike."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

KEPT = 3  # units that a shortened module keeps: two that are compared, after a first
_FEWEST = KEPT + 1
_LONGEST_PERIOD = 4


@dataclasses.dataclass(frozen=True)
class Run:
    """`units` times `period` consecutive children of a container, alike from unit to unit.

    `container` is the path of the container, `children` the names of the run's children in it. A
    period of 2 is two kinds of layers in turn.
    """

    container: str
    children: tuple[str, ...]
    period: int

    @property
    def units(self) -> int:
        return len(self.children) // self.period

    def path(self, child: int) -> str:
        name = self.children[child]
        return f"{self.container}.{name}" if self.container else name

    def __str__(self) -> str:
        return f"{self.path(0)} to {self.path(len(self.children) - 1)}"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in which run something is: `run.path(unit * run.period + offset)`, then `rest`."""

    run: int
    offset: int
    rest: str
    unit: int


class Places:
    """Translates dotted names to places in runs and back."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = tuple(runs)
        self._prefixes = {
            run.path(child): (number, child % run.period, child // run.period)
            for number, run in enumerate(runs)
            for child in range(len(run.children))
        }

    def of(self, name: str) -> Place | None:
        """The place of a parameter, buffer or module; None outside of the runs."""
        end = len(name)
        while end > 0:
            found = self._prefixes.get(name[:end])
            if found is not None:
                run, offset, unit = found
                return Place(run, offset, name[end:], unit)
            end = name.rfind(".", 0, end)
        return None

    def name(self, place: Place) -> str:
        run = self.runs[place.run]
        return run.path(place.unit * run.period + place.offset) + place.rest


def find_runs(module: nn.Module) -> list[Run]:
    """Every run of at least four units in `module`, containers before what they contain."""
    owners = _owners(module)
    runs = []
    for path, container in module.named_modules():
        if isinstance(container, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            run = _longest_run(path, container, owners)
            if run is not None:
                runs.append(run)
    return runs


def nested(inner: Run, outer: Run) -> bool:
    """Whether `inner`'s container is within one of `outer`'s children."""
    return any(
        f"{inner.container}.".startswith(f"{outer.path(child)}.")
        for child in range(len(outer.children))
    )


@contextlib.contextmanager
def shortened(module: nn.Module, runs: Sequence[Run], kept: int = KEPT) -> Iterator[None]:
    """Let each run have `kept` units only, for the duration."""
    before: list[tuple[Any, Any]] = []
    try:
        for run in runs:
            container: Any = module.get_submodule(run.container)
            children = container._modules
            before.append((container, children))
            dropped = set(run.children[kept * run.period :])
            left = {name: child for name, child in children.items() if name not in dropped}
            if not isinstance(container, nn.ModuleDict):
                left = {str(i): child for i, child in enumerate(left.values())}
            vars(container)["_modules"] = left
        yield
    finally:
        for container, children in reversed(before):
            vars(container)["_modules"] = children


def _owners(module: nn.Module) -> Mapping[int, int]:
    """How many names each tensor and each submodule has, by id."""
    counts: dict[int, int] = {}
    named: tuple[Iterator[tuple[str, Any]], ...] = (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
        module.named_modules(remove_duplicate=False),
    )
    for _, owned in itertools.chain(*named):
        counts[id(owned)] = counts.get(id(owned), 0) + 1
    return counts


def _longest_run(path: str, container: nn.Module, owners: Mapping[int, int]) -> Run | None:
    names = list(container._modules)
    children: list[Any] = list(container._modules.values())
    if len(children) < _FEWEST or None in children:
        return None
    for period in range(1, min(_LONGEST_PERIOD, len(children) // _FEWEST) + 1):
        best = (0, 0)
        start = 0
        for i in range(len(children) - period + 1):
            if i + period < len(children) and _alike(
                children[i], children[i + period], period, owners
            ):
                continue
            length = i + period - start
            if length > best[1]:
                best = (start, length)
            start = i + 1
        start, length = best
        units = length // period
        if units >= _FEWEST:
            return Run(path, tuple(names[start : start + units * period]), period)
    return None


def _alike(a: nn.Module, b: nn.Module, distance: int, owners: Mapping[int, int]) -> bool:
    """Whether two modules `distance` apart in a list differ in nothing but their tensors."""
    if a is b:  # one layer that stands in a list twice
        return False
    if type(a) is not type(b) or a._modules.keys() != b._modules.keys():
        return False
    for x, y in ((a._parameters, b._parameters), (a._buffers, b._buffers)):
        if x.keys() != y.keys() or not all(_same_tensors(x[name], y[name], owners) for name in x):
            return False
    for name in a._modules:
        p, q = a._modules[name], b._modules[name]
        if (p is None) != (q is None):
            return False
        if p is not None and q is not None and p is not q and not _alike(p, q, distance, owners):
            return False
    mine, others = vars(a), vars(b)
    return mine.keys() == others.keys() and all(
        _same_attribute(mine[name], others[name], distance, (a, b))
        for name in mine
        if name not in ("_parameters", "_buffers", "_modules")
    )


def _same_tensors(a: Tensor | None, b: Tensor | None, owners: Mapping[int, int]) -> bool:
    if a is None or b is None or a is b:
        return a is b
    return (
        owners.get(id(a)) == 1
        and owners.get(id(b)) == 1
        and type(a) is type(b)
        and a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
        and a.stride() == b.stride()
        and a.requires_grad == b.requires_grad
    )


def _same_attribute(a: Any, b: Any, distance: int, owners: tuple[Any, Any]) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, (Tensor, nn.Module)):
        return False
    if type(a) is int:
        return bool(b in (a, a + distance, a + 1))  # the number of the layer, or of its kind
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(
            _same_attribute(x, y, distance, owners) for x, y in zip(a, b, strict=True)
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same_attribute(a[k], b[k], distance, owners) for k in a)
    if isinstance(a, functools.partial):
        return _same_attribute(
            (a.func, a.args, a.keywords), (b.func, b.args, b.keywords), distance, owners
        )
    if hasattr(a, "__func__"):  # a method: of the same place, or of one object
        own = getattr(a, "__self__", None) is owners[0] and b.__self__ is owners[1]
        return a.__func__ is b.__func__ and (own or a.__self__ is b.__self__)
    try:
        return bool(a == b)
    except Exception:  # the user's __eq__ may do anything; unequal only means a full capture
        return False
