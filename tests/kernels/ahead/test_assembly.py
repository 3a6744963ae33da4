"""Every kernel in every form compiles for every architecture, spills nothing and moves 128 bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.runtime.kernels import ahead
from autopar.runtime.kernels.ahead import ARCHITECTURES, Specialisation, assemble
from autopar.runtime.kernels.registry import MODULES, kernel_module

USUAL = ("sm_90",)  # in `make test`; the others are slow
FORMS = [(name, i) for name in MODULES for i in range(len(kernel_module(name).specialisations()))]
ARCHS = [a if a in USUAL else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES]


def form_of(name: str, i: int) -> Specialisation:
    form = kernel_module(name).specialisations()[i]
    assert isinstance(form, Specialisation)
    return form


@pytest.mark.parametrize("architecture", ARCHS)
@pytest.mark.parametrize(("name", "i"), FORMS)
def test_form(name: str, i: int, architecture: str) -> None:
    form = form_of(name, i)
    made = assemble(form, architecture)
    assert made.stack_bytes == 0, f"{form} spills"
    assert made.registers > 0
    if form.wide:
        assert made.wide_loads > 0, f"{form} loads less than 128 bits at a time"
        assert made.wide_stores > 0, f"{form} stores less than 128 bits at a time"


def test_the_registry_has_every_kernel() -> None:
    folder = Path(ahead.__file__).parent
    written = {p.stem for p in folder.glob("*.py") if "\ndef specialisations(" in p.read_text()}
    assert written == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_kernel_has_what_every_kernel_has(name: str) -> None:
    module = kernel_module(name)
    assert name == module.NAME
    assert callable(module.emit) and callable(module.reference)
    assert module.__doc__ and module.specialisations()
