"""A timeline as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

The format is that of "Trace Event Format" (Google, 2016): complete events (`ph` X) with times in
microseconds, a process per device or pipeline stage, a thread per stream, memory as a counter.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from autopar.errors import UserError
from autopar.files import replace_file

from .timeline import Timeline

_MICROSECONDS = 1e6


def trace_events(timeline: Timeline, process: str = "device") -> list[dict[str, Any]]:
    """The events of a timeline: what is what first, then spans, then memory."""
    streams = dict.fromkeys(span.stream for span in timeline.spans)
    place: dict[str, tuple[int, int]] = {}
    names: list[dict[str, Any]] = []
    for stream in sorted(streams, key=lambda s: (s != "compute", s)):
        if timeline.stages:  # a process per stage
            pid, tid = int(stream.rpartition(" ")[2]), 0
            name, thread = f"{process} {stream}", "compute"
        else:
            pid, tid = 0, len(place)
            name, thread = process, stream
        place[stream] = pid, tid
        if tid == 0:
            names.append(_name("process_name", pid, 0, name))
        names.append(_name("thread_name", pid, tid, thread))
    spans = [
        {
            "ph": "X",
            "name": span.name,
            "cat": span.phase,
            "ts": span.start_s * _MICROSECONDS,
            "dur": (span.end_s - span.start_s) * _MICROSECONDS,
            "pid": place[span.stream][0],
            "tid": place[span.stream][1],
            "args": {
                "phase": span.phase,
                **({"bytes": span.nbytes} if span.nbytes else {}),
                **({"segment": span.segment, "copy": span.copy} if span.segment else {}),
            },
        }
        for span in timeline.spans
    ]
    memory = [
        {
            "ph": "C",
            "name": "memory",
            "ts": at * _MICROSECONDS,
            "pid": 0,
            "tid": 0,
            "args": {"bytes": nbytes},
        }
        for at, nbytes in timeline.memory.tolist()
    ]
    return [*names, *spans, *memory]


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "ts": 0, "pid": pid, "tid": tid, "args": {"name": name}}


def write_trace(timeline: Timeline, path: str | os.PathLike[str], process: str = "device") -> None:
    """Write a trace file, whole or not at all; raises UserError if it cannot be written."""
    out = Path(path)
    text = json.dumps({"traceEvents": trace_events(timeline, process), "displayTimeUnit": "ms"})
    try:
        replace_file(out, text)
    except OSError as error:
        raise UserError(f"cannot write the trace {out}: {error.strerror}") from None
