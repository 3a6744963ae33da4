"""What is said of a forward that no compiler takes: why, where, and what to change."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from autopar.capture.explain import explain
from autopar.compat import compile_failure
from autopar.errors import UserError

_EAGER = 'pass backend="eager" to autopar.parallelize'


class NotCompiledWarning(UserWarning):
    """A module that was to be compiled runs op by op."""


def why_not_compiled(error: Exception, forward: Callable[..., Any]) -> UserError:
    """Why compiling a forward failed, where it runs op by op on the same inputs."""
    kind, cause = compile_failure(error)
    if isinstance(cause, UserError):
        return cause
    if kind == "break" and "Observed exception" not in str(error):
        return explain(error)
    where = _line_of(forward)
    if kind == "limit":
        return UserError(
            "it was compiled anew too often, for shapes or numbers that change",
            where,
            "pad inputs to a few shapes and pass changing numbers as tensors, or raise "
            "torch._dynamo.config.recompile_limit",
        )
    if kind in ("break", "dynamo"):
        where = explain(error).where or where
    what = f"the compiler fails with {_in_a_line(cause)}"
    return UserError(what, where, f"{_EAGER}, which runs it so without this warning")


def note_backend(error: Exception, forward: Callable[..., Any]) -> None:
    """Add to an error what to change, if the backend failed to compile a forward."""
    kind, _ = compile_failure(error)
    if kind == "backend":
        where = _line_of(forward) or "the module"
        error.add_note(f"autopar compiles the forward of {where}; to run it op by op, {_EAGER}")


def _in_a_line(error: BaseException) -> str:
    """Its type and the first line of its message that is not a hint of torch's."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith("Set TORCHDYNAMO_VERBOSE")]
    return ": ".join([type(error).__name__, *said[:1]])


def _line_of(function: Callable[..., Any]) -> str | None:
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    return f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}"
