"""One parallel module at run time: capture, plan, load and run, whatever the batch and the mode."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .capture import Capture
from .capture.fingerprint import fingerprint
from .captures import Captured, Captures, Found
from .compression import with_compression, with_note
from .errors import ShardingWarning, UserError
from .first_plan import fitted, searched, with_kernels
from .hints import hints_of
from .index_checks import check_indices
from .ir.graph import Graph
from .ir.parse import parse_sharding
from .ir.rule import Choice
from .kernel_use import OPTIMIZER, Places, places_of
from .memory_report import report_at_exit
from .options import Options
from .passes.follow_micro_batches import BATCH
from .passes.hinted import hints_of_plan
from .passes.pipeline import Stage
from .passes.rules_of import rules_of
from .passes.search import choose_for
from .passes.specialise import specialise
from .plan import Plan, plan_from_json
from .programs import SEED, Loader, Runnable
from .python_state import warn_of_hooks
from .runtime import agree, world
from .runtime.file_values import check_values
from .runtime.foreign_values import ForeignValues
from .runtime.group import Group
from .runtime.locals import local_tensors, take_whole_gradients
from .runtime.materialise import agree_on_values, realise_others, shard_deferred
from .runtime.memory_watch import MemoryWatch
from .runtime.optimizer import local_steps
from .runtime.random import draw_seed
from .runtime.shared_memory import make_group
from .runtime.state import (
    check_planned,
    check_replaced,
    place_optimizer_states,
    replicate_parameters,
    shard_parameters,
    take_rank_zeros,
)
from .runtime.step_clock import StepClock


class Session:
    """Runs one module on all ranks of a `torch.distributed` world.

    Parameters become DTensors at once (whole, rank 0's values), and are sharded as the plan says at
    the first call; those without memory become DTensors then. `plan` is None until then.
    """

    def __init__(self, module: nn.Module, original: type[nn.Module], options: Options) -> None:
        self.module = module
        self.original = original
        self.options = options
        self.plan: Plan | None = options.plan
        self.stages: list[Stage] = []
        self.clock = StepClock()
        self.watch = MemoryWatch()
        self._groups: dict[tuple[str, ...], Group] = {}
        self._planned: Capture | None = None  # the first that has the plan's fingerprint
        self._is_sharded = False  # as the plan says
        device = next((p.device.type for p in module.parameters()), "cpu")
        self.device_type = device
        world.start_world(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if options.memory_limit is not None and self.rank == 0:
            report_at_exit(module, self.watch, options.memory_limit)
        if self.plan is not None and self.plan.world_size != self.world_size:
            raise UserError(
                f"the plan is for {self.plan.world_size} devices ({self.plan.mesh}), "
                f"and {self.world_size} processes were started",
                fix=f"start {self.plan.world_size} processes, or plan for {self.world_size}",
            )
        self._live = world.flat_mesh(self.world_size, device)
        self._check = agree.StepCheck(make_group())
        self._foreign = ForeignValues()
        place_optimizer_states()  # before the states are taken apart into local tensors
        local_steps()
        self._hints = hints_of(module)  # before the parameters that have them are replaced
        if self.plan is not None:
            self._hints += hints_of_plan(self.plan)
        self._captures = Captures(module, original, device, self._hints)
        agree_on_values(module)
        realise_others(module)
        self._replaced = replicate_parameters(module, self._live)

    def copied(self, module: nn.Module) -> Session:
        """The session of a deep copy of the module: of the same plan, captured again."""
        new = copy.copy(self)
        new.module, new._captures = module, self._captures.copied(module)
        new.clock, new.watch, new._foreign = StepClock(), MemoryWatch(), ForeignValues()
        return new

    @property
    def programs(self) -> tuple[Graph, ...]:
        """What this rank runs of the last call: its program, or one per piece of a pipeline."""
        return tuple({stage.piece: stage.graph for stage in self.stages}.values())

    # -- a call ---------------------------------------------------------------------------------

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the undecorated module's forward would return on the global batch."""
        self.clock.tick(self.module)
        tensors = [t for t in tree_flatten((args, dict(kwargs)))[0] if isinstance(t, Tensor)]
        if self.options.memory_limit is not None:
            self.watch.tick(self.module, tensors)
            if self.plan is not None:
                self.watch.predicted_bytes = self.plan.predicted.memory_bytes
        generator = torch.get_rng_state()
        try:  # a call that is refused leaves the generator as it was, too
            (captured, inputs, sizes), seed = self._agreed(args, kwargs, tensors, draw_seed())
            check_indices(captured.indices, inputs)
            program = self._program(captured, sizes)
            given = self._given(captured.capture, inputs, seed)
        finally:
            torch.set_rng_state(generator)
        outputs, updates = program.run(self._parameters(program), given)
        if program.is_random:  # else one device would not have drawn a seed
            draw_seed()
        take_whole_gradients(outputs)
        self._write_buffers(updates)
        captured.capture.assign(self.module, outputs)
        return captured.capture.unflatten(outputs)

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """All that a call does before it runs: capture, plan, shard, load the program."""
        tensors = [t for t in tree_flatten((args, dict(kwargs)))[0] if isinstance(t, Tensor)]
        (captured, _, sizes), _ = self._agreed(args, kwargs, tensors, 0)
        self._program(captured, sizes)

    def _agreed(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Sequence[Tensor], seed: int
    ) -> tuple[Found, int]:
        """The capture that all ranks run on this batch, and rank 0's seed."""
        found = self._captures.find(args, kwargs)
        seed, known = self._check.run(
            self._shapes(tensors),
            agree.batch_digest(tensors),
            seed,
            found.captured.number if found is not None else 0,
            self._foreign.found(self.module) if self._is_sharded else {},
        )
        self._foreign.agreed(self.module)
        if found is None or not known:
            found = self._captured_anew(args, kwargs)
        return found, seed

    def _shapes(self, tensors: Sequence[Tensor]) -> str:
        mode = "train" if self.module.training else "eval"
        shapes = ", ".join(f"{list(t.shape)} {str(t.dtype)[6:]}" for t in tensors)
        return f"{shapes} ({mode}{'' if torch.is_grad_enabled() else ', no grad'})"

    def _parameters(self, program: Runnable) -> dict[str, Tensor]:
        """This rank's pieces of the parameters that a program reads."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        wanted = [parameters[name] for name in program.parameters]
        return dict(zip(program.parameters, local_tensors(wanted), strict=True))

    def _given(self, made: Capture, inputs: Sequence[Tensor], seed: int) -> dict[Any, Any]:
        """What a program reads beside parameters, by role and name."""
        buffers = self.module.named_buffers(remove_duplicate=False)
        names = [node.meta["fqns"][0] for node in made.graph.placeholders("input")]
        return {
            **{("buffer", name): buffer for name, buffer in buffers},
            **{("input", name): x for name, x in zip(names, inputs, strict=True)},
            SEED: seed,
        }

    def _device(self) -> torch.device:
        if self.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.device_type)

    def _write_buffers(self, values: Mapping[str, Tensor]) -> None:
        if not values:
            return
        buffers = dict(self.module.named_buffers(remove_duplicate=False))
        with torch.no_grad():
            for name, value in values.items():
                buffers[name].copy_(value)

    # -- captures and programs --------------------------------------------------------------------

    def _captured_anew(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Found:
        """Capture the same on all ranks, though one knew it; plan if there is no plan yet."""
        training, grad = self.module.training, torch.is_grad_enabled()

        def make() -> Capture:
            if self._is_sharded:
                assert self.plan is not None
                check_planned(self.module, self.plan.params)
            else:
                check_values(self.module)
            return self._captures.make(args, kwargs, training, grad)

        warn_of_hooks(self.module)
        fresh = agree.made_alike(
            "the captured model",
            make,
            lambda made: fingerprint(made.graph, sizes=True),
            "run the same script with the same model on every rank; attributes, globals and hooks "
            "that forward reads must be the same on all of them",
        )
        if not self._is_sharded:
            self._make_plan(fresh, args, kwargs)
        new = Captured(fresh, self._choices_for(fresh))
        self._captures.keep(new)
        inputs = fresh.flatten(args, kwargs)
        sizes = fresh.bind(inputs)
        assert sizes is not None
        return Found(new, inputs, sizes)

    def _make_plan(self, fresh: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Plan on rank 0 for training, agree on it, and shard the parameters."""
        is_trained = self.module.training and torch.is_grad_enabled()
        given, options = self.plan, self.options
        hints = [*self._hints, *(h for h in hints_of(self.module) if h not in self._hints)]

        def make() -> str:
            trained = fresh if is_trained else self._captures.make(args, kwargs, True, True)
            if given is None:
                made = searched(trained, options, hints)
            else:
                made = fitted(given, trained, options, self.world_size)
            made = with_kernels(made, trained, options, given)
            return with_note(made, options.compress).to_json()

        self.plan = plan_from_json(self._on_rank_zero(make))
        if self.rank == 0:
            for note in self.plan.notes:
                warnings.warn(note, ShardingWarning, stacklevel=2)
        storage = {name: parse_sharding(s.sharding) for name, s in self.plan.params.items()}
        self._replaced += replicate_parameters(self.module, self._live)  # put in since then
        check_replaced(self._replaced)
        take_rank_zeros(self.module)  # initialised again since the session began, perhaps
        self._live = world.device_mesh(self.plan.mesh, self.device_type)
        stages = {name: s.stages for name, s in self.plan.params.items() if s.stages}
        shard_parameters(self.module, storage, self.plan.mesh, self._live, stages)
        shard_deferred(self.module, storage, self.plan.mesh, self._live, stages)
        self._is_sharded = True

    def _on_rank_zero(self, make: Any) -> str:
        """`make()` of rank 0 on all ranks; what it raises is raised on all of them."""
        text = None
        if self.rank == 0:
            try:
                text = json.dumps({"ok": make()})
            except UserError as error:
                text = json.dumps({"error": [error.what, error.where, error.fix]})
            except Exception as error:  # the others would wait for ever
                agree.from_rank_zero(json.dumps({"bug": f"{type(error).__name__}: {error}"}))
                raise
        answer = json.loads(agree.from_rank_zero(text))
        if "error" in answer:
            what, where, fix = answer["error"]
            raise UserError(what, where=where, fix=fix)
        if "bug" in answer:
            raise RuntimeError(f"rank 0 failed: {answer['bug']}")
        return str(answer["ok"])

    def _choices_for(self, captured: Capture) -> Mapping[str, Mapping[str, Choice]]:
        """Choices of a capture's ops: the plan's own, or new ones with the plan's storage."""
        assert self.plan is not None and self.options.cluster is not None
        plan, cluster = self.plan, self.options.cluster
        if captured.fingerprint == plan.fingerprint and self._has_planned_rules(captured):
            texts = {n: dict(c) for n, c in plan.choices.items()}
        else:
            graph, sizes, priced_as = captured.graph, captured.symbols, self.options.optimizer
            made = self._on_rank_zero(
                lambda: json.dumps(choose_for(graph, sizes, cluster, plan, priced_as))
            )
            texts = json.loads(made)
        return {
            node: {axis: Choice.parse(text) for axis, text in chosen.items()}
            for node, chosen in texts.items()
        }

    def _has_planned_rules(self, captured: Capture) -> bool:
        """Whether the plan's choices mean the same in this capture: factors are named by rules.

        A batch of one row has dims of one, which have no factor: one that is captured with its
        size, or a micro-batch of one.
        """
        assert self.plan is not None
        self._planned = self._planned or captured
        planned, count = self._planned, self.plan.micro_batches
        sizes = {s: n // count if str(s) == BATCH else n for s, n in planned.symbols.items()}
        if planned is captured and 1 not in sizes.values():
            return True
        mine, theirs = (
            {name: str(rule) for name, rule in rules_of(specialise(graph, at)).items()}
            for graph, at in ((captured.graph, captured.symbols), (planned.graph, sizes))
        )
        return all(mine.get(name) == theirs.get(name) for name in self.plan.choices)

    def _places(self, captured: Capture) -> Places:
        """Where autopar's own kernels run in the programs of a capture."""
        assert self.plan is not None
        planned = captured.fingerprint == self.plan.fingerprint
        # A plan for GPUs that runs on CPUs has nothing to launch.
        on_cpu = self.options.kernels == "auto" and self.device_type == "cpu"
        mode = "off" if on_cpu else self.options.kernels
        places = places_of(self.plan.kernels, mode, planned)
        local_steps().use_kernel(self.module, places.has("adamw", OPTIMIZER))
        return with_compression(places, self.plan.mesh, self.options.compress)

    def _program(self, captured: Captured, sizes: Mapping[Any, int]) -> Runnable:
        key = tuple(sizes[symbol] for symbol in captured.capture.symbols)
        if key not in captured.programs:
            assert self.plan is not None
            loader = Loader(
                self.plan,
                self.rank,
                self._live,
                self._groups,
                self._device(),
                self.options.backend,
                self.options.micro_batch_statistics,
                self._places(captured.capture),
                dict(self.module.named_parameters(remove_duplicate=False)),
            )
            captured.programs[key] = loader.load(captured.capture, sizes, captured.choices)
            self.stages = loader.stages
        return captured.programs[key]
