"""What a row means: its model's shape, its mesh and roles, its micro-batches, its device."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from autopar.cost.cluster import Cluster
from autopar.cost.profile import shipped_profile, shipped_profiles

from .models import Shape
from .pricing import Pricing
from .rows import NotCovered, Row
from .software import Software, software_of

GB = 1e9


@dataclass(frozen=True)
class RunPlan:
    """The plan of a row.

    `shape` has two layers: the planner prices one and `layers` says how many there are. `stages`
    are the layers of each pipeline stage, `sizes` the mesh of one stage, outermost axis first,
    `role` what each axis is for, `sharded` the axes that parameters are stored split on;
    `gathers_once` says that they stay whole for all micro-batches of a step.
    """

    row: Row
    software: Software
    shape: Shape
    stages: tuple[int, ...]
    sizes: dict[str, int]
    role: dict[str, str]
    sharded: frozenset[str]
    regather: bool
    gathers_once: bool
    sequence_parallel: bool
    micro_batch: int
    micro_batches: int
    pricing: Pricing
    cluster: Cluster
    whole: Cluster
    memory_bytes: float


def plan_of(row: Row) -> RunPlan:
    """The plan of a row; raises NotCovered with the reason where there is none."""
    software = software_of(row)
    _check(row)
    shape = _shape(row, software)
    micro_batch, micro_batches = _micro_batches(row, software)
    shard, replicas = _shards(row)
    sizes = {"dpr": replicas, "dp": shard, "cp": row.cp, "tp": row.tp}
    zero = row.zero or (3 if row.fsdp else 0)
    sharded = frozenset({"dp", "cp"}) if zero >= 2 else frozenset()
    regather = zero >= 3 and row.pp == 1
    pricing = _pricing(row, software, zero, shard)
    whole, memory = device_of(row.device, row.gpus)
    per_stage = row.gpus // row.pp
    return RunPlan(
        row=row,
        software=software,
        shape=shape,
        stages=_stages(row),
        sizes=sizes,
        role={"dpr": "data", "dp": "data", "cp": "context", "tp": "tensor"},
        sharded=sharded,
        regather=regather,
        gathers_once=zero >= 2 and row.pp > 1,
        sequence_parallel=software.sequence_parallel or bool(row.sequence_parallel),
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        pricing=pricing,
        cluster=_sized(whole, per_stage),
        whole=whole,
        memory_bytes=memory,
    )


def _check(row: Row) -> None:
    if row.tp * row.pp * row.cp * row.dp != row.gpus:
        raise NotCovered(
            f"tp x pp x cp x dp = {row.tp * row.pp * row.cp * row.dp}, but {row.gpus} devices"
        )
    if row.global_batch % row.dp and row.global_batch < row.dp:
        raise NotCovered("the batch is smaller than the data-parallel degree")
    if row.step_s is None and row.mem_gb is None and row.oom is None:
        raise NotCovered("nothing was measured")
    if row.precision == "fp32":
        raise NotCovered("precision fp32: models are captured in 16 bits")
    if row.pp > row.layers:
        raise NotCovered("more pipeline stages than layers")


def _shape(row: Row, software: Software) -> Shape:
    heads = row.heads or _heads(row, software)
    kv = row.kv_heads or heads
    if row.hidden % heads or heads % kv or heads % row.tp:
        raise NotCovered("its heads do not divide: uneven heads are not modelled")
    gated = row.arch == "llama"
    ffn = row.ffn or (4 * row.hidden if not gated else round(8 * row.hidden / 3 / 256) * 256)
    gpt = row.arch == "gpt"
    return Shape(
        row.arch,
        2,
        row.hidden,
        heads,
        kv if kv % row.tp == 0 else heads,
        ffn,
        -(-row.vocab // (128 * row.tp)) * 128 * row.tp,
        row.seq,
        fused_attention=software.attention != "plain",
        fused_linears=software.fused_linears,
        bias=gpt and software.bias,
        dropout=software.dropout if gpt else 0.0,
        tied=gpt and software.tied and row.pp == 1,
    )


def _heads(row: Row, software: Software) -> int:
    """A head count that the row does not say: the runs' usual one, else heads about 128 wide."""
    if software.heads and row.hidden % software.heads == 0 and software.heads % row.tp == 0:
        return software.heads
    counts = [n for n in range(row.tp, row.hidden, row.tp) if row.hidden % n == 0]
    if not counts:
        raise NotCovered("no number of heads divides its width")
    return min(counts, key=lambda n: abs(row.hidden / n - 128))


def _micro_batches(row: Row, software: Software) -> tuple[int, int]:
    """(sequences per data-parallel rank in a micro-batch, micro-batches per step)."""
    local = row.global_batch / row.dp
    micro = row.micro_batch
    if micro is None:
        if row.pp == 1:
            micro = max(1, round(local))
        elif software.default_micro == "stages":
            micro = max(1, round(local / row.pp))
        else:
            micro = 1
    return micro, max(1, round(local / micro))


def _shards(row: Row) -> tuple[int, int]:
    """(devices that share a parameter's shards along the batch, replicas of those groups)."""
    group = row.fsdp or row.dp
    if row.fsdp and row.dp % row.fsdp == 0:
        return group, row.dp // group
    return row.dp, 1


def _stages(row: Row) -> tuple[int, ...]:
    """Layers per stage; where the layers plus embedding and head divide, those count as layers."""
    layers, parts = row.layers, row.pp
    chunks = parts * row.vpp
    if layers % parts and (layers + 2) % min(chunks, layers + 2) == 0:
        each = (layers + 2) // parts
        return (each - 1, *[each] * (parts - 2), each - 1)
    return tuple(layers // parts + (i < layers % parts) for i in range(parts))


def _pricing(row: Row, software: Software, zero: int, shard: int) -> Pricing:
    fsdp = zero >= 2
    optimizer = zero == 1 or (zero == 0 and software.shards_optimizer)
    gradient = software.gradient_bytes
    if row.precision == "bf16" and software.bf16_gradient_bytes:
        gradient = software.bf16_gradient_bytes
    return Pricing(
        precision=row.precision,
        attention=software.attention,
        fuses=software.fuses,
        parameter_bytes=4 if fsdp and not software.master else 2,
        gradient_bytes=gradient,
        state_bytes=software.state_bytes,
        master=software.master,
        state_shards=row.dp * row.cp if optimizer else 1,
    )


# Devices ------------------------------------------------------------------------------------------


def device_of(text: str, gpus: int) -> tuple[Cluster, float]:
    """The cluster of `gpus` devices that a row names, and the memory of one in bytes."""
    name = profile_of(text)
    cluster = _sized(shipped_profile(name), gpus)
    size = re.search(r"(\d+)\s*gb?\b(?!/s)", text.lower())
    memory = float(size[1]) * 1024**3 if size else cluster.device.memory_bytes
    return cluster, memory


@lru_cache(maxsize=64)
def profile_of(text: str) -> str:
    """Name of the shipped profile for a device as rows write it."""
    words = text.lower()
    known = shipped_profiles()
    rules = (
        (r"v100.*(p3|25\s*gb)", "v100-p3"),
        (r"v100", "v100"),
        (r"a100.*(?<!\d)40\s*gb?", "a100-40gb"),
        (r"a100", "a100"),
        (r"h100.*(96|500\s*w)", "h100-500w"),
        (r"gh200|h200", "h200"),
        (r"h100|h800", "h100"),
        (r"b200|b300", "b200"),
        (r"mi300x", "mi300x"),
    )
    for pattern, name in rules:
        if re.search(pattern, words) and name in known:
            return name
    raise NotCovered(f"device {text!r} has no profile")


def _sized(cluster: Cluster, devices: int) -> Cluster:
    host = cluster.host_size
    if devices <= host:
        return cluster.resized(devices)
    return cluster.resized(host, -(-devices // host))


def with_recompute(plan: RunPlan, policy: str) -> RunPlan:
    return replace(plan, row=replace(plan.row, recompute=policy))
