"""Read dataclasses from JSON: every field has its type, and what has not is named by its path."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_MOST = 2**63  # no count, size or position is as large
_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


class MalformedError(ValueError):
    """What is wrong with a value of a JSON file, beginning with its path, and what to write."""

    def __init__(self, what: str, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


def read_json(text: str) -> Any:
    """The value of a JSON text; raises MalformedError where it is none, or a key is there twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise MalformedError(
            f"the file is not complete JSON ({error.msg} at line {error.lineno})"
        ) from None
    except MalformedError:
        raise
    except ValueError:  # a number of thousands of digits
        raise MalformedError("the file has a number that is too long to be read") from None
    except RecursionError:
        raise MalformedError("the file is nested too deeply") from None


def read_record(
    kind: type, raw: Any, path: str = "", optional: Collection[str] | None = None
) -> Any:
    """A dataclass of this kind from what `json` made of it, its records and containers included.

    Fields with a default may be left out, or those in `optional` alone. `path` is where the value
    is (`params.layers.0.weight`). Raises MalformedError.
    """
    if not isinstance(raw, dict):
        raise _mistyped(path, raw, "an object")
    known: dict[str, Field[Any]] = {field.name: field for field in fields(kind)}
    for name in raw:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"write {near[0]}" if near else f"take it out: there are {', '.join(known)}"
            raise MalformedError(f"{joined(path, name)} is not known", fix)
    hints = _types_of(kind)
    found = {}
    for name, field in known.items():
        may_lack = field.default is not MISSING or field.default_factory is not MISSING
        if name in raw:
            found[name] = read_value(hints[name], raw[name], joined(path, name))
        elif not (may_lack if optional is None else name in optional):
            raise MalformedError(
                f"{joined(path, name)} is missing", f"add it: {_said(hints[name])}"
            )
    return kind(**found)


def read_value(kind: Any, raw: Any, path: str) -> Any:
    """A value of an annotated type; raises MalformedError."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return read_record(kind, raw, path)
    if origin in (Union, UnionType):
        if raw is None and NoneType in arguments:
            return None
        (inner,) = (a for a in arguments if a is not NoneType)
        return read_value(inner, raw, path)
    if origin is tuple:
        return tuple(_items(arguments, raw, path))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(raw, dict):
            raise _mistyped(path, raw, "an object")
        return {key: read_value(arguments[1], x, joined(path, key)) for key, x in raw.items()}
    if kind is Any:
        return _finite(raw, path)
    wanted = (int, float) if kind is float else (kind,)
    if not isinstance(raw, wanted) or (isinstance(raw, bool) and kind is not bool):
        raise _mistyped(path, raw, _said(kind))
    return _finite(raw, path)


def joined(path: str, name: str) -> str:
    """The path of a named part: names that are not words are quoted."""
    if not re.fullmatch(r"[\w./:-]+", name):
        return f"{path}[{shown(name)}]"
    return f"{path}.{name}" if path else name


def shown(raw: Any) -> str:
    """A JSON value in short, as the file has it."""
    if isinstance(raw, int) and not isinstance(raw, bool) and abs(raw) >= _MOST:
        return "a number of about " + f"{max(1, math.floor(raw.bit_length() * 0.30103))} digits"
    text = json.dumps(raw, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


@cache
def _types_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise MalformedError(f"the key {shown(name)} is twice in one object", "take one out")
        found[name] = value
    return found


def _items(kinds: tuple[Any, ...], raw: Any, path: str) -> Iterable[Any]:
    if not isinstance(raw, list):
        raise _mistyped(path, raw, "a list")
    if kinds[1:] == (...,):
        kinds = kinds[:1] * len(raw)
    if len(raw) != len(kinds):
        raise MalformedError(f"{path} has {len(raw)} entries, not {len(kinds)}")
    for i, (kind, each) in enumerate(zip(kinds, raw, strict=True)):
        yield read_value(kind, each, f"{path}[{i}]")


def _finite(raw: Any, path: str) -> Any:
    """The value; raises MalformedError where it has a number that nothing can have."""
    if isinstance(raw, dict):
        for name, each in raw.items():
            _finite(each, joined(path, name))
    elif isinstance(raw, list):
        for i, each in enumerate(raw):
            _finite(each, f"{path}[{i}]")
    elif isinstance(raw, float) and not math.isfinite(raw):
        raise MalformedError(f"{path} is {raw}, not a finite number")
    elif isinstance(raw, int) and abs(raw) >= _MOST:
        raise MalformedError(f"{path} is {shown(raw)}, which is too large")
    return raw


def _mistyped(path: str, raw: Any, wanted: str) -> MalformedError:
    return MalformedError(f"{path or 'the file'} is {shown(raw)}, not {wanted}")


def _said(kind: Any) -> str:
    """What a type is called in a JSON file."""
    if kind in _NAMES:
        return _NAMES[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join("null" if a is NoneType else _said(a) for a in arguments)
    return "a list" if origin is tuple else "an object"
