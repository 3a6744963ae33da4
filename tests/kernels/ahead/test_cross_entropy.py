"""The forward loads 128 bits at a time whatever the number of classes; it stores only statistics."""

from __future__ import annotations

import pytest

from autopar.runtime.kernels.ahead import assemble
from autopar.runtime.kernels.cross_entropy import specialisations


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", ["*fp32", "*bf16"])
def test_loads_are_wide(dtype: str, architecture: str) -> None:
    form = next(f for f in specialisations() if f.signature.get("x_ptr") == dtype)
    assert form.kernel.name == "cross_entropy"
    assert "stride" not in form.aligned  # rows may begin anywhere
    assert assemble(form, architecture).wide_loads > 0
