"""What questions about a plan share: the plan, its model captured once, a cluster and a limit."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import sympy
import torch.fx

from .api import optimizer_name, parse_bytes
from .cli_plan import load_call
from .cost.cluster import Cluster, parse_cluster
from .errors import UserError
from .ir.graph import Graph
from .kernel_gains import with_kernels_counted
from .passes.accounts import FULL, NONE, SELECTIVE
from .passes.case import Case, make_case
from .passes.choose_kernels import choose_kernels
from .passes.columns import passes_on
from .passes.describe import collapse, pattern
from .passes.hinted import hints_of_plan
from .passes.hints import op_names, with_hints
from .passes.prepare import prepare
from .passes.same_model import check_model
from .passes.search import USABLE_MEMORY, search
from .plan import Plan, load_plan
from .planning import capture_training

Node = torch.fx.Node
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """A plan with its captured model: enough to price it anywhere and to plan anew.

    `hints` are the sizes that the plan was made for, `guards` conditions on them, `limit_bytes` the
    memory per device that a plan may use (None: what the cluster's device has), `notes` what the
    capture says of itself.
    """

    plan: Plan
    graph: Graph
    hints: Mapping[sympy.Symbol, int]
    guards: tuple[sympy.Basic, ...]
    cluster: Cluster
    optimizer: str
    limit_bytes: float | None
    notes: tuple[str, ...] = ()

    @property
    def limit(self) -> float:
        """Bytes per device that a plan may use."""
        if self.limit_bytes is not None:
            return self.limit_bytes
        return self.cluster.device.memory_bytes * USABLE_MEMORY

    def case(self, plan: Plan | None = None) -> Case:
        """This plan (or another one of the model) at the question's setting."""
        return make_case(self.graph, self.hints, plan or self.plan, self.cluster, self.optimizer)

    def with_sizes(self, **sizes: int) -> Question:
        """The same at other sizes of the captured symbols; raises UserError if one is fixed."""
        by_name = {symbol.name: symbol for symbol in self.hints}
        hints = dict(self.hints)
        for name, size in sizes.items():
            if name not in by_name:
                raise self.fixed(name)
            hints[by_name[name]] = size
        for guard in self.guards:
            if guard.subs(hints) != sympy.true:
                asked = ", ".join(f"{SIZE_NAMES.get(n, n)} {size}" for n, size in sizes.items())
                raise UserError(f"the model does not allow {asked}: it needs {guard}")
        return replace(self, hints=hints)

    def fixed(self, name: str) -> UserError:
        """What to say where a size is asked about that the capture has as a number."""
        what = SIZE_NAMES.get(name, name)
        static = [note for note in self.notes if note.startswith("the sequence is static: ")]
        why = f": {static[0].partition(': ')[2]}" if name == "s" and static else ""
        return UserError(
            f"the captured model has a fixed {what}{why}",
            fix="plan the model at that size, and ask about that plan",
        )

    def best(self, strategy: str | None = None, progress: Progress = lambda _: None) -> Plan:
        """A new plan at the question's setting, from the same capture.

        Micro-batches and recomputation are tried where this plan has them, and its kernels are
        chosen and counted as `autopar plan` does it.
        """
        plan = self.plan
        modes = [NONE]
        modes += [SELECTIVE] if any(r.selective for r in plan.recompute) else []
        modes += [FULL] if any(r.full for r in plan.recompute) else []
        made = search(
            self.graph,
            plan.fingerprint,
            self.hints,
            self.cluster,
            strategy=strategy or plan.strategy,
            memory_limit=self.limit_bytes,
            optimizer=self.optimizer,
            progress=progress,
            micro_batches=sorted({1, plan.micro_batches}),
            recompute=modes,
        )
        return self.with_kernels(made)

    def with_kernels(self, plan: Plan) -> Plan:
        """A plan at the question's setting with the kernels that `autopar plan` chooses for it.

        None where the question's plan has none, and int8 along the axes where that has it: only the
        setting is another. What they change of its step is in `predicted.kernels_s`, for a plan
        that was not simulated at this setting without what messages gain.
        """
        own = self.plan.kernels
        mode = "auto" if any(use.kernel != "int8" for use in own) else "off"
        axes = {axis: None for use in own if use.kernel == "int8" for axis in use.where}
        compressed = tuple(axis for axis in axes if axis in plan.mesh.names)
        found = choose_kernels(
            self.graph, self.hints, plan, self.cluster, mode, compressed, self.optimizer
        )
        return with_kernels_counted(plan, found)


SIZE_NAMES = {"b": "batch size", "s": "sequence length"}


def ask(
    plan_file: Path,
    target: str,
    *,
    inputs: Sequence[str] = (),
    cluster: str | None = None,
    memory: str | None = None,
    optimizer: str = "adamw",
    progress: Progress = lambda _: None,
) -> Question:
    """Load a plan and capture its model; raises UserError where they do not belong together."""
    plan = load_plan(plan_file)
    limit = parse_bytes(memory) if memory is not None else None
    kind = optimizer_name(optimizer)
    where = cluster_of(plan, cluster)
    progress(f"loading {target}")
    module, args, kwargs = load_call(target, inputs)
    progress("capturing")
    captured = capture_training(module, args, kwargs, dynamic_sequence=True, fold=True)
    graph = with_hints(prepare(captured.graph), hints_of_plan(plan), strict=False)
    check_model(plan, graph, captured.fingerprint)
    hints = {s: plan.hints.get(s.name, size) for s, size in captured.symbols.items()}
    return Question(plan, graph, hints, captured.guards, where, kind, limit, captured.notes)


def cluster_of(plan: Plan, cluster: str | None) -> Cluster:
    """The cluster that is named, else the plan's own; raises UserError if it is too small."""
    try:
        found = parse_cluster(cluster if cluster is not None else plan.cluster)
    except UserError:
        if cluster is not None:
            raise
        raise UserError(
            f"the plan was made for the cluster {plan.cluster!r}, which is not a shipped one",
            fix="give its profile: --cluster FILE.json",
        ) from None
    if found.size < plan.world_size:
        raise UserError(
            f"the plan is for {plan.world_size} devices, and {found.name} has {found.size}",
            fix="give a cluster that is large enough: --cluster",
        )
    return found


def find_ops(case: Case, wanted: str) -> list[Node]:
    """The ops that a name means, one of each repeated block; raises UserError with near names.

    The name is a node's, a module's, `module.op`, an op's, a source line (`model.py:31`) or a
    pattern with `*` of any of these; layer numbers may be left as `#`.
    """
    stands_for = case.blocks.representative
    names: dict[str, list[Node]] = {}
    for node in case.concrete.calls():
        if not passes_on(node):
            for name in op_names(node):
                names.setdefault(name, []).append(stands_for[node])
    return _matching(names, wanted, "op")


def find_params(case: Case, wanted: str) -> list[Node]:
    """The parameters that a name or pattern means, one of each repeated block."""
    stands_for = case.blocks.representative
    names: dict[str, list[Node]] = {}
    for node in case.concrete.placeholders("param"):
        for fqn in node.meta["fqns"]:
            for name in (fqn, pattern(fqn), node.name):
                names.setdefault(name, []).append(stands_for[node])
    return _matching(names, wanted, "parameter")


def _matching(names: Mapping[str, list[Node]], wanted: str, kind: str) -> list[Node]:
    if wanted in names:
        hits = [wanted]
    else:
        hits = [n for n in names if fnmatch.fnmatchcase(n, wanted)]
        if not hits and not any(c in wanted for c in "*?["):
            hits = [n for n in names if n.endswith(f".{wanted}")]
    if not hits:
        near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.4)
        raise UserError(
            f"the model has no {kind} called {wanted!r}",
            fix=f"nearest: {', '.join(near)}" if near else "see `autopar plan` for the names",
        )
    return list(dict.fromkeys(node for name in hits for node in names[name]))


def place_of(case: Case, node: Node) -> str:
    """Where an op (or parameter) and its copies are: `layers.{0..5}.attn`."""
    stands_for = case.blocks.representative
    copies = [n for n in case.option if stands_for[n] is stands_for[node]]
    if node.op == "placeholder":
        return _together([n.meta["fqns"][0] for n in copies])
    return _together([n.meta.get("module", "") for n in copies])


def _together(names: Sequence[str]) -> str:
    """One name for those that differ in numbers alone, else the first one."""
    alike = [n for n in names if pattern(n) == pattern(names[0])]
    return collapse(alike) if alike else ""
