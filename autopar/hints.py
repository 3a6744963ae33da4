"""`autopar.hint`: say in code how a parameter or an activation is to be split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import UserError
from .ir.hint import Dims, Hint, hint_from_json, make_hint
from .ops import hint as hint_op

_ATTRIBUTE = "_autopar_hints"  # of a parameter: what was said about it
T = TypeVar("T", bound=Tensor)


def hint(
    x: T,
    *,
    split: Dims | None = None,
    whole: Dims | None = None,
    replicated: bool | None = None,
    sharded: bool | None = None,
    gather: bool | None = None,
) -> T:
    """Tell the planner how a parameter, or (inside forward) an activation, is to be split.

    Returns `x`: nothing is computed, and on one device nothing changes. Plans without this are not
    considered; what that costs is part of the plan.

    Args:
        x: a parameter of the model, before it is planned, or a tensor in forward.
        split: dims that must be split over at least one mesh axis; `{dim: "tp"}`: over that axis.
        whole: dims that must not be split; `{dim: "tp"}`: not over that axis.
        replicated: True: no dim is split.
        sharded: for parameters: stored in pieces (True) or whole (False).
        gather: for parameters: False: used in the pieces in which it is stored.

    Raises:
        UserError: for a hint that says nothing or contradicts itself; in forward, at capture.
    """
    if isinstance(x, nn.Parameter) and not torch.compiler.is_compiling():
        made = make_hint(
            "param",
            "parameter",
            split=split,
            whole=whole,
            replicated=replicated,
            sharded=sharded,
            gather=gather,
        )
        known = getattr(x, _ATTRIBUTE, ())
        if made not in known:
            setattr(x, _ATTRIBUTE, (*known, made))
        return x
    if not isinstance(x, Tensor):
        raise UserError(f"autopar.hint takes a tensor or a parameter, not a {type(x).__name__}")
    said = _said(split, whole, replicated, sharded, gather)
    return hint_op.default(x, said)  # type: ignore[no-any-return]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _said(
    split: Dims | None,
    whole: Dims | None,
    replicated: bool | None,
    sharded: bool | None,
    gather: bool | None,
) -> str:
    """The words of an activation's hint as text; the graph keeps them."""
    made = make_hint(
        "op",
        "an activation",
        split=split,
        whole=whole,
        replicated=replicated,
        sharded=sharded,
        gather=gather,
    )
    return json.dumps(made.words())


def hints_of(module: nn.Module) -> list[Hint]:
    """The hints that a module's parameters were given, by their first names."""
    found: list[Hint] = []
    for name, parameter in module.named_parameters():
        for made in getattr(parameter, _ATTRIBUTE, ()):
            found.append(hint_from_json({"param": name, **made.words()}))
    return found


def load_hints(path: Path) -> list[Hint]:
    """Read a file of hints (a list of objects); raises UserError that names file and entry."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the hints {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(
            f"the hints {path} are not JSON", fix="see docs/hints_and_editing.md"
        ) from None
    if not isinstance(data, list):
        raise UserError(
            f"the hints {path} are not a list",
            fix='write for example [{"param": "layers.*.weight", "split": 0}]',
        )
    return [hint_from_json(item, f"hint {i} of {path}") for i, item in enumerate(data)]
