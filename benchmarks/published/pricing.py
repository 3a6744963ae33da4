"""Pricing of a published run: the planner's prices with what the row says of its kernels.

Options of pricing, each a fact of the row or of its software (`published.software`):

- `precision`: with fp8 the products with block weights run at the device's fp8 rate, after casts;
- `attention`: the kernel, relative to FlashAttention 2, whose rate the profiles hold;
- `fuses`: a chain of pointwise ops reads and writes only what enters and leaves it;
- tiles: a product takes whole waves of tiles;
- states in mixed precision: 16-bit or fp32 parameters, gradients, fp32 moments, ZeRO shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch.fx

from autopar.cost.cluster import Cluster, Device
from autopar.cost.compute import (
    LocalOp,
    backward_bytes,
    backward_time,
    forward_time,
    local_op,
    matmul_dims,
    op_bytes,
    op_flops,
)
from autopar.cost.families import canonical_name, op_family, op_name
from autopar.ir.graph import Value, tensor_inputs, value_of, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.rule import Placed
from autopar.ir.sharding import Sharding
from autopar.passes.price import Pricer

Node = torch.fx.Node

FUSABLE = ("pointwise", "transcendental", "dropout", "copy", "norm", "create")

# Speed of attention kernels relative to FlashAttention 2 on the same device.
# flash1: FlashAttention-2 is about 2x as fast (Dao, arXiv:2307.08691, section 4.1: 1.7-3.0x).
# cudnn: on Hopper cuDNN 9 reaches about 1.5-1.75x (Shah et al., arXiv:2407.08608, figures 5, 6).
ATTENTION_SPEED: Mapping[str, float] = {"plain": 1.0, "flash1": 0.6, "flash2": 1.0, "cudnn": 1.6}

# Streaming multiprocessors: NVIDIA's data sheets and architecture white papers.
UNITS: Mapping[str, int] = {"V100": 80, "A100": 108, "H100": 132, "H200": 132, "B200": 148}
# Tiles of a product's result, and the rate that they reach relative to the largest.
TILES = ((256, 128, 1.0), (128, 128, 0.94), (128, 64, 0.8))


def filled(batch: int, m: int, n: int, units: int) -> float:
    """Share of the rate that is left after tile and wave quantisation, with the best tile.

    NVIDIA, Matrix Multiplication Background User's Guide, sections on tile and wave quantization:
    tiles are computed whole, a wave of `units` tiles at a time.
    """
    best = 0.0
    for rows, columns, rate in TILES:
        down, across = -(-m // rows), -(-n // columns)
        tiles = batch * down * across
        waves = -(-tiles // units)
        work = batch * m * n / (rows * columns)
        best = max(best, rate * work / (waves * units))
    return best


@dataclass(frozen=True)
class Pricing:
    """What a row and its software say of kernels and states; see the module's text.

    `parameter_bytes`, `gradient_bytes`: of a stored element. `master`: fp32 copies of the
    parameters beside them. `state_shards`: devices that share the optimizer's state of a
    parameter beyond those that share the parameter (ZeRO-1), `gradient_shards` its gradient
    (ZeRO-2).
    """

    precision: str = "bf16"
    attention: str = "flash2"
    fuses: bool = True
    parameter_bytes: int = 2
    gradient_bytes: int = 2
    master: bool = True
    state_bytes: int = 8
    state_shards: int = 1
    gradient_shards: int = 1


class PublishedPricer(Pricer):
    """The planner's pricer with the options above."""

    def __init__(
        self,
        cluster: Cluster,
        mesh: Mesh,
        pricing: Pricing,
        never_gather: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(cluster, mesh, "adamw", never_gather)
        self.pricing = pricing
        self.fast = _with_fp8(self.device)
        self._fused: dict[Node, float] = {}

    def compute_times_s(self, node: Node, placed: Placed) -> tuple[float, float]:
        family = op_family(op_name(node.target))
        if family == "attention":
            return self._attention(node, placed)
        if family == "matmul" and self.pricing.precision.startswith("fp8") and _in_block(node):
            return self._fp8(node, placed)
        forward, backward = super().compute_times_s(node, placed)
        if family == "matmul":
            op = self._op(node, placed)
            slow = self._misaligned(op)
            first, second = self._waves(op)
            return forward * slow / first, backward * slow / second
        if self.pricing.fuses and family in FUSABLE:
            share = self._fused_share(node)
            return forward * share, backward * share
        return forward, backward

    def _op(self, node: Node, placed: Placed) -> LocalOp:
        return local_op(
            node,
            [
                self._local(value_of(s), p)
                for s, p in zip(tensor_inputs(node), placed.inputs, strict=True)
            ],
            [self._local(v, p) for v, p in zip(values_of(node), placed.outputs, strict=True)],
        )

    def _misaligned(self, op: LocalOp) -> float:
        """How much slower a product is whose rows do not start at multiples of 16 bytes.

        It cannot use tensor cores, and runs at the rate of fp32 (NVIDIA, Matrix Multiplication
        Background User's Guide: dims should be multiples of 8 elements of 16 bits).
        """
        _, _, n, k = matmul_dims(op)
        if not any(int(size) % 8 for size in (n, k)):
            return 1.0
        flops = float(op_flops(op))
        table = self.device.rates["matmul"]
        return float(self.device.rate_curve("bfloat16")(flops) / table["float32"](flops))

    def _waves(self, op: LocalOp) -> tuple[float, float]:
        """Share of the device that a product fills with tiles: (forward, backward)."""
        units = next((n for name, n in UNITS.items() if self.device.name.startswith(name)), 0)
        if not units:
            return 1.0, 1.0
        batch, m, n, k = (int(size) for size in matmul_dims(op))
        both = filled(batch, m, k, units), filled(batch, k, n, units)
        return filled(batch, m, n, units), 2 / (1 / both[0] + 1 / both[1])

    def _attention(self, node: Node, placed: Placed) -> tuple[float, float]:
        """Fused attention under a causal mask that is shared out evenly: half of the work."""
        op = self._op(node, placed)
        op = replace(op, info={**op.info, "causal": False})
        speed = 2 * ATTENTION_SPEED[self.pricing.attention]
        return (
            float(forward_time(self.device, op)) / speed,
            float(backward_time(self.device, op)) / speed,
        )

    def _fp8(self, node: Node, placed: Placed) -> tuple[float, float]:
        """A product at the fp8 rate, and the casts of its operands and of the gradient.

        A cast reads 2 bytes twice (for the scale, then to write) and writes 1 byte twice (the
        second time transposed): 6 bytes per element; where kernels are fused, the one that makes
        the operand writes it. Weights are cast once per step.
        """
        op = self._op(node, placed)
        first, second = self._waves(op)
        # Row-wise scales rule out fast accumulation: no faster than 16 bits.
        device = self.device if self.pricing.precision.endswith("rowwise") else self.fast
        bandwidth = self.device.bandwidth_curve("copy")

        def cast(elements: float) -> float:
            nbytes = (2.0 if self.pricing.fuses else 6.0) * elements
            return nbytes / float(bandwidth(nbytes))

        forward = float(forward_time(device, op)) / first + cast(float(op.inputs[0].numel))
        backward = 0.0
        if any(v.requires_grad for v in values_of(node)):
            backward = float(backward_time(device, op)) / second
            backward += cast(float(op.outputs[0].numel))
        return forward, backward

    def _fused_share(self, node: Node) -> float:
        """Share of an op's traffic that is left when chains of pointwise ops are one kernel.

        An input made by a fusable op, and an output that only fusable ops read, stay in registers.
        """
        if node not in self._fused:
            op = local_op(node)
            whole = float(op_bytes(op) + backward_bytes(op))
            saved = 0.0
            for source, spec in zip(tensor_inputs(node), op.inputs, strict=True):
                if _fusable(source):
                    saved += float(spec.bytes)
            users = [u for u in node.users if u.op == "call_function"]
            if users and all(_fusable(u) for u in users):
                saved += sum(float(spec.bytes) for spec in op.outputs)
            forward = float(op_bytes(op))
            self._fused[node] = max(0.0, 1.0 - saved / forward) if forward and whole else 1.0
        return self._fused[node]

    # -- states ---------------------------------------------------------------------------------

    def stored_bytes(self, value: Value, sharding: Sharding) -> float:
        elements = self.local_bytes(value, sharding) / value.dtype.itemsize
        if not value.requires_grad:
            return super().stored_bytes(value, sharding)
        p = self.pricing
        state = p.state_bytes + (4.0 if p.master else 0.0)
        return elements * (
            p.parameter_bytes + p.gradient_bytes / p.gradient_shards + state / p.state_shards
        )

    def optimizer_time_s(self, value: Value, sharding: Sharding) -> float:
        """Reads and writes of Adam in fp32: 4 x 4 bytes read, 3 x 4 and the 16-bit copy written."""
        if not value.requires_grad:
            return 0.0
        elements = self.local_bytes(value, sharding) / value.dtype.itemsize
        nbytes = elements * (30.0 if self.pricing.master else 28.0) / self.pricing.state_shards
        return nbytes / float(self.device.bandwidth_curve("adamw")(nbytes))


def _fusable(node: Node) -> bool:
    return node.op == "call_function" and op_family(op_name(node.target)) in FUSABLE


def _in_block(node: Node) -> bool:
    """Whether a product is of a layer: the head stays in 16 bits, and so do attention's."""
    name = canonical_name(op_name(node.target))
    return name == "linear" and "head" not in str(tensor_inputs(node)[1].name)


def _with_fp8(device: Device) -> Device:
    """The device with its fp8 rates where 16-bit rates are looked up."""
    table = dict(device.rates["matmul"])
    fast = table.get("float8_e4m3fn", table.get("bfloat16"))
    if fast is None:
        return device
    rates = dict(device.rates)
    rates["matmul"] = {**table, "bfloat16": fast, "float16": fast}
    rates.pop("matmul_backward", None)
    return replace(device, rates=rates)
