"""Checkpoints in the safetensors format: what is in them, slices of it, and writing new ones.

The format (Hugging Face's safetensors, README "Format"): 8 bytes with the little-endian length of
the header; the header, JSON of `{name: {"dtype", "shape", "data_offsets"}}` padded with spaces to a
multiple of 8 bytes; the tensors' bytes one after the other. A checkpoint of several files has an
index, `{"metadata": {"total_size"}, "weight_map": {name: file}}`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autopar.errors import UserError
from autopar.files import replace_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Names of the dtypes in the header (safetensors, `Dtype` in its Rust source).
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint; `dtype` is the name in the header."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, runs: Sequence[Sequence[range]] | None = None) -> Tensor:
        """The tensor, or of every dim the elements in some ranges, in order; on CPU.

        Only what is asked for is read. Raises UserError if the file cannot be read.
        """
        if any(not any(map(len, dim)) for dim in runs or ()):
            kept = [sum(map(len, dim)) for dim in runs or ()]
            return torch.empty(kept, dtype=DTYPES.get(self.dtype, torch.float32))
        with _opened(self.file) as file:
            if not self.shape or runs is None:
                whole: Tensor = file.get_tensor(self.key)
                return whole
            return _read(file.get_slice(self.key), runs, ())


def _read(stored: Any, runs: Sequence[Sequence[range]], slices: tuple[slice, ...]) -> Tensor:
    if len(slices) == len(runs):
        found: Tensor = stored[slices]
        return found
    dim = len(slices)
    parts = [_read(stored, runs, (*slices, slice(r.start, r.stop))) for r in runs[dim] if len(r)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def entries_of(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """The tensors of a checkpoint: a `.safetensors` file, an index, or a folder with either.

    Raises UserError for what is missing, incomplete or not in the format.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if path.suffix == ".json":
        return _indexed(path)
    return _entries_in(path)


def _in_folder(folder: Path) -> Path:
    for name in (INDEX, SINGLE):
        if (folder / name).is_file():
            return folder / name
    indices, files = sorted(folder.glob("*.index.json")), sorted(folder.glob("*.safetensors"))
    for found in (indices, files):
        if len(found) == 1:
            return found[0]
    told = ", ".join(p.name for p in (*indices, *files)) or "none"
    raise UserError(
        f"the folder has neither {INDEX} nor {SINGLE}, and not one safetensors file: {told}",
        where=str(folder),
        fix="give the path of the index or of the file",
    )


def _indexed(index: Path) -> dict[str, Entry]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(key): index.parent / str(name) for key, name in files.items()}
    except OSError as error:
        raise UserError(f"cannot read the index: {error.strerror}", where=str(index)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            "the file is not the index of a checkpoint: JSON with a weight_map", where=str(index)
        ) from None
    found: dict[str, Entry] = {}
    for file in dict.fromkeys(wanted.values()):
        found |= {k: e for k, e in _entries_in(file).items() if wanted.get(k) == file}
    lost = [key for key in wanted if key not in found]
    if lost:
        raise UserError(
            f"{named(lost)} should be in {wanted[lost[0]].name}, says the index, and is not",
            where=str(index),
        )
    return found


def _entries_in(file: Path) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    with _opened(file) as opened:
        for key in list(opened.keys()):
            stored = opened.get_slice(key)
            found[key] = Entry(file, key, tuple(stored.get_shape()), stored.get_dtype())
    return found


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except OSError as error:
        told = error.strerror or str(error)
        raise UserError(f"cannot read the checkpoint: {told}", where=str(file)) from None
    except SafetensorError as error:
        raise UserError(
            f"the file is no complete safetensors file: {error}",
            where=str(file),
            fix="copy or download it again; torch.load files have to be converted first",
        ) from None


def named(names: Sequence[str], most: int = 8) -> str:
    """`a, b, c and 5 more`."""
    told = ", ".join(names[:most])
    return told if len(names) <= most else f"{told} and {len(names) - most} more"


class Writer:
    """Writes one file, a tensor at a time; the file appears when it is complete.

    `like` has tensors (on any device) of the names, shapes and dtypes to come, in order. Trouble is
    kept in `error`, and what follows is dropped: others may wait for this process meanwhile.
    """

    def __init__(self, path: Path, like: Mapping[str, Tensor]) -> None:
        self.error: str | None = None
        self._path, self._part = path, path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._file: Any = None
        try:
            header = _header(like)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("wb")
            self._file.write(len(header).to_bytes(8, "little") + header)
        except (OSError, UserError) as error:
            self._failed(error)

    def add(self, value: Tensor) -> None:
        """Write the next tensor."""
        if self.error is not None or not value.numel():
            return
        flat = value.detach().cpu().contiguous().view(-1)
        try:
            self._file.write(flat.view(torch.uint8).numpy().data)
        except OSError as error:
            self._failed(error)

    def close(self, complete: bool = True) -> None:
        """Put the file in its place, or take away what there is of it."""
        try:
            if self._file is not None:
                self._file.close()
            if self.error is None and complete:
                self._part.replace(self._path)
        except OSError as error:
            self._failed(error)
        finally:
            with contextlib.suppress(OSError):
                self._part.unlink()

    def _failed(self, error: Exception) -> None:
        told = (error.strerror if isinstance(error, OSError) else None) or str(error)
        self.error = f"{self._path}: {told}"


def _header(like: Mapping[str, Tensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in like.items():
        if tensor.dtype not in _NAMES:
            raise UserError(f"{name} is {str(tensor.dtype)[6:]}, which the format does not have")
        end = offset + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write_index(folder: Path, files: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of a checkpoint of several files: the file's name for every tensor's."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(files)}
    replace_file(folder / INDEX, json.dumps(index, indent=1) + "\n")
