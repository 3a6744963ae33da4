"""`autopar plan`: load a model from a file, plan it, print and save the plan."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from .api import optimizer_name, parse_bytes, undecorated
from .cli_report import check_writable
from .cost.cluster import parse_cluster
from .errors import UserError
from .hints import load_hints
from .passes.families import FAMILIES, PIPELINED
from .passes.search import MODES
from .pipeline_options import pipelines_asked
from .planning import make_plan
from .report import make_console, print_plan

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

PLANNED_MODES = ("auto", "off", "all")
_INPUT = re.compile(r"(?:(?P<name>[a-z_]\w*)=)?(?P<dtype>\w+)\[(?P<sizes>[^\]]*)\]", re.IGNORECASE)
_EXAMPLE = "write for example 'int64[8,1024]', or 'ids=int64[8,1024]'"


def plan_target(
    target: str,
    cluster: str,
    batch: int | None,
    inputs: Sequence[str],
    strategy: str,
    memory: str | None,
    optimizer: str,
    out: Path | None,
    micro_batches: str | None = None,
    recompute: str | None = None,
    hints: Path | None = None,
    stages: int | None = None,
    schedule: str | None = None,
    kernels: str = "auto",
) -> None:
    """Plan `FILE.py:NAME`, print the tables and write the plan; raises UserError for bad input."""
    where = parse_cluster(cluster)
    limit = parse_bytes(memory) if memory is not None else None
    if strategy not in FAMILIES:
        raise UserError(
            f"unknown strategy {strategy!r}", fix=f"use one of {', '.join(map(repr, FAMILIES))}"
        )
    kind = optimizer_name(optimizer)
    if kernels not in PLANNED_MODES:
        choices = ", ".join(map(repr, PLANNED_MODES))
        raise UserError(f"unknown kernels {kernels!r}", fix=f"use one of {choices}")
    if batch is not None and batch < 1:
        raise UserError(f"the batch size {batch} is not positive", fix="use --batch 1 or more")
    counts = parse_counts(micro_batches) if micro_batches is not None else None
    modes = parse_modes(recompute) if recompute is not None else None
    pipelines_asked(strategy, stages, schedule)
    plain = strategy != "auto" and strategy not in PIPELINED
    if plain and (counts not in (None, [1]) or modes not in (None, ["none"])):
        raise UserError(
            f"--micro-batches and --recompute are for 'auto' and pipelines, not {strategy!r}",
            fix="leave them out, or use --strategy auto",
        )
    given = load_hints(hints) if hints is not None else []
    only_json = str(out) == "-"
    if out is not None and not only_json:
        check_writable(out, *([hints] if hints is not None else []))
    console = make_console()
    with make_console(stderr=True).status(f"loading {target}") as status:
        module, args, kwargs = load_call(target, inputs)
        if batch is not None:
            args, kwargs = rebatched(args, kwargs, batch)
        plan = make_plan(
            module,
            args,
            kwargs,
            where,
            strategy=strategy,
            memory_limit=limit,
            optimizer=kind,
            micro_batches=counts,
            recompute=modes,
            hints=given,
            stages=stages,
            schedule=schedule,
            kernels=kernels,
            progress=lambda text: status.update(f"planning: {text}"),
        )
    if only_json:
        sys.stdout.write(plan.to_json() + "\n")
        return
    if out is not None:
        plan.save(out)
    print_plan(plan, console)
    if out is not None:
        console.print(Text(f"wrote {out}"))


def parse_counts(text: str) -> list[int]:
    """`1,2,4`; raises UserError for anything but positive numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(
            f"cannot read the numbers of micro-batches {text!r}",
            fix="write positive numbers: --micro-batches 1,2,4",
        )
    return list(dict.fromkeys(map(int, parts)))


def parse_modes(text: str) -> list[str]:
    """`none,selective,full`; raises UserError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    unknown = [part for part in parts if part not in MODES]
    if unknown:
        raise UserError(
            f"unknown recomputation {unknown[0]!r}", fix=f"use some of {','.join(MODES)}"
        )
    return list(dict.fromkeys(parts))


def load_call(target: str, inputs: Sequence[str]) -> Call:
    """The module and its arguments that `FILE.py:NAME` stands for, built under `meta`."""
    file, _, name = target.rpartition(":")
    if not file or not name or not all(part.isidentifier() for part in name.split(".")):
        raise UserError(
            f"cannot read {target!r}", fix="write FILE.py:NAME, for example train.py:GPT"
        )
    made = _named(_load(Path(file)), name, file)
    if isinstance(made, type) and issubclass(made, nn.Module):
        made, (args, kwargs) = undecorated(made), parse_inputs(inputs)
        if not inputs:
            wanted = ", ".join(list(inspect.signature(made.forward).parameters)[1:])
            raise UserError(
                f"{name} is a module class, and no --input is given",
                fix=f"give one --input per argument of forward({wanted}); {_EXAMPLE}",
            )
        return _built(made, name, file), args, kwargs
    if isinstance(made, type) or not callable(made):
        raise UserError(
            f"{name} in {file} is {_kind(made)}, not a function or a class of modules",
            fix="name a function that returns (module, args), or a torch.nn.Module class",
        )
    if inputs:
        raise UserError(
            "--input is for module classes",
            fix=f"let {name}() return the inputs, and use --batch to change their batch size",
        )
    return _unpacked(_built(made, name, file), name)


def parse_inputs(texts: Sequence[str]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Meta tensors of `int64[8,1024]` and `name=float32[8,3]` texts: positional and by name."""
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        match = _INPUT.fullmatch(text.strip())
        if match is None:
            raise UserError(f"cannot read the input {text!r}", fix=_EXAMPLE)
        dtype = getattr(torch, match["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise UserError(f"unknown dtype {match['dtype']!r} in the input {text!r}", fix=_EXAMPLE)
        sizes = [size.strip() for size in match["sizes"].split(",") if match["sizes"].strip()]
        if not all(size.isdigit() and int(size) > 0 for size in sizes):
            raise UserError(
                f"the sizes in the input {text!r} are not positive integers", fix=_EXAMPLE
            )
        tensor = torch.empty([int(size) for size in sizes], dtype=dtype, device="meta")
        if match["name"]:
            kwargs[match["name"]] = tensor
        elif kwargs:
            raise UserError(f"the input {text!r} comes after a named one", fix="name it, too")
        else:
            args.append(tensor)
    return tuple(args), kwargs


def rebatched(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with another batch size.

    The batch is dim 0 of the first tensor that has dims, and of all others whose dim 0 is as large.
    """
    tensors = [t for t in tree_flatten((args, dict(kwargs)))[0] if isinstance(t, Tensor)]
    size = next((t.shape[0] for t in tensors if t.dim()), None)
    if not size:
        raise UserError("--batch is given, and no input has a batch", fix="leave --batch out")
    made: dict[int, Tensor] = {}

    def resized(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != size:
            return tensor
        if id(tensor) not in made:
            rows = torch.arange(batch, device=tensor.device) % size
            made[id(tensor)] = tensor.detach()[rows].requires_grad_(tensor.requires_grad)
        return made[id(tensor)]

    new: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(
        Tensor, resized, (args, dict(kwargs))
    )
    return new


def _load(file: Path) -> ModuleType:
    """The file as a module, its folder first on `sys.path`, as `python FILE.py` has it."""
    if not file.is_file():
        raise UserError(f"there is no file {file}", fix="write FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not a Python file", fix="write FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.absolute().parent))
    before = sys.modules.get(file.stem)
    sys.modules[file.stem] = module  # dataclasses and pickle look there
    try:
        with _explained(f"{file} cannot be imported", str(file), "run it with python to see more"):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(file.stem)
        if before is not None:
            sys.modules[file.stem] = before
        raise
    return module


def _named(module: ModuleType, name: str, file: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            own = [
                key
                for key, value in vars(module).items()
                if getattr(value, "__module__", None) == module.__name__ and not key.startswith("_")
            ]
            names = f"; it has {', '.join(own[:12])}" if own else ""
            raise UserError(f"there is no {name} in {file}{names}", fix="write FILE.py:NAME")
        found = getattr(found, part)
    return found


def _built(make: Any, name: str, file: str) -> Any:
    """`make()` with every new tensor on `meta`."""
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise UserError(
            f"{name} cannot be called without arguments: {error}",
            where=_line_of(make, file),
            fix="write a function without arguments that returns (module, args)",
        ) from None
    except ValueError:  # a callable without a signature
        pass
    fix = "make what needs values with device='cpu': every new tensor is on the meta device here"
    with torch.device("meta"), _explained(f"{name}() fails", file, fix):
        return make()


def _unpacked(made: Any, name: str) -> Call:
    form = "return (module, args) or (module, args, kwargs) from it"
    if not isinstance(made, (tuple, list)) or len(made) not in (2, 3):
        raise UserError(f"{name}() returns {_kind(made)}, not (module, args)", fix=form)
    module, args = made[0], made[1]
    kwargs = made[2] if len(made) == 3 else {}
    if not isinstance(module, nn.Module):
        raise UserError(f"{name}() returns {_kind(module)} in place of a module", fix=form)
    if isinstance(args, Tensor):
        args = (args,)
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
        raise UserError(
            f"{name}() returns {_kind(args)} and {_kind(kwargs)} as args and kwargs", fix=form
        )
    return module, tuple(args), dict(kwargs)


@contextlib.contextmanager
def _explained(what: str, file: str, fix: str) -> Any:
    """Whatever the user's own code raises, as a UserError with its line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if os.path.abspath(f.filename) == os.path.abspath(file)]
        where = f"{os.path.basename(file)}:{own[-1].lineno}" if own else file
        if isinstance(error, SyntaxError):
            where = f"{os.path.basename(error.filename or file)}:{error.lineno}"
        first = (str(error).strip() or "no message").splitlines()[0]
        raise UserError(f"{what}: {type(error).__name__}: {first}", where=where, fix=fix) from error


def _line_of(made: Any, file: str) -> str:
    try:
        return f"{os.path.basename(file)}:{inspect.getsourcelines(made)[1]}"
    except (OSError, TypeError):
        return file


def _kind(value: Any) -> str:
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    article = "the class" if isinstance(value, type) else "an" if name[0] in "aeiouAEIOU" else "a"
    return f"{article} {name}"
