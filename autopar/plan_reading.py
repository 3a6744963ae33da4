"""Read plan files: nothing that is not a plan is taken for one."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UserError
from .plan_checks import check_plan
from .plan_types import VERSION, Plan
from .records import MalformedError, read_json, read_record, shown

AGAIN = "make it again with `autopar plan ... --json FILE`"
_MAY_LACK = ("kernels",)  # older files of this version have none


def plan_from_json(text: str, where: str = "plan") -> Plan:
    """Read a plan; raises UserError if it is truncated, of another version or malformed.

    The error names the place inside the file: `params.layers.0.weight.sharding[1]`.
    """
    try:
        raw = read_json(text)
        if not isinstance(raw, dict) or "version" not in raw:
            raise MalformedError("the file is not an autopar plan")
        version = raw["version"]
        if isinstance(version, bool) or version != VERSION:
            raise MalformedError(
                f"the plan file has version {shown(version)}, this autopar reads version {VERSION}"
            )
        plan: Plan = read_record(Plan, raw, optional=_MAY_LACK)
        check_plan(plan)
    except MalformedError as error:
        fix = f"{error.fix}, or {AGAIN}" if error.fix else AGAIN
        raise UserError(f"the plan file cannot be used: {error.what}", where, fix) from None
    except RecursionError:
        raise UserError("the plan file is nested too deeply", where, AGAIN) from None
    return plan


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Load a plan file; raises UserError if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the plan file: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise UserError(
            "cannot read the plan file: it is not text in UTF-8", where=str(path), fix=AGAIN
        ) from None
    return plan_from_json(text, where=str(path))
