"""Capture an ordinary module as one functional graph of ATen operations.

    capture(module, args, kwargs) -> Capture

by two steps: dynamo turns forward into one graph of torch calls (`torch_level`), which runs once
more under fake tensors to become ATen operations before dispatch (`trace`, `replay`), to which
roles, values and sources are then attached (`typed`, `simplify`).
"""

from .captured import Capture, CaptureMismatchError, capture

__all__ = ["Capture", "CaptureMismatchError", "capture"]
