"""Ranks that are simulated as threads of one process: collectives for tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .group import InFlight, done

T = TypeVar("T")


class AbortedError(RuntimeError):
    """Another simulated rank failed or ended, so this one's communication can never complete."""


class _Exchange:
    """Where the threads of one group hand each other values, all at once."""

    def __init__(self, size: int) -> None:
        self.condition = threading.Condition()
        self.slots: list[Any] = [None] * size
        self.arrived = 0
        self.generation = 0


class ThreadWorld:
    """`size` simulated ranks, each a thread of this process; see `run_threads`.

    Reductions add in the order of the members, so that results are deterministic. A member that
    issues another operation than its peers, or other shapes than fit, raises `RuntimeError` in all.
    """

    def __init__(self, size: int, timeout_s: float = 120.0) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._exchanges: dict[tuple[tuple[int, ...], str], _Exchange] = {}
        self._failed = False
        self._ended: set[int] = set()

    def group(self, rank: int, ranks: Sequence[int] | None = None, name: str = "") -> ThreadGroup:
        """The group of `ranks` (default all) as `rank` sees it.

        Groups of the same ranks and name are one group.
        """
        return ThreadGroup(self, tuple(range(self.size) if ranks is None else ranks), rank, name)

    def end(self, rank: int, failed: bool = False) -> None:
        """Tell the others that `rank` makes no more calls."""
        with self._lock:
            self._ended.add(rank)
            self._failed = self._failed or failed
            exchanges = list(self._exchanges.values())
        for exchange in exchanges:
            with exchange.condition:
                exchange.condition.notify_all()

    def start(self) -> None:
        """Forget ends and failures, so that the world can run again."""
        with self._lock:
            self._failed = False
            self._ended.clear()
            self._exchanges.clear()

    def _exchange_of(self, ranks: tuple[int, ...], name: str) -> _Exchange:
        with self._lock:
            key = (ranks, name)
            if key not in self._exchanges:
                self._exchanges[key] = _Exchange(len(ranks))
            return self._exchanges[key]


class ThreadGroup:
    """A group of simulated ranks. Communication happens when it is issued."""

    def __init__(self, world: ThreadWorld, ranks: tuple[int, ...], rank: int, name: str) -> None:
        self._world = world
        self._ranks = ranks
        self._name = name
        self.size = len(ranks)
        self.rank = ranks.index(rank)

    def wait(self, inflight: InFlight) -> Tensor:
        return inflight.wait()

    def all_reduce(self, x: Tensor, op: str = "sum", in_place: bool = False) -> InFlight:
        def reduce(parts: list[Tensor]) -> Tensor:
            total = parts[0].clone(memory_format=torch.contiguous_format)
            for part in parts[1:]:
                if op == "sum":
                    total += part
                else:
                    total = (torch.maximum if op == "max" else torch.minimum)(total, part)
            return total

        return done(self._exchange(("all_reduce", op, x.shape, x.dtype), x, reduce))

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        lengths = [x.shape[0]] * self.size if sizes is None else list(sizes)
        assert x.shape[0] == lengths[self.rank], (x.shape, lengths, self.rank)
        call = ("all_gather", lengths, x.shape[1:], x.dtype)
        return done(self._exchange(call, x, torch.cat))

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        lengths = [x.shape[0] // self.size] * self.size if sizes is None else list(sizes)
        assert x.shape[0] == sum(lengths), (x.shape, lengths)

        def reduce(parts: list[Tensor]) -> Tensor:
            mine = [part.split_with_sizes(lengths)[self.rank] for part in parts]
            total = mine[0].clone(memory_format=torch.contiguous_format)
            for part in mine[1:]:
                total += part
            return total

        return done(self._exchange(("reduce_scatter", lengths, x.shape, x.dtype), x, reduce))

    def all_to_all(
        self, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]
    ) -> InFlight:
        def pick(parts: list[tuple[Tensor, ...]]) -> Tensor:
            mine = [part[self.rank] for part in parts]
            got = [piece.shape[0] for piece in mine]
            if got != list(out_splits):
                raise RuntimeError(f"all_to_all expects {list(out_splits)}, gets {got}")
            return torch.cat(mine)

        call = ("all_to_all", x.shape[1:], x.dtype)
        return done(self._exchange(call, x.split_with_sizes(list(in_splits)), pick))

    def broadcast(self, x: Tensor, source: int = 0) -> InFlight:
        call = ("broadcast", source, x.shape, x.dtype)
        return done(self._exchange(call, x, lambda parts: parts[source].clone()))

    def _exchange(
        self, call: tuple[Any, ...], value: Any, finish: Callable[[list[Any]], Tensor]
    ) -> Tensor:
        """Give `value` to all members, return `finish` of all values once all have read them."""
        exchange = self._world._exchange_of(self._ranks, self._name)
        exchange.slots[self.rank] = (call, value)
        self._barrier(exchange, call)
        slots = list(exchange.slots)
        for member, (other, _) in enumerate(slots):
            if other != call:
                raise RuntimeError(
                    f"members {self.rank} and {member} of group {self._ranks} differ: "
                    f"{call} against {other}"
                )
        with torch.no_grad():
            result = finish([value for _, value in slots])
        self._barrier(exchange, call)
        return result

    def _barrier(self, exchange: _Exchange, call: tuple[Any, ...]) -> None:
        world = self._world
        with exchange.condition:
            generation = exchange.generation
            exchange.arrived += 1
            if exchange.arrived == self.size:
                exchange.arrived = 0
                exchange.generation += 1
                exchange.condition.notify_all()
                return

            def released() -> bool:
                gone = world._failed or not world._ended.isdisjoint(self._ranks)
                return exchange.generation != generation or gone

            in_time = exchange.condition.wait_for(released, timeout=world.timeout_s)
            if exchange.generation == generation:
                why = "a rank failed or ended" if in_time else f"no answer in {world.timeout_s} s"
                raise AbortedError(f"member {self.rank} of {self._ranks} in {call}: {why}")


def run_threads(world: ThreadWorld, fn: Callable[[int], T]) -> list[T]:
    """Run `fn(rank)` in one thread per rank and return the results in order.

    Backward runs in the thread that calls it, as CPU autograd does. The first rank to fail makes
    the others stop, and its exception is raised here. torch uses one thread per rank meanwhile.
    """
    world.start()
    results: list[Any] = [None] * world.size
    errors: list[tuple[int, BaseException]] = []

    def work(rank: int) -> None:
        try:
            results[rank] = fn(rank)
        except BaseException as error:
            errors.append((rank, error))
            world.end(rank, failed=True)
        else:
            world.end(rank)

    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        threads = [
            threading.Thread(target=work, args=(rank,), name=f"rank{rank}", daemon=True)
            for rank in range(world.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(threads_before)
    if errors:
        causes = [e for e in errors if not isinstance(e[1], AbortedError)] or errors
        rank, error = causes[0]
        error.add_note(f"in simulated rank {rank} of {world.size}")
        raise error
    return results
