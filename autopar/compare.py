"""What differs between two plans: figures, storage of parameters, choices of ops, traffic."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .passes.describe import collapse, pattern
from .plan import Activation, Pipeline, Plan, Storage

_Does = tuple[tuple[str, str], ...]  # (splits, sharding of the output) of some ops
_BRACES = re.compile(r"\{([^}]*)\}")
_COUNTER = re.compile(r"_\d+$")


@dataclass(frozen=True)
class Difference:
    """One thing that the two plans say differently, as texts; "" where a plan does not say it."""

    what: str
    a: str
    b: str


@dataclass(frozen=True)
class Figure:
    """A predicted figure of both plans; `unit` is `s` or `bytes`, None where a plan lacks it."""

    name: str
    unit: str
    a: float | None
    b: float | None

    @property
    def ratio(self) -> float | None:
        return self.b / self.a if self.a and self.b is not None else None


@dataclass(frozen=True)
class ParameterChange:
    """Parameters stored differently, collapsed over layers; None where a plan lacks them."""

    name: str
    count: int
    a: Storage | None
    b: Storage | None


@dataclass(frozen=True)
class OpChange:
    """Ops of one source line and module, collapsed over layers, that split differently.

    `a_splits` is what each mesh axis splits (`-`: nothing), `a_output` the sharding of the output;
    several ops of one line in one module are joined with `;`. "" where a plan has no such op.
    """

    module: str
    op: str
    source: str
    count: int
    a_splits: str
    b_splits: str
    a_output: str
    b_output: str


@dataclass(frozen=True)
class TrafficChange:
    """What one device sends per step with one collective on one axis, in bytes."""

    collective: str
    axis: str
    a_bytes: int
    b_bytes: int
    a_count: int
    b_count: int


@dataclass(frozen=True)
class Comparison:
    """Two plans side by side.

    `identical` says that they are the same to the last field, `same_model` that their fingerprints
    agree. `figures` are all, differing or not; the rest is what differs.
    """

    identical: bool
    same_model: bool
    settings: tuple[Difference, ...]
    figures: tuple[Figure, ...]
    parameters: tuple[ParameterChange, ...]
    ops: tuple[OpChange, ...]
    choices: tuple[Difference, ...]
    traffic: tuple[TrafficChange, ...]
    notes_only_a: tuple[str, ...]
    notes_only_b: tuple[str, ...]


def compare_plans(a: Plan, b: Plan) -> Comparison:
    """The differences between two plans, of the same model or not."""
    return Comparison(
        identical=a == b,
        same_model=a.fingerprint == b.fingerprint,
        settings=_settings(a, b),
        figures=_figures(a, b),
        parameters=_parameters(a, b),
        ops=_ops(a.activations, b.activations),
        choices=_choices(a, b),
        traffic=_traffic(a, b),
        notes_only_a=tuple(n for n in a.notes if n not in b.notes),
        notes_only_b=tuple(n for n in b.notes if n not in a.notes),
    )


def _settings(a: Plan, b: Plan) -> tuple[Difference, ...]:
    texts = [_setting_texts(plan) for plan in (a, b)]
    names = list(dict.fromkeys([*texts[0], *texts[1]]))
    pairs = [Difference(n, texts[0].get(n, ""), texts[1].get(n, "")) for n in names]
    return (*(d for d in pairs if d.a != d.b), *_others(a, b))


# Fields of a plan that a section of the comparison is about.
_SHOWN = frozenset(
    {"fingerprint", "mesh", "cluster", "strategy", "choices", "params", "predicted"}
    | {"alternatives", "notes", "hints", "gap", "recompute", "activations", "traffic"}
)


def _others(a: Plan, b: Plan) -> Iterator[Difference]:
    """Fields that no section is about, as they are if they are short."""
    for name in Plan.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if name not in _SHOWN and x != y:
            plain = any(isinstance(value, (str, int, float, Pipeline)) for value in (x, y))
            texts = (str(x), str(y)) if plain else ("present" if x else "", "present" if y else "")
            if texts[0] == texts[1]:
                texts = ("differs", "differs")
            yield Difference(name.replace("_", " "), *texts)
    if a.alternatives != b.alternatives:
        yield Difference("alternatives", *(f"{len(plan.alternatives)} listed" for plan in (a, b)))


def _setting_texts(plan: Plan) -> dict[str, str]:
    levels = [axis for axis in plan.mesh if axis.level]
    found = {
        "model": f"fingerprint {plan.fingerprint[:12]}",
        "cluster": plan.cluster,
        "devices": str(plan.world_size),
        "mesh": str(plan.mesh),
        "axes between hosts": ", ".join(axis.name for axis in levels),
        "strategy": plan.strategy,
        "sizes": ", ".join(f"{k}={v}" for k, v in plan.hints.items()),
        "optimality gap": f"{plan.gap:.1%}",
    }
    for r in plan.recompute:
        found[f"recomputed: block of {r.block}"] = (
            f"{r.full} in full, {r.selective} selectively, of {r.copies}"
        )
    return found


def _figures(a: Plan, b: Plan) -> tuple[Figure, ...]:
    p, q = a.predicted, b.predicted
    parts = list(dict.fromkeys([*p.memory_parts, *q.memory_parts]))
    return (
        Figure("step", "s", p.time_s, q.time_s),
        Figure("compute", "s", p.compute_s, q.compute_s),
        Figure("communication", "s", p.comm_s, q.comm_s),
        Figure("optimizer", "s", p.optimizer_s, q.optimizer_s),
        *([Figure("kernels", "s", p.kernels_s, q.kernels_s)] if p.kernels_s or q.kernels_s else []),
        Figure("memory per device", "bytes", p.memory_bytes, q.memory_bytes),
        *(Figure(n, "bytes", p.memory_parts.get(n), q.memory_parts.get(n)) for n in parts),
    )


def _parameters(a: Plan, b: Plan) -> tuple[ParameterChange, ...]:
    groups: dict[tuple[str, Storage | None, Storage | None], list[str]] = {}
    for name in dict.fromkeys([*a.params, *b.params]):
        stored = a.params.get(name), b.params.get(name)
        if stored[0] != stored[1]:
            groups.setdefault((pattern(name), *stored), []).append(name)
    return tuple(
        ParameterChange(collapse(names), len(names), x, y) for (_, x, y), names in groups.items()
    )


def _ops(a: Iterable[Activation], b: Iterable[Activation]) -> tuple[OpChange, ...]:
    was, is_now = _by_place(a), _by_place(b)
    groups: dict[tuple[str, str, str, _Does, _Does], list[str]] = {}
    for place in dict.fromkeys([*was, *is_now]):
        x, y = was.get(place, ()), is_now.get(place, ())
        if x != y:
            op, module, source = place
            groups.setdefault((op, pattern(module), source, x, y), []).append(module)
    return tuple(
        OpChange(
            collapse(modules),
            op,
            source,
            len(modules),
            *("; ".join(each[i] for each in does) for i in (0, 1) for does in (x, y)),
        )
        for (op, _, source, x, y), modules in groups.items()
    )


def _by_place(activations: Iterable[Activation]) -> dict[tuple[str, str, str], _Does]:
    """What the ops of every (op, module of one layer, source line) do, equal ones once."""
    found: dict[tuple[str, str, str], _Does] = {}
    for act in activations:
        does = (act.splits or "-", act.sharding)
        for module in expanded(act.module):
            place = (act.op, module, act.source)
            before = found.get(place, ())
            if does not in before:
                found[place] = (*before, does)
    return found


def expanded(name: str) -> list[str]:
    """The names that a collapsed one stands for: the inverse of `collapse`, all combinations."""
    match = _BRACES.search(name)
    if match is None:
        return [name]
    numbers: list[str] = []
    for span in match[1].split(","):
        first, dots, last = span.partition("..")
        if dots and first.isdigit() and last.isdigit() and int(last) - int(first) < 100_000:
            numbers += map(str, range(int(first), int(last) + 1))
        else:
            numbers.append(span)
    tails = expanded(name[match.end() :])
    return [name[: match.start()] + number + tail for number in numbers for tail in tails]


def _choices(a: Plan, b: Plan) -> tuple[Difference, ...]:
    """Nodes of the graph whose choices differ, those of one op together.

    Between plans of different models the nodes have nothing to do with each other.
    """
    if a.fingerprint != b.fingerprint:
        return ()
    groups: dict[tuple[str, str, str], int] = {}
    for node in dict.fromkeys([*a.choices, *b.choices]):
        x, y = (_choice_text(plan.choices.get(node)) for plan in (a, b))
        if x != y:
            key = (_COUNTER.sub("", node), x, y)
            groups[key] = groups.get(key, 0) + 1
    return tuple(Difference(f"{op} × {n}", x, y) for (op, x, y), n in groups.items())


def _choice_text(chosen: Mapping[str, str] | None) -> str:
    return " ".join(f"{axis}:{choice}" for axis, choice in (chosen or {}).items()) or "whole"


def _traffic(a: Plan, b: Plan) -> tuple[TrafficChange, ...]:
    sums: dict[tuple[str, str], list[int]] = {}
    for offset, plan in enumerate((a, b)):
        for t in plan.traffic:
            totals = sums.setdefault((t.collective, t.axis), [0, 0, 0, 0])
            totals[offset] += t.sent_bytes
            totals[2 + offset] += t.count
    changes = [TrafficChange(kind, axis, *totals) for (kind, axis), totals in sums.items()]
    changed = [c for c in changes if (c.a_bytes, c.a_count) != (c.b_bytes, c.b_count)]
    return tuple(sorted(changed, key=lambda c: -abs(c.a_bytes - c.b_bytes)))
