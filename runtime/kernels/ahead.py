"""Compile emitted kernels for GPUs that are not here, and read what the assembler made of them.

Needs no GPU and no driver; must not share a process with Triton's interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autopar.errors import UserError

from .emit import Kernel, load
from .support import interpreted

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# Triton's compiler aborts the process for a number that it does not know, so these are listed: what
# Triton 3.9 was found to compile for and a kernel of ours runs on.
_ALSO = ("sm_86", "sm_87", "sm_89", "sm_103", "sm_120", "sm_121", "gfx90a", "gfx950")


@dataclass(frozen=True)
class Specialisation:
    """One form of a kernel that a plan may launch.

    `signature` gives the type of every run-time parameter in order (`*bf16`, `i32`, `fp32`),
    `constants` the value of every `tl.constexpr`. `aligned` are the parameters (pointers, sizes)
    that are multiples of 16, as tensors of the allocator and sizes of usual models are. `wide` says
    that full blocks must be loaded and stored 128 bits at a time, `fp_fusion` that products and
    sums may be contracted. On AMD, `num_waves` of 64 threads (None: as many) are the warps.
    """

    kernel: Kernel
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    wide: bool = True
    fp_fusion: bool = False
    num_waves: int | None = None

    def warps(self, architecture: str) -> int:
        """Warps of a program: of 64 threads for `gfx...`, otherwise of 32."""
        amd = architecture.startswith("gfx")
        return self.num_waves if amd and self.num_waves is not None else self.num_warps

    def __str__(self) -> str:
        types = ", ".join(f"{name}: {kind}" for name, kind in self.signature.items())
        constants = ", ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel.name}({types}; {constants})"


@dataclass(frozen=True)
class Assembled:
    """A kernel compiled for one architecture; registers are per thread, bytes per program."""

    architecture: str
    assembly: str
    registers: int
    shared_bytes: int
    stack_bytes: int

    @property
    def wide_loads(self) -> int:
        """Global loads of 128 bits."""
        return len(re.findall(_WIDE[self.architecture[:2]][0], self.assembly))

    @property
    def wide_stores(self) -> int:
        """Global stores of 128 bits."""
        return len(re.findall(_WIDE[self.architecture[:2]][1], self.assembly))


# In SASS and in AMD's assembly.
_WIDE = {
    "sm": (r"\bLDG\.E[.\w]*\.128\b", r"\bSTG\.E[.\w]*\.128\b"),
    "gf": (r"\b(?:global|buffer)_load_dwordx4\b", r"\b(?:global|buffer)_store_dwordx4\b"),
}


def check_architecture(architecture: str) -> None:
    """Raise UserError for an architecture that kernels cannot be compiled for."""
    if architecture not in (*ARCHITECTURES, *_ALSO):
        raise UserError(
            f"unknown architecture {architecture!r}",
            fix=f"use one of {', '.join((*ARCHITECTURES, *_ALSO))}",
        )


def assemble(form: Specialisation, architecture: str) -> Assembled:
    """Compile one form for `sm_80`, `sm_90`, ... or `gfx942`.

    Raises UserError for an unknown architecture, and under the interpreter.
    """
    if interpreted():
        raise UserError(
            "kernels cannot be compiled under Triton's interpreter",
            fix="run this without TRITON_INTERPRET",
        )
    check_architecture(architecture)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = architecture.startswith("sm_")
    if nvidia:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    function = load(form.kernel)
    names = list(function.arg_names)
    source = ASTSource(
        fn=function,
        signature={name: form.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in form.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in form.aligned},
    )
    options = {"num_warps": form.warps(architecture), "enable_fp_fusion": form.fp_fusion}
    made = triton.compile(source, target=target, options=options)
    if nvidia:
        return _nvidia(architecture, made)
    return _amd(architecture, made)


def _nvidia(architecture: str, made: Any) -> Assembled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = _cuobjdump("-res-usage", str(cubin))
        assembly = _cuobjdump("-sass", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert found is not None, usage
    shared = max(int(found[3]), int(made.metadata.shared))
    return Assembled(architecture, assembly, int(found[1]), shared, int(found[2]))


def _amd(architecture: str, made: Any) -> Assembled:
    assembly = made.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    return Assembled(
        architecture,
        assembly,
        number("vgpr_count"),
        int(made.metadata.shared),
        number("private_segment_fixed_size"),
    )


def _cuobjdump(*arguments: str) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
