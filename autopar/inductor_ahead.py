"""What Inductor will emit for a plan's local compute on a GPU that is not here.

`torch.compile` stops at every lowered op, so that it gets what is between them: the ops of one
rank's program in runs, each with its forward and backward. Each different run is traced on CPU as
AOTAutograd does it, taken to be on the GPU, and lowered by Inductor up to its source text. Matrix
products, convolutions and attention are calls of libraries there, not Triton.
"""

from __future__ import annotations

import ast
import linecache
import operator
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.fx

from .compat import (
    FakeTensorMode,
    aot_graphs,
    inductor_configs,
    inductor_source,
    pretended_gpu,
)
from .ir.graph import Graph, Value, values_of
from .ir.lowered import LoweredOp
from .ir.recomputed import SELECTIVE
from .runtime.kernels.ahead import Specialisation
from .runtime.kernels.emit import Kernel
from .runtime.keyed_dropout import KEYED_DROPOUT, keyed_dropout, read_keys
from .runtime.regions import Region, steps_of

Node = torch.fx.Node

# Name, multiprocessors, resident threads and bytes of shared memory per block (opted in) of the
# usual GPU of a compute capability: NVIDIA's A100, H100 and B200 data sheets, and the table of
# compute capabilities in the CUDA C++ programming guide. All have 64 Ki registers.
_GPUS = {
    80: ("NVIDIA A100", 108, 2048, 163 * 1024),
    89: ("NVIDIA L40S", 142, 1536, 99 * 1024),
    90: ("NVIDIA H100", 132, 2048, 227 * 1024),
    100: ("NVIDIA B200", 148, 2048, 227 * 1024),
    120: ("NVIDIA GeForce RTX 5090", 170, 1536, 99 * 1024),
}


@dataclass(frozen=True)
class InductorKernel:
    """One Triton kernel of Inductor's: how often a micro-batch runs it, and its first of `configs`.

    `phase` is `forward`, `backward` or `inference` (nothing in it has gradients).
    """

    form: Specialisation
    phase: str
    count: int
    configs: int


@dataclass(frozen=True)
class InductorKernels:
    """Kernels of a program, and how often it calls which function of a library per micro-batch."""

    kernels: tuple[InductorKernel, ...]
    calls: Mapping[str, int]


@dataclass(frozen=True)
class Run:
    """Ops between two lowered ops, with what they read and what is read of them later."""

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]


def inductor_kernels(program: Graph, architecture: str) -> InductorKernels:
    """Inductor's Triton for one rank's lowered program on `sm_80`, `sm_90`, ...

    The batch, sizes and dtypes are those of the program's values.
    """
    mode = FakeTensorMode()
    program = _with_masks(program)
    values = _values(program, mode)
    runs: dict[str, tuple[Run, int]] = {}
    for run in runs_of(program):
        key = _text(run, values)
        runs[key] = (run, runs[key][1] + 1 if key in runs else 1)
    kernels: dict[tuple[str, Kernel], InductorKernel] = {}
    calls: Counter[str] = Counter()
    properties = _properties(int(architecture.removeprefix("sm_")))
    for run, count in runs.values():
        module, inputs = _module(run, values, mode)
        for phase, graph, args in aot_graphs(module, inputs):
            with pretended_gpu(properties):
                source = inductor_source(graph, args, phase == "inference")
                # Traced on CPU, where flash attention has a name of its own.
                source = source.replace("attention_for_cpu", "attention")
                for name in _library_calls(source):
                    calls[name] += count
                for kernel in _kernels(source, phase, count):
                    key2 = (phase, kernel.form.kernel)
                    known = kernels.get(key2)
                    more = known.count if known is not None else 0
                    kernels[key2] = InductorKernel(
                        kernel.form, phase, kernel.count + more, kernel.configs
                    )
    order = ("inference", "forward", "backward")
    found = sorted(kernels.values(), key=lambda k: order.index(k.phase))
    return InductorKernels(tuple(found), dict(calls))


def _with_masks(program: Graph) -> Graph:
    """The program as a compiler sees it: dropouts are ops of torch, here all of the first keys."""
    new = read_keys(program)
    made: dict[Any, Any] = {}
    for node in new.calls():
        if node.target is KEYED_DROPOUT:
            x, p, table, _, region = node.args
            node.target = made.setdefault((p, region), _masking(p, region))
            node.args = (x, table)
    for table in new.placeholders("keys"):
        table.meta["value"] = Value((1, 2), torch.int32)
    return new


def _masking(p: Any, region: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def dropout(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return keyed_dropout(x, p, table, 0, region)

    return dropout


def runs_of(program: Graph) -> Iterator[Run]:
    """The runs of a program, in order; ops that a selective region watches run as they are."""
    found: list[list[Node]] = [[]]
    for step in steps_of(program):
        if isinstance(step, Region):
            compiled = step.mark.mode != SELECTIVE
            found.append([])
            for node in step.nodes if compiled else ():
                _add(node, found)
            found.append([])
        else:
            _add(step, found)
    for nodes in found:
        if nodes:
            yield _run(nodes)


def _add(node: Node, runs: list[list[Node]]) -> None:
    if _is_local(node):
        runs[-1].append(node)
    elif isinstance(node.target, LoweredOp):
        runs.append([])


def _is_local(node: Node) -> bool:
    """Whether a node is an op of torch, and no result of several of a lowered op."""
    if node.op != "call_function" or isinstance(node.target, LoweredOp):
        return False
    source = node.args[0] if node.target is operator.getitem else None
    return not (isinstance(source, torch.fx.Node) and isinstance(source.target, LoweredOp))


def _run(nodes: Sequence[Node]) -> Run:
    inside = set(nodes)
    inputs = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    return Run(tuple(nodes), tuple(inputs), tuple(outputs))


def _values(program: Graph, mode: Any) -> dict[Node, Any]:
    """Every node's value on fake CPU tensors, those of lowered ops contiguous."""
    values: dict[Node, Any] = {}
    for node in program.fx.nodes:
        with mode, torch.no_grad():
            if _is_local(node):
                args, kwargs = torch.fx.node.map_arg(
                    (node.args, dict(node.kwargs)), values.__getitem__
                )
                values[node] = node.target(*args, **kwargs)
            else:
                made = [torch.empty(v.int_shape(), dtype=v.dtype) for v in values_of(node)]
                values[node] = made[0] if len(made) == 1 else made
    return values


def _module(
    run: Run, values: Mapping[Node, Any], mode: Any
) -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    graph = torch.fx.Graph()
    made: dict[Node, Node] = {}
    inputs = []
    for i, node in enumerate(run.inputs):
        made[node] = graph.placeholder(f"in_{i}")
        value = values[node]
        with mode:
            like = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
        inputs.append(like.requires_grad_(any(v.requires_grad for v in values_of(node))))
    for node in run.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].meta = {}
    results = [made[n] for n in run.outputs if isinstance(values[n], torch.Tensor)]
    graph.output(tuple(results))
    return torch.fx.GraphModule(torch.nn.Module(), graph), inputs


def _text(run: Run, values: Mapping[Node, Any]) -> str:
    """A run without its names: equal for runs that compile to the same."""
    names = {n: f"%{i}" for i, n in enumerate((*run.inputs, *run.nodes))}
    lines = []
    for node in run.inputs:
        grad = any(v.requires_grad for v in values_of(node))
        lines.append(
            f"{tuple(values[node].shape)} {values[node].stride()} {values[node].dtype} {grad}"
        )
    for node in run.nodes:
        args = torch.fx.node.map_arg((node.args, dict(node.kwargs)), names.__getitem__)
        lines.append(f"{node.target} {args}")
    return "\n".join([*lines, str([names[n] for n in run.outputs])])


def _properties(capability: int) -> Any:
    known = max((c for c in _GPUS if c <= capability), default=80)
    name, multiprocessors, threads, shared = _GPUS[known]
    return SimpleNamespace(
        name=name,
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=multiprocessors,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=threads,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared + 1024,
        L2_cache_size=50 << 20,
        is_integrated=False,
        is_multi_gpu_board=False,
        gcnArchName="",
    )


def _library_calls(source: str) -> list[str]:
    pattern = r"^\s+(?:\w+ = )?(?:extern_kernels|torch\.ops\.aten)\.(\w+)[\w.]*\("
    return re.findall(pattern, source, re.MULTILINE)


def _kernels(source: str, phase: str, count: int) -> Iterator[InductorKernel]:
    """The kernels that a module of Inductor's defines."""
    for statement in ast.parse(source).body:
        call = statement.value if isinstance(statement, ast.Assign) else None
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "async_compile.triton":
            continue
        name, text = (ast.literal_eval(argument) for argument in call.args[:2])
        uses = len(re.findall(rf"\b{name}\.run\(", source))
        with tempfile.TemporaryDirectory() as folder:
            filename = str(Path(folder) / f"{name}.py")
            lines = text.splitlines(keepends=True)
            linecache.cache[filename] = (len(text), None, lines, filename)
            meta, configs = inductor_configs(text, name, filename)
        yield InductorKernel(_form(name, text, meta, configs[0]), phase, uses * count, len(configs))


def _form(name: str, text: str, meta: Mapping[str, Any], config: Any) -> Specialisation:
    """A kernel as a module of its own, without what tunes and launches it."""
    start, end = text.index("@triton_heuristics."), text.index("@triton.jit")
    head = [
        line
        for line in text[:start].strip().splitlines()
        if "set_driver" not in line and "triton_heuristics" not in line and "hints" not in line
    ]
    source = "\n".join([*head, "from torch._inductor.runtime import triton_helpers", "", "", ""])
    signature = {k: v for k, v in meta["signature"].items() if v != "constexpr"}
    names = list(meta["signature"])
    aligned = [names[place[0]] for place in meta["configs"][0]]
    return Specialisation(
        Kernel(name, source + text[end:].rstrip() + "\n"),
        signature,
        {**meta.get("constants", {}), **config.kwargs},
        tuple(aligned),
        config.num_warps,
        wide=False,
        fp_fusion=True,
    )
