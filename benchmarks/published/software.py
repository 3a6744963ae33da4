"""What training frameworks do that a row's columns do not say: facts, not fitted figures.

Each trait is a public property of the software at the time of the runs; what it costs is priced
with constants of the device that all frameworks share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .rows import Row


@dataclass(frozen=True)
class Software:
    """Properties of a training stack.

    `attention`: "plain" (products around a fused masked softmax), "flash1" (FlashAttention 1 or
    its Triton form), "flash2", or "cudnn" (cuDNN 9's fused attention). `fuses`: chains of
    pointwise ops run as one kernel (torch.compile, hand-fused kernels). `fused_linears`: queries,
    keys and values are one product. `sequence_parallel`: tensor parallelism splits activations
    along the sequence between its products. `overlaps_tensor`: its collectives, and those of
    context parallelism, run pipelined with the products next to them; `overlaps_tensor_backward`:
    those of the backward run beside the gradients of weights. `overlaps_data`: gradients are
    reduced while the backward runs. `overlaps_p2p`: an interleaved pipeline sends while it
    computes. `scatters_p2p`: tensor-parallel ranks send a part each, and gather it on arrival.
    `shards_optimizer`: ZeRO-1 where the row says nothing.

    `gradient_bytes`, `reduce_bytes`: of a gradient element as kept and as sent;
    `bf16_gradient_bytes` replaces the former under bf16. `master`: fp32 master weights beside
    16-bit parameters (else fp32 parameters are cast when they are gathered). `state_bytes`: of an
    element, beside that copy. `buffer_bytes`: communication buffers.

    `bias`, `dropout`, `tied`: of its GPT. `heads`: of runs that do not say. `default_micro`:
    micro-batches of a pipeline where the row says nothing: as many as "stages", or of "one"
    sequence each. `selective`: what selective recomputation repeats: the "attention" between its
    projections, "half" of the products and all that is pointwise, or all but the "projections"
    into attention. `stops_early`: recomputation ends with the last tensor that the backward needs,
    before a layer's last product (PyTorch's non-reentrant checkpoints since 2.1, compilers).
    `unsaid`: the recomputation of runs that do not say ("": the least that fits).
    """

    name: str
    attention: str = "flash2"
    fuses: bool = True
    fused_linears: bool = True
    sequence_parallel: bool = True
    overlaps_tensor: bool = False
    overlaps_tensor_backward: bool = False
    overlaps_data: bool = True
    shards_optimizer: bool = False
    gradient_bytes: int = 2
    reduce_bytes: int = 2
    master: bool = True
    bias: bool = True
    dropout: float = 0.0
    tied: bool = True
    default_micro: str = "one"
    selective: str = "attention"
    overlaps_p2p: bool = False
    scatters_p2p: bool = False
    state_bytes: int = 8
    bf16_gradient_bytes: int = 0
    buffer_bytes: float = 0.0
    heads: int = 0
    stops_early: bool = True
    unsaid: str = ""


# Narayanan et al., SC21 (arXiv:2104.04473) sections 4 and 5: fused bias+GeLU, bias+dropout+add and
# scale+mask+softmax; gradients are all-reduced after the pipeline is flushed.
MEGATRON = Software(
    "Megatron-LM",
    attention="plain",
    sequence_parallel=False,
    overlaps_data=False,
    dropout=0.1,
    scatters_p2p=True,
    stops_early=False,
)
# Korthikanti et al., arXiv:2205.05198, section 4.2.2: the backward's collectives overlap with the
# gradients of weights.
MEGATRON_2022 = replace(MEGATRON, name="Megatron-LM (2022)", overlaps_tensor_backward=True)
# DT-FM's baseline runs (Yuan et al., arXiv:2206.01288) without the scatter/gather optimisation.
MEGATRON_DTFM = replace(MEGATRON, name="Megatron-LM (DT-FM)", scatters_p2p=False)
# BigScience tr11 slurm scripts: the same kernels, DeepSpeed ZeRO stage 1.
# Its fp16 ZeRO-1 makes fp32 gradients of the shard; its BF16_Optimizer keeps fp32 gradients of all
# beside the bf16 ones; buckets are 5e8 elements for reducing and for gathering (its defaults).
# tr11-176B-ml/chronicles-prequel.md: 96 heads where nothing else is said. Its pipeline sends
# activations whole.
MEGATRON_DEEPSPEED = replace(
    MEGATRON,
    name="Megatron-DeepSpeed",
    shards_optimizer=True,
    scatters_p2p=False,
    state_bytes=12,
    bf16_gradient_bytes=6,
    buffer_bytes=2 * 5e8 * 2,
    heads=96,
)
# NVIDIA NeMo performance recipes: Transformer Engine with cuDNN attention, sequence parallelism,
# tensor-parallel communication overlap, distributed optimizer with overlap, bf16 gradients.
NEMO = Software(
    "NeMo",
    attention="cudnn",
    overlaps_tensor=True,
    overlaps_p2p=True,
    shards_optimizer=True,
    tied=False,
    stops_early=False,
)
# MaxText on the same machines: XLA fuses, cuDNN attention, fp32 parameters sharded;
# remat_policy=save_qkv_proj (NVIDIA/dgxc-benchmarking, maxtext/configure.sh).
MAXTEXT = replace(
    NEMO,
    name="MaxText",
    gradient_bytes=4,
    master=False,
    bias=False,
    fused_linears=False,
    selective="projections",
    unsaid="selective",
    stops_early=True,
)
# llm-foundry, MPT: eager PyTorch, Triton FlashAttention, FSDP with pure bf16 compute and reduction,
# no biases (`no_bias: true`), tied embeddings, no dropout.
LLM_FOUNDRY = Software(
    "llm-foundry", attention="flash1", fuses=False, bias=False, gradient_bytes=4, master=False
)
# torchtitan: torch.compile, SDPA (FlashAttention-2), FSDP2 with fp32 reduction, sequence-parallel
# tensor parallelism (asynchronous only where a run says so, which rows do not).
TORCHTITAN = Software(
    "torchtitan",
    fused_linears=False,
    gradient_bytes=4,
    reduce_bytes=4,
    master=False,
    bias=False,
    tied=False,
    default_micro="stages",
    selective="half",
)

BY_SET: Mapping[str, Software] = {
    "megatron_sc21": MEGATRON,
    "korthikanti_t5": MEGATRON_2022,
    "bloom_a100_384gpu": MEGATRON_DEEPSPEED,
    "dtfm_v100_64gpu": MEGATRON_DTFM,
    "nvidia_dgxc": NEMO,
    "mosaicml_fsdp": LLM_FOUNDRY,
    "torchtitan": TORCHTITAN,
}


def software_of(row: Row) -> Software:
    """The stack that made a row; where it is not known, one without overlap of tensor traffic."""
    if "maxtext" in row.source.lower():
        return MAXTEXT
    return BY_SET.get(row.family, Software("unknown", tied=False))
