"""Turn a failed capture into one readable `UserError`."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterable

import torch

from autopar.errors import UserError

TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')

# What failed, what to write instead.
NUMBER_FROM_TENSOR = (
    "forward turns a tensor into a Python number, which the compiler cannot know",
    "keep it a tensor (no .item(), float() or int()), or compute it outside forward and pass it in",
)
SHAPE_FROM_TENSOR = (
    "forward makes a tensor whose shape depends on another tensor's values",
    "keep the shape fixed: torch.where or a mask in place of boolean indexing, nonzero, unique or "
    "masked_select",
)

# (what to look for in torch's message, what failed, what to write instead); the first match wins.
PYTHON_RANDOM = (
    "forward draws from Python's random module, and a captured graph would keep one number",
    "draw with torch (torch.rand(()) < p, in torch.where), or draw outside forward and pass a "
    "tensor",
)

_REMEDIES: tuple[tuple[str, str, str], ...] = (
    (
        r"aten\._ctc_loss",
        "forward computes a CTC loss, which reads the lengths of the targets",
        "return the log-probabilities from forward and compute the loss of them outside",
    ),
    (r"\.Random\.\w+", *PYTHON_RANDOM),
    (
        r"got mixed torch\.Tensor and DTensor|Unable to cast NotImplemented to Tensor",
        "forward reads a parameter of the model otherwise than through self (a global, a closure), "
        "and autopar captures a copy of the model",
        "read it as an attribute of self, or pass it to forward",
    ),
    (r"Size-like symbols: (?!none)\w", *SHAPE_FROM_TENSOR),  # two such sizes are compared
    (
        r"\(nn/functional\.py:\d+ in \w+\)",
        "forward calls a function of torch that looks at a tensor's values, to check them",
        "write out what it computes, or return its input from forward and call it outside",
    ),
    (
        r"Tensor\.item|Tensor\.tolist|\.item\(\)|_local_scalar_dense|tolist\(\)|"
        r"to a Python (?:int|float|bool)|Unsupported Tensor\.(?:item|tolist)",
        *NUMBER_FROM_TENSOR,
    ),
    (
        r"[Dd]ata-dependent (?:branching|jump|assertion)|Could not guard on data-dependent",
        "forward branches on a tensor's value, which the compiler cannot know",
        "compute both sides and pick with torch.where(condition, a, b), or multiply by a mask; "
        "state what always holds with torch._check(...)",
    ),
    (
        r"[Dd]ynamic (?:shape|slicing)|aten\.nonzero|masked_select|aten\.unique|"
        r"[Dd]ata.dependent output",
        *SHAPE_FROM_TENSOR,
    ),
    (
        r"builtin print|builtins\.print|<built-in function print>|reorderable_logging_functions",
        "forward prints",
        "move the print out of forward, or return what you want to see",
    ),
    (
        r"torch\.compiler\.disable|_dynamo\.disable|skip_file|torch\._dynamo\.graph_break",
        "forward calls a function that is excluded from capture",
        "remove the torch.compiler.disable or graph_break, or move the call out of forward",
    ),
    (
        r"numpy",
        "forward calls numpy in a way that cannot be captured",
        "use torch functions in place of numpy, or compute it outside forward and pass it in",
    ),
    (
        r"\.backward\(|autograd\.grad|requires_grad_",
        "forward uses autograd itself",
        "return the loss and call backward() outside forward",
    ),
)


def user_frame(frames: Iterable[tuple[str, int]]) -> str:
    """`"model.py:31"` for the innermost of `(file, line)` outside torch, or ""."""
    chosen = ""
    for file, line in frames:
        if not file.startswith((TORCH, _OURS, "<")):
            chosen = f"{os.path.basename(file)}:{line}"
    return chosen


def source_of(stack: str) -> str:
    """`"model.py:31"` for the text of a stack trace, outermost frame first."""
    return user_frame((file, int(line)) for file, line in _FRAME.findall(stack))


def explain(error: BaseException) -> UserError:
    """The `UserError` that says what in the user's forward cannot be captured, and where."""
    if isinstance(error, UserError):
        return error
    text = str(error)
    where = _where(error, text)
    name = type(error).__name__
    for pattern, what, fix in _REMEDIES:
        if re.search(pattern, text):
            return UserError(what, where=where, fix=fix)
    if name == "TorchRuntimeError" or "Observed exception" in text or not _is_dynamo(error):
        return UserError(
            f"forward fails on these inputs: {_first_cause(error, text)}",
            where=where,
            fix="run the model without autopar on the same inputs; it should fail there too",
        )
    return UserError(
        f"forward cannot be captured as one graph: {_first_line(text)}",
        where=where,
        fix="write this line with torch operations, move it out of forward, or wrap it in a "
        "torch.library.custom_op",
    )


def _is_dynamo(error: BaseException) -> bool:
    return type(error).__module__.startswith("torch._dynamo")


def _where(error: BaseException, text: str) -> str | None:
    stack = getattr(error, "real_stack", None)
    if stack:
        found = user_frame((frame.filename, frame.lineno or 0) for frame in stack)
        if found:
            return found
    marker = text.find("from user code:")
    if marker >= 0 and (found := source_of(text[marker:])):
        return found
    frames = traceback.extract_tb(error.__traceback__)
    return user_frame((frame.filename, frame.lineno or 0) for frame in frames) or None


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    explanation = [line for line in lines if line.startswith("Explanation:")]
    line = explanation[0].removeprefix("Explanation:").strip() if explanation else lines[0]
    return line.rstrip(".")


def _first_cause(error: BaseException, text: str) -> str:
    match = re.search(r"got (\w+(?:Error|Exception)?\(.*)", text) or re.search(
        r"raised exception (.*)", text
    )
    if match:
        return match[1].strip().strip("'\"").rstrip(".")
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    return _first_line(str(inner) or type(inner).__name__)
