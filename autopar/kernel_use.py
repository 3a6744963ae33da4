"""Where a plan uses autopar's own kernels, and what it expects of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

KERNELS = (
    "pack",
    "cross_entropy",
    "adamw",
    "int8",
    "permute",
    "dropout",
    "all_reduce_norm",
)
KERNEL_MODES = ("auto", "off", "all", "interpret")
COMPRESSIONS = (None, "int8")

ON_AXES = frozenset({"pack", "int8"})  # their places are mesh axes
OPTIMIZER = "optimizer"  # the place of "adamw"


@dataclass(frozen=True)
class KernelUse:
    """One kernel at places that are alike.

    `where` are names of nodes of the captured graph; of "pack" and "int8" axes of the mesh, of
    "adamw" the word `optimizer`. `fusion` is what it does besides (`prologue | epilogue`), `count`
    how often it runs per step, in all stages of a pipeline together. `time_s` and `unfused_s` are
    predicted seconds per step with and without it, forward and backward, of all these;
    `saved_bytes` is what it does not keep for the
    backward. `step_s` is how many seconds the predicted step changes by (below zero: less), and
    `sent_bytes` what one device sends more or less per step, by collective. `note` says why it does
    not do more.
    """

    kernel: str
    where: tuple[str, ...]
    fusion: str = ""
    count: int = 1
    time_s: float = 0.0
    unfused_s: float = 0.0
    saved_bytes: int = 0
    note: str = ""
    step_s: float = 0.0
    sent_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """Where the lowering puts kernels: by kernel the places, or None for all there are."""

    of: Mapping[str, frozenset[str] | None] = field(default_factory=lambda: MappingProxyType({}))

    def __bool__(self) -> bool:
        return bool(self.of)

    def has(self, kernel: str, place: str) -> bool:
        """Whether the kernel runs at a node or axis of this name."""
        if kernel not in self.of:
            return False
        places = self.of[kernel]
        return places is None or place in places


NOWHERE = Places()


def everywhere() -> Places:
    """All kernels at all their places, but "int8": it changes numbers, for users who ask for it."""
    return Places({name: None for name in KERNELS if name != "int8"})


def places_of(uses: tuple[KernelUse, ...], mode: str, planned: bool = True) -> Places:
    """Where to put kernels under a plan, but "int8", which is not the plan's to choose.

    `planned` says whether the graph to lower is the plan's own, or another capture of its model (of
    evaluation, or of another batch), whose nodes have other names: that has the plan's kernels
    wherever they apply.
    """
    if mode == "off":
        return NOWHERE
    if mode in ("all", "interpret"):
        return everywhere()
    found: dict[str, frozenset[str] | None] = {}
    for use in uses:
        if use.kernel == "int8":
            continue
        before = found.get(use.kernel, frozenset())
        named = planned or use.kernel in ON_AXES
        found[use.kernel] = (before or frozenset()) | set(use.where) if named else None
    return Places(found)
