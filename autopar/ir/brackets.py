"""Text in brackets: where a bracket closes, and the parts that stand outside any.

Arguments of calls and items of tuples nest, and strings among them may hold brackets and commas:
no regular expression cuts such text, so that what reads graphs scans it here.
"""

from __future__ import annotations

import json


def closing_bracket(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`; raises ValueError."""
    depth, at = 0, start
    while at < len(text):
        if text[at] == '"':
            at = _string_end(text, at)
            continue
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if not depth:
            return at
        at += 1
    raise ValueError(f"{text[start]!r} is never closed in {text[start:]!r}")


def _string_end(text: str, start: int) -> int:
    """Index after the JSON string that starts at `start`."""
    return int(json.JSONDecoder().raw_decode(text, start)[1])


def split_outside(text: str, separator: str = ",") -> list[str]:
    """Parts of `text` between separators outside brackets and strings, stripped.

    A last empty part (after a trailing comma) is dropped; raises ValueError on an open bracket.
    """
    parts, start, at = [], 0, 0
    while at < len(text):
        if text[at] == '"':
            at = _string_end(text, at)
        elif text[at] in "([{":
            at = closing_bracket(text, at) + 1
        else:
            if text[at] == separator:
                parts.append(text[start:at].strip())
                start = at + 1
            at += 1
    parts.append(text[start:].strip())
    return parts if parts[-1] else parts[:-1]
