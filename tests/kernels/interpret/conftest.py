"""These tests run kernels in Triton's interpreter, which a process must choose before it imports it."""

import os
import sys

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton is imported already: run tests/kernels/interpret by itself")
os.environ["TRITON_INTERPRET"] = "1"
