"""Rows of published training runs, read from CSV; what a row means where a column is silent."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autopar.errors import UserError

NUMBERS = ("layers", "hidden", "vocab", "seq", "gpus", "tp", "pp", "cp", "dp", "global_batch")
OPTIONAL = ("heads", "kv_heads", "ffn", "fsdp", "micro_batch", "zero")
MEASURED = ("step_s", "mem_gb")
TEXTS = ("id", "set", "model", "arch", "device", "recompute", "precision", "oom", "vpp", "source")
COLUMNS = (*TEXTS, *NUMBERS, *OPTIONAL, *MEASURED)


@dataclass(frozen=True)
class Row:
    """One published run. Absent figures are None; sizes are counts, `step_s` seconds, `mem_gb` GB.

    `recompute` is "none", "selective", "layer" (every second layer), "full" or "" (not said).
    `precision` is "bf16", "fp16", "fp32", "fp8" or "fp8 rowwise". `vpp` is the number of model
    chunks per pipeline stage. `sequence_parallel` is None where the row does not say.
    """

    id: str
    family: str
    model: str
    arch: str
    device: str
    source: str
    layers: int
    hidden: int
    heads: int | None
    kv_heads: int | None
    ffn: int | None
    vocab: int
    seq: int
    gpus: int
    tp: int
    pp: int
    cp: int
    dp: int
    fsdp: int | None
    vpp: int
    micro_batch: int | None
    global_batch: int
    recompute: str
    sequence_parallel: bool | None
    precision: str
    zero: int | None
    step_s: float | None
    mem_gb: float | None
    oom: bool | None


class NotCovered(Exception):  # noqa: N818  # not an error: the reason why a row is left out
    """Why a row is not predicted."""


def read_rows(path: Path) -> list[tuple[str, Row | NotCovered]]:
    """(id, row or why it is not covered) of every row of a CSV file.

    Raises UserError, naming line and column, where the file is malformed: unreadable, a column
    that is missing, a field that is no number where one must be, or not positive.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(_rows(file, str(path)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot read {path}: {reason}", fix="give a CSV file of published runs"
        ) from None


def _rows(file: object, path: str) -> Iterator[tuple[str, Row | NotCovered]]:
    reader = csv.DictReader(file)  # type: ignore[call-overload]
    missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
    if missing:
        raise UserError(
            f"{path}, line 1: no column {missing[0]!r}",
            fix=f"the first line names the columns: {', '.join(COLUMNS)}",
        )
    for fields in reader:
        where = f"{path}, line {reader.line_num}"
        if None in fields or None in fields.values():
            raise UserError(
                f"{where}: {'more' if None in fields else 'fewer'} fields than columns",
                fix="quote fields that contain a comma",
            )
        yield fields["id"], _row(fields, where)


def _row(f: dict[str, str], where: str) -> Row | NotCovered:
    whole = {name: _count(f, name, where) for name in NUMBERS}
    some = {name: _count(f, name, where, optional=True) for name in OPTIONAL}
    figures = {name: _figure(f, name, where) for name in MEASURED}
    oom = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": None}
    if f["oom"].strip().lower() not in oom:
        raise UserError(
            f"{where}, column 'oom': {f['oom']!r} is neither true nor false", fix="leave it empty"
        )
    absent = [name for name in NUMBERS if whole[name] is None]
    if absent:
        return NotCovered(f"the row does not say {absent[0]}")
    try:
        recompute, sequence_parallel = _recompute(f["recompute"])
        return Row(
            id=f["id"],
            family=f["set"],
            model=f["model"],
            arch=_arch(f["arch"]),
            device=f["device"].strip(),
            source=f["source"],
            vpp=_chunks(f["vpp"], where),
            recompute=recompute,
            sequence_parallel=sequence_parallel,
            precision=_precision(f["precision"]),
            oom=oom[f["oom"].strip().lower()],
            **whole,  # type: ignore[arg-type]
            **some,  # type: ignore[arg-type]
            **figures,  # type: ignore[arg-type]
        )
    except NotCovered as reason:
        return reason


def _figure(f: dict[str, str], name: str, where: str) -> float | None:
    text = f[name].strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise UserError(
            f"{where}, column {name!r}: {text!r} is not a number that can be",
            fix="write a positive number, or nothing where it is not known",
        )
    return value or None


def _count(f: dict[str, str], name: str, where: str, optional: bool = False) -> int | None:
    value = _figure(f, name, where)
    if value is None and f[name].strip() and not optional:
        raise UserError(f"{where}, column {name!r}: zero", fix="write a positive whole number")
    if value is not None and value != int(value):
        raise UserError(
            f"{where}, column {name!r}: {f[name]!r} is not a whole number",
            fix="write a positive whole number, or nothing where it is not known",
        )
    return None if value is None else int(value)


def _chunks(text: str, where: str) -> int:
    """Model chunks per stage; ">1" is read as 2, the least that it can be."""
    found = re.fullmatch(r"(>?)\s*(\d+)(?:\.0*)?", text.strip())
    if not text.strip():
        return 1
    if found is None:
        raise UserError(f"{where}, column 'vpp': {text!r} is not a number", fix="write 1, or >1")
    return max(1, int(found[2]) + (1 if found[1] else 0))


def _arch(text: str) -> str:
    name = text.strip().lower()
    for other in ("moe", "expert", "mixtral", "bert", "t5", "encoder", "mamba", "vit", "diffusion"):
        if other in name:
            raise NotCovered(f"architecture {text!r}: only dense decoders are modelled")
    for known in ("gpt", "llama", "nemotron"):
        if known in name:
            return known
    raise NotCovered(f"architecture {text!r} is not known")


def _recompute(text: str) -> tuple[str, bool | None]:
    """(policy, whether the text says sequence parallelism)."""
    name = text.strip().lower()
    sequence = True if "sequence" in name else None
    if not name:
        return "", None
    if name.startswith("selective"):
        return ("layer" if "layer" in name else "selective"), sequence
    if name.split("+")[0].split()[0] in ("full", "none", "no", "false", "off", "true", "yes"):
        on = name.startswith(("full", "true", "yes"))
        return ("full" if on else "none"), sequence
    raise NotCovered(f"recomputation {text!r} is not known")


def _precision(text: str) -> str:
    name = text.strip().lower()
    if "fp8" in name or "float8" in name:
        return "fp8 rowwise" if "row" in name else "fp8"
    for known, words in (
        ("bf16", ("bf16", "bfloat16")),
        ("fp16", ("fp16", "float16", "half")),
        ("fp32", ("fp32", "float32", "tf32")),
    ):
        if any(word in name for word in words):
            return known
    if not name:
        return "bf16"
    raise NotCovered(f"precision {text!r} is not known")
