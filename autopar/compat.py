"""Every private part of torch that autopar uses, under one name each, for torch 2.11 to 2.13.

What is slow to import (dynamo takes over a second) is imported by the function that needs it.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_symbols
from torch.utils import swap_tensors
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "TORCH_VERSION",
    "FakeTensor",
    "FakeTensorMode",
    "ShapeEnv",
    "StridedShard",
    "TorchDispatchMode",
    "c10d_functional",
    "dynamo_graph_capture_for_export",
    "dynamo_ignores",
    "fake_process_group",
    "fake_process_group_init",
    "free_symbols",
    "local_tensor_mode",
    "make_fx",
    "rank_map",
    "swap_tensors",
    "symmetric_memory",
    "triton_interpreter",
]

TORCH_VERSION: tuple[int, int] = (
    int(torch.__version__.split(".")[0]),
    int(torch.__version__.split(".")[1]),
)


def dynamo_graph_capture_for_export(
    fn: Callable[..., Any],
) -> Callable[..., torch.fx.GraphModule]:
    """Return a function that captures `fn` as one graph on the arguments it is called with.

    Parameters and buffers stay attributes of the graph. Its `_dynamo_bytecode_flatten(*args)`
    gives the inputs of the graph, `_dynamo_bytecode_unflatten(outputs, args)` the result of `fn`;
    both want `args` by position, in the order of the signature, keyword arguments too. Raises
    `torch._dynamo.exc.Unsupported` and its relatives where `fn` cannot be one graph.
    """
    from torch._dynamo.functional_export import dynamo_graph_capture_for_export as capture

    # 2.11 takes (mod, constraints, restore_state_dict), 2.13 (fn, constraints): by position it is
    # the same call.
    inner: Callable[..., torch.fx.GraphModule] = capture(fn)

    def captured(*args: Any, **kwargs: Any) -> torch.fx.GraphModule:
        return _with_builtins(inner(*args, **kwargs))

    return captured


def _with_builtins(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Let the bytecode around a captured graph call `type` and the like, which 2.11 refuses."""
    for name in ("_dynamo_bytecode_flatten", "_dynamo_bytecode_unflatten"):
        around: Any = getattr(graph, name)
        around.f_globals = {**vars(builtins), **around.f_globals}
    return graph


@contextlib.contextmanager
def dynamo_ignores(functions: Iterable[Callable[..., Any]]) -> Iterator[None]:
    """Let capture drop calls of `functions` (logging methods) instead of failing at them."""
    from unittest.mock import patch

    import torch._dynamo.config as config
    import torch._dynamo.utils as utils

    ignored = {*config.ignore_logging_functions, *functions}
    # Untyped in some releases, hence the Any.
    setting: Any = config.patch
    with contextlib.ExitStack() as stack:
        stack.enter_context(setting(ignore_logging_functions=ignored))
        if TORCH_VERSION < (2, 13):  # 2.11 logs that functions have no order, with a traceback
            metrics = "_get_dynamo_config_for_logging"
            stack.enter_context(patch.object(utils, metrics, lambda: None))
        yield


def c10d_functional() -> Any:
    """Return `torch.ops._c10d_functional`, its shape functions for fake tensors registered.

    These ops take a group *name* and return a tensor on which `wait_tensor` must be called. Never
    differentiate through them: the backward of their all_reduce is another all_reduce.
    """
    import torch.distributed._functional_collectives

    return torch.ops._c10d_functional


def fake_process_group_init(world_size: int, rank: int = 0) -> None:
    """Make this process rank `rank` of `world_size` ranks that are not there.

    Collectives return at once with meaningless values, so that one process can trace the program of
    any rank. Raises `ValueError` where a process group exists already; undo with
    `torch.distributed.destroy_process_group()`.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    store: Any = FakeStore()
    dist.init_process_group("fake", store=store, rank=rank, world_size=world_size)


@contextlib.contextmanager
def fake_process_group(world_size: int, rank: int = 0) -> Iterator[None]:
    """Do `fake_process_group_init` for the duration of a `with` block."""
    fake_process_group_init(world_size, rank)
    try:
        yield
    finally:
        dist.destroy_process_group()


def symmetric_memory(
    nbytes: int, device: torch.device, group: dist.ProcessGroup
) -> tuple[Any, list[int]]:
    """Zeroed memory of this rank that all ranks' kernels can access, and the address of each one's.

    Collective; all ranks of one host, each with a GPU of its own. What is returned first keeps the
    memory alive. Raises RuntimeError where devices cannot access each other's memory, ImportError
    in builds without it.
    """
    from torch.distributed import _symmetric_memory as module

    memory = module.empty(nbytes, dtype=torch.uint8, device=device)
    memory.zero_()
    torch.cuda.synchronize(device)  # zero before any peer knows where it lies
    handle: Any = module.rendezvous(memory, group)
    # Older releases have only `get_buffer`, of memory that always starts an allocation.
    remote = getattr(handle, "get_remote_tensor", None) or handle.get_buffer
    addresses = [
        memory.data_ptr()
        if peer == group.rank()
        else remote(peer, (nbytes,), torch.uint8).data_ptr()
        for peer in range(group.size())
    ]
    return (memory, handle), addresses


def local_tensor_mode(world_size: int) -> contextlib.AbstractContextManager[Any]:
    """Return a context that runs every op once per rank, on real values, in this one process.

    Needs a fake process group of the same size. A tensor is then a `LocalTensor` with one value per
    rank (`tensor.reconcile()` where all agree), made by `rank_map`.
    """
    from torch.distributed._local_tensor import LocalTensorMode

    return LocalTensorMode(world_size)


def rank_map(make: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Return the simulated tensor whose value on rank `r` is `make(r)`.

    Raises `RuntimeError` outside `local_tensor_mode`.
    """
    from torch.distributed import _local_tensor

    mode = _local_tensor.local_tensor_mode()
    if mode is None:
        raise RuntimeError("rank_map needs `with local_tensor_mode(world_size):` around it")
    # 2.13 has `_local_tensor.rank_map`; 2.11 has not, and this is all it does.
    with _local_tensor.maybe_disable_local_tensor_mode():
        values = {rank: make(rank) for rank in sorted(mode.ranks)}
    local_tensor: Any = _local_tensor.LocalTensor  # its constructor is untyped
    result: torch.Tensor = local_tensor(values)
    return result


# Capture ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def masks_as_given() -> Iterator[None]:
    """Let `nn.Transformer` and its encoder use a mask without looking whether it is causal.

    They compare its values with those of the causal one, to use a faster kernel of attention for
    what the mask says anyhow. A graph cannot know values.
    """
    from unittest.mock import patch

    from torch.nn.modules import transformer

    def is_causal_by_hint(mask: Any, is_causal: bool | None = None, size: Any = None) -> bool:
        del mask, size
        return is_causal is True

    name = "_detect_is_causal_mask"
    with patch.object(transformer, name, is_causal_by_hint, create=True):
        yield


def dynamo_config(**settings: Any) -> contextlib.AbstractContextManager[Any]:
    """Set dynamo's options for the duration of a `with` block; unknown names are left out."""
    import torch._dynamo.config as config

    known = {name: value for name, value in settings.items() if hasattr(config, name)}
    patch: Any = config.patch  # untyped in some releases
    context: contextlib.AbstractContextManager[Any] = patch(**known)
    return context


def functional_mode() -> Any:
    """Return the class of the mode that makes ops functional while tracing before dispatch.

    Instantiate with `(pre_dispatch=True, export=True)`.
    """
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    return FunctionalTensorMode


def to_functional(tensor: torch.Tensor) -> torch.Tensor:
    """Wrap a tensor so that `functional_mode` records what is written to it."""
    from torch._subclasses.functional_tensor import FunctionalTensor

    wrapped: torch.Tensor = FunctionalTensor.to_functional(tensor)
    return wrapped


def from_functional(tensor: torch.Tensor) -> torch.Tensor:
    """Return the current value of a tensor that `to_functional` wrapped, writes applied."""
    from torch._subclasses.functional_tensor import FunctionalTensor

    if not isinstance(tensor, FunctionalTensor):
        return tensor
    sync: Any = vars(torch)["_sync"]  # not exported
    sync(tensor)
    value: torch.Tensor = torch._from_functional_tensor(tensor.elem)
    return value


def outside_inference_mode() -> contextlib.AbstractContextManager[Any]:
    """Return a context that ends `torch.inference_mode` where ops are not made functional in it.

    Gradients are then recorded inside, unless a further context says otherwise.
    """
    return contextlib.nullcontext() if TORCH_VERSION >= (2, 13) else torch.inference_mode(False)


@contextlib.contextmanager
def shapes_of_lstm() -> Iterator[None]:
    """Let the last states of an LSTM have their shape while tracing.

    Torch 2.11 takes away the dim of the batch, if that is 1, in place of the one of the layer.
    """
    from unittest.mock import patch

    import torch._decomp.decompositions as decompositions

    if TORCH_VERSION >= (2, 13):
        yield
        return
    module: Any = decompositions
    run = module.one_layer_lstm

    def one_layer_lstm(inp: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        out, last = run(inp, hidden, *args, **kwargs)
        return out, tuple(x.reshape(h.shape) for x, h in zip(last, hidden, strict=True))

    with patch.object(module, "one_layer_lstm", one_layer_lstm):
        yield


def python_dispatcher() -> contextlib.AbstractContextManager[Any]:
    """Return the context in which ops on symbolic shapes take torch's Python implementations."""
    from torch._dispatch.python import enable_python_dispatcher

    context: contextlib.AbstractContextManager[Any] = enable_python_dispatcher()
    return context


def has_autocast_kernel(op: Any, device_type: str) -> bool:
    """Say whether autocast on `device_type` ("cpu", "cuda") changes the dtypes of `op`'s inputs."""
    key = "Autocast" + {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}.get(device_type, "CPU")
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key))


def new_registrations(namespace: str) -> Any:
    """Return a library whose ops live as long as it does."""
    make_library: Any = torch.library.Library  # untyped
    return make_library(namespace, "FRAGMENT")


def autograd_function_apply(forward: Any, backward: Any, *tensors: Any, **options: Any) -> Any:
    """Run the two graphs that dynamo makes of an `autograd.Function`, differentiably."""
    from torch._functorch.autograd_function import autograd_function_apply as apply

    return apply(forward, backward, *tensors, **options)


def size_expr(size: Any) -> Any:
    """Return a size as an int, or as the sympy expression that a symbolic size stands for."""
    if isinstance(size, torch.SymInt):
        expr: Any = size.node.expr
        return int(expr) if expr.is_Integer else expr
    return size


@contextlib.contextmanager
def any_arguments() -> Iterator[None]:
    """Let `dynamo_graph_capture_for_export` take dataclasses and other objects as arguments.

    Dynamo traces them; only a check that export needs, and we do not, refuses them.
    """
    import torch._dynamo.eval_frame as eval_frame

    check = eval_frame.check_user_input_output
    eval_frame.check_user_input_output = lambda *args: None
    try:
        yield
    finally:
        eval_frame.check_user_input_output = check


@contextlib.contextmanager
def pretend_compiling() -> Iterator[None]:
    """Let `torch.compiler.is_compiling()` be true, so that code runs as it would be captured."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@contextlib.contextmanager
def quiet_torch_logs() -> Iterator[None]:
    """Keep torch from logging what it raises as well."""
    import logging

    names = [n for n in logging.root.manager.loggerDict if n == "torch" or n.startswith("torch.")]
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def dynamo_graph_capture(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.fx.GraphModule:
    """Do `dynamo_graph_capture_for_export(module)(*args, **kwargs)`, side effects included.

    The result's `_dynamo_bytecode_unflatten` then also assigns the attributes and buffers that
    forward assigns; where torch is too old for that, it only returns the result.
    """
    import torch._dynamo.functional_export

    export: Any = torch._dynamo.functional_export
    try:
        compiling = export._compiling_state_context
        full_capture = export.fullgraph_capture
        to_graph = export.create_fx_graph_from_captured_output
        settings = dynamo_config(replay_side_effects=True, side_effect_replay_policy="silent")
    except AttributeError:
        return dynamo_graph_capture_for_export(module)(*args, **kwargs)
    from torch._dynamo.utils import get_metrics_context

    with compiling(), settings, get_metrics_context():
        captured = full_capture(module, args, kwargs)
    return _with_builtins(to_graph(captured, module, args, kwargs))


# --- DTensor without dispatch -------------------------------------------------------------------


def local_of(tensor: DTensor) -> torch.Tensor:
    """The local tensor itself: no copy, no autograd, no dispatch."""
    return tensor._local_tensor


def dtensor_like(local: torch.Tensor, like: DTensor) -> DTensor:
    """A DTensor placed like `like`, of this local tensor; no checks, no autograd, no dispatch."""
    kind: Any = type(like)
    made: DTensor = kind(local, like._spec, requires_grad=False)
    return made


def dtensor_of(
    local: torch.Tensor,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    shape: Sequence[int],
    stride: Sequence[int],
    kind: Any = DTensor,
) -> Any:
    """A DTensor (or one of a subclass, `kind`) of any local tensor: no checks, no autograd."""
    meta = TensorMeta(torch.Size(shape), tuple(stride), local.dtype)
    return kind(local, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def spec_of(tensor: DTensor) -> Any:
    """What describes a DTensor beside its local tensor: hashable, equal for equal layouts."""
    return tensor._spec


def make_spec(
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Any:
    """A description of a DTensor, as `spec_of` gives it."""
    meta = TensorMeta(torch.Size(shape), tuple(stride), dtype)
    return DTensorSpec(mesh, tuple(placements), tensor_meta=meta)


def dtensor_with(local: torch.Tensor, spec: Any, kind: Any = DTensor) -> Any:
    """A DTensor (or one of a subclass, `kind`) of a local tensor and its own copy of `spec`."""
    return kind(local, copy.copy(spec), requires_grad=False)


def become(tensor: DTensor, local: torch.Tensor, placements: Sequence[Placement]) -> None:
    """Give a DTensor another local tensor and other placements, in place."""
    meta = tensor._spec.tensor_meta
    tensor._spec = DTensorSpec(tensor.device_mesh, tuple(placements), tensor_meta=meta)
    tensor._local_tensor = local


def become_tensor(tensor: DTensor, new: DTensor) -> None:
    """Give a DTensor all that another one is but its class: memory, shape, dtype and placements."""
    torch._C.TensorBase.data.__set__(tensor, new)  # type: ignore[attr-defined]
    tensor._local_tensor, tensor._spec = new._local_tensor, new._spec


def local_shape_of(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]
) -> tuple[int, ...]:
    """The shape of this rank's piece of a DTensor."""
    return tuple(compute_local_shape_and_global_offset(tuple(shape), mesh, placements)[0])


# --- starting ranks -------------------------------------------------------------------------------


def shutdown_timeout(seconds: int) -> dict[str, Any]:
    """The option of `LaunchConfig` for the time between SIGTERM and SIGKILL of ranks.

    Torch 2.11 has none, and waits 30 s.
    """
    from torch.distributed.launcher.api import LaunchConfig

    name = "shutdown_timeout"
    return {name: seconds} if name in LaunchConfig.__dataclass_fields__ else {}


# --- pipelines ------------------------------------------------------------------------------------


def pipeline_stage_base() -> Any:
    """Return the class that torch's pipeline schedules want their stages to be of.

    Schedules call the methods of a stage that its public subclass has; what that class prepares
    (shapes that never change, one message per value) differs between 2.11 and 2.13.
    """
    from torch.distributed.pipelining.stage import _PipelineStageBase

    return _PipelineStageBase


def batch_p2p(ops: list[dist.P2POp]) -> list[dist.Work]:
    """Begin point-to-point messages the way that the schedules of pipelines do."""
    from torch.distributed.pipelining.schedules import _batch_p2p

    return list(_batch_p2p(ops))


def let_dispatch(kind: Any) -> None:
    """Let ops on a subclass of DTensor reach its `__torch_dispatch__`.

    Before 2.13 torch takes it for a DTensor and does not look, unless a rule is registered for op
    and class.
    """
    if TORCH_VERSION >= (2, 13):
        return
    from torch._library.simple_registry import singleton

    def rule(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.__torch_dispatch__(func, types, args, kwargs)

    for name in torch._C._dispatch_get_all_op_names():
        rules = singleton.find(name).torch_dispatch_rules
        if name.startswith("aten::") and rules.find(kind) is None:
            rules.register(kind, rule)


# --- tensors without memory ----------------------------------------------------------------------

# `swap_tensors` wants both tensors to have the same slots.
DTENSOR_SLOTS: tuple[str, ...] = tuple(DTensor.__slots__)


def no_dispatch_modes() -> contextlib.AbstractContextManager[Any]:
    """Return the context in which no `TorchDispatchMode` sees any op."""
    from torch.utils._python_dispatch import _disable_current_modes

    context: contextlib.AbstractContextManager[Any] = _disable_current_modes()
    return context


def active_dispatch_modes() -> list[Any]:
    """The `TorchDispatchMode`s in force, the innermost last."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes: list[Any] = _get_current_dispatch_mode_stack()
    return modes


def with_aliasing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """What an op of a wrapper tensor returns: views share memory, in-place ops give their input."""
    import torch.utils._python_dispatch

    corrected: Any = torch.utils._python_dispatch.return_and_correct_aliasing  # untyped
    return corrected(func, args, kwargs, out)


def wrapper_tensor(cls: type[torch.Tensor], like: torch.Tensor, device: torch.device) -> Any:
    """A tensor of the class `cls` that has the layout of `like`, claims a device, and no memory."""
    return torch.Tensor._make_wrapper_subclass(
        cls,
        like.size(),
        strides=like.stride(),
        storage_offset=like.storage_offset(),
        dtype=like.dtype,
        layout=like.layout,
        device=device,
    )


def keeps_graph() -> bool:
    """Inside a backward: whether its caller retains the graph for another one."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def take_hooks(parameter: torch.Tensor, source: torch.Tensor) -> None:
    """Give a parameter the gradient hooks of another one, whose handles then remove them there."""
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(source, name)
        if hooks:
            if source is not parameter:
                setattr(source, name, None)
            setattr(parameter, name, hooks)


def triton_interpreter() -> Any:
    """Triton's interpreter (a private module), whose bfloat16 `runtime.kernels.interpret` mends."""
    import triton.runtime.interpreter

    return triton.runtime.interpreter


# --- Compiling what runs --------------------------------------------------------------------------


def compile_backend(name: str) -> Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]:
    """The function behind the name of a `torch.compile` backend."""
    from torch._dynamo import lookup_backend

    found: Any = lookup_backend
    return found(name)  # type: ignore[no-any-return]


def backward_at_once() -> contextlib.AbstractContextManager[Any]:
    """Let backends compile a backward along with its forward, not when it first runs."""
    from torch._functorch import config

    patch: Any = config.patch  # untyped
    context: contextlib.AbstractContextManager[Any] = patch(force_non_lazy_backward_lowering=True)
    return context


def fake_like(tensor: torch.Tensor, inputs: Sequence[Any]) -> torch.Tensor:
    """The tensor as an example beside the inputs that a backend gets: fake if they are."""
    from torch._guards import detect_fake_mode

    mode: Any = detect_fake_mode(list(inputs))
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)


def dynamo_graph_copy(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of a graph of Dynamo's, which still reads the one that it gave to a backend.

    Copies share submodules and constants.
    """
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    result = graph.graph_copy(module.graph, values)
    graph.output(result)
    for old, new in values.items():
        if hasattr(old, "_dynamo_source"):
            vars(new)["_dynamo_source"] = vars(old)["_dynamo_source"]
    made = torch.fx.GraphModule(module, graph)
    made.meta.update(module.meta)
    return made


def synthetic_input(graph: torch.fx.Graph, name: str, example: torch.Tensor) -> torch.fx.Node:
    """A last placeholder of a graph of Dynamo's, which no variable of the user's stands for."""
    from torch._dynamo.source import ConstantSource

    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_after(inputs[-1]) if inputs else graph.inserting_before():
        made = graph.placeholder(name)
    made.meta["example_value"] = example
    vars(made)["_dynamo_source"] = ConstantSource(source_name=name)
    return made


def compile_failure(error: BaseException) -> tuple[str | None, BaseException]:
    """Which kind of failure of `torch.compile` an error is, if it is one, and what caused it.

    "break" (no one graph), "limit" (compiled anew too often), "backend", "dynamo" (anything else).
    """
    from torch._dynamo import exc

    if isinstance(error, exc.FailOnRecompileLimitHit):
        return "limit", error
    if isinstance(error, exc.BackendCompilerFailed):
        return "backend", error.inner_exception
    if isinstance(error, exc.Unsupported | exc.UserError):
        return "break", error
    return ("dynamo" if isinstance(error, exc.TorchDynamoException) else None), error


# --- Inductor without a GPU -----------------------------------------------------------------------


def aot_graphs(
    module: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]
) -> list[tuple[str, torch.fx.GraphModule, list[Any]]]:
    """What Inductor gets to compile of a module: `forward` and `backward`, or `inference`.

    Traced on fake CPU tensors of one mode, which say whether they require gradients; decomposed and
    divided as Inductor does it.
    """
    from torch._functorch import config
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    found: list[tuple[str, torch.fx.GraphModule, list[Any]]] = []

    def keep(name: str) -> Any:
        def compiler(graph: torch.fx.GraphModule, args: Sequence[Any]) -> Any:
            if name == "inference":
                joint_graph_passes(graph)
            found.append((name, graph, list(args)))
            return lambda _: None

        return compiler

    def divide(joint: torch.fx.GraphModule, args: Any, **kwargs: Any) -> Any:
        joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, args, compiler="inductor", **kwargs)

    aot: Any = aot_module_simplified
    now: Any = config.patch
    with (
        tracing(TracingContext(detect_fake_mode(inputs))),
        now(force_non_lazy_backward_lowering=True),
    ):
        aot(
            module,
            list(inputs),
            fw_compiler=keep("forward"),
            bw_compiler=keep("backward"),
            inference_compiler=keep("inference"),
            decompositions=select_decomp_table(),
            partition_fn=divide,
        )
    return found


@contextlib.contextmanager
def pretended_gpu(properties: Any) -> Iterator[None]:
    """Let Inductor and Triton find one CUDA device of these properties, which nothing can run on.

    `properties` has what `torch.cuda.get_device_properties` gives. Afterwards all is as before.
    """
    from unittest.mock import patch

    import torch.utils._triton
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 10 * properties.major + properties.minor, 32)

    class Driver:
        def get_current_target(self) -> Any:
            return target

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

    capability = (properties.major, properties.minor)
    faked: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: properties.name,
        "is_bf16_supported": lambda *args, **kwargs: True,
    }
    with contextlib.ExitStack() as stack:
        for name, value in faked.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        for name in ("device_count", "current_device", "get_device_properties"):
            stack.enter_context(patch.object(CudaInterface, name, staticmethod(faked[name])))
        # What torch found out, once for all, about the GPU that was not there.
        for known in (DeviceProperties.create, *vars(torch.utils._triton).values()):
            if hasattr(known, "cache_clear"):
                known.cache_clear()
                stack.callback(known.cache_clear)
        # A torch built for CUDA would make a context for its fake tensors.
        stack.enter_context(patch.object(fake_tensor, "init_gpu_context", lambda device: None))
        stack.enter_context(patch.object(triton.runtime.driver, "_active", Driver()))
        stack.enter_context(patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        yield


def inductor_source(graph: torch.fx.GraphModule, args: Sequence[Any], inference: bool) -> str:
    """The Python module that Inductor writes for a graph of `aot_graphs`, as for `cuda:0`.

    Changes the graph. Needs `pretended_gpu` (or a GPU).
    """
    from torch._guards import detect_fake_mode
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.utils._pytree import tree_map

    mode: Any = detect_fake_mode([*args, *(n.meta.get("val") for n in graph.graph.nodes)])
    cuda = torch.device("cuda", 0)

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with mode, torch.no_grad():
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=cuda)

    def renamed(value: Any) -> Any:
        return cuda if isinstance(value, torch.device) and value.type == "cpu" else value

    for node in graph.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map(moved, node.meta["val"])
        node.meta.pop("tensor_meta", None)
        node.args = torch.fx.node.map_aggregate(node.args, renamed)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, renamed)
    inputs = [moved(value) for value in args]
    lowering: Any = GraphLowering
    settings: Any = config.patch
    with (
        settings(fx_graph_cache=False, compile_threads=1),
        V.set_fake_mode(mode),
        V.set_debug_handler(DebugContext()),
    ):
        for each in (view_to_reshape, partial(post_grad_passes, is_inference=inference)):
            improve: Any = each  # untyped
            improve(graph)
        lowered = lowering(graph, example_inputs=inputs, is_inference=inference)
        with V.set_graph_handler(lowered):
            lowered.run(*inputs)
            made = lowered.codegen()[0]
    return str(getattr(made, "value", made))


def inductor_configs(source: str, name: str, filename: str) -> tuple[dict[str, Any], list[Any]]:
    """Of a kernel that Inductor wrote: its `triton_meta`, and the configurations it may run with.

    The first one is what runs unless the GPU finds another one faster. Needs `pretended_gpu`.
    """
    namespace: dict[str, Any] = {"__name__": name, "__file__": filename}
    exec(compile(source, filename, "exec"), namespace)
    kernel = namespace[name]
    return kernel.triton_meta, list(kernel.configs)
